"""The Dockerfiles copy what exists, run what their page says, and their steps are run in order; no engine is needed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from cxr_fast.cli.main import main

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PAGE = (ROOT / "docker" / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")


@pytest.fixture(scope="module")
def steps() -> ModuleType:
    """docker/run_steps.py."""
    spec = importlib.util.spec_from_file_location("run_steps", ROOT / "docker" / "run_steps.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_steps"] = module  # its dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


def spaced(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_copied_exists_and_is_sent_to_the_engine(steps: ModuleType, path: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copied = [step.text.split() for step in steps.parse(path.read_text("utf-8")) if step.instruction == "COPY"]
    sources = {name for words in copied if not words[0].startswith("--from=") for name in words[:-1]}
    assert sources == kept
    assert all((ROOT / name).exists() for name in sources)
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {needed["readme"], *needed["license-files"], "pyproject.toml", "cxr_fast"} <= sources


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_run_stands_in_the_page(steps: ModuleType, path: Path) -> None:
    commands = [step.text for step in steps.parse(path.read_text("utf-8")) if step.instruction == "RUN"]
    assert len(commands) == 2
    for command in commands:
        assert spaced(command) in spaced(SHELL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_image_runs_the_program_as_a_user_without_rights(steps: ModuleType, path: Path) -> None:
    last: dict[str, str] = {}
    for step in steps.parse(path.read_text("utf-8")):
        last = {} if step.instruction == "FROM" else last | {step.instruction: step.text}
    assert last["USER"] == "10001:10001"
    assert json.loads(last["ENTRYPOINT"]) == ["cxrfast"]
    # Between the files there is one fact: the same folders, and the same way to install.
    assert "RUN" not in last


def test_images_install_the_extras_that_they_say(steps: ModuleType) -> None:
    asked = {path.stem: re.findall(r"\[([\w,]+)\]\"", path.read_text("utf-8")) for path in FILES}
    assert asked == {"predict": ["cpu,dicom"], "train": ["train,gpu,dicom,parquet"]}
    for (extras,) in asked.values():
        assert f"cxr-fast[{extras}]" in PAGE


def test_commands_of_the_page_parse() -> None:
    lines = [line for line in SHELL.splitlines() if line.startswith("docker run")]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        (at,) = [i for i, word in enumerate(words) if re.fullmatch(r"cxr-fast-(predict|train)", word)]
        name, command, rest = main.resolve_command(main.make_context("cxrfast", words[at + 1 :]), words[at + 1 :])
        assert command is not None
        command.make_context(name, rest)


def test_every_file_named_in_the_page_exists() -> None:
    for name in re.findall(r"docker/[\w.]+", PAGE):
        assert (ROOT / name).is_file(), name


def test_instructions_are_read_as_an_engine_reads_them(steps: ModuleType) -> None:
    text = 'FROM a AS b\n# note\nRUN one && \\\n    # inside\n    two\nFROM c\nENTRYPOINT ["x"]\n'
    found = [(step.instruction, step.text, step.stage) for step in steps.parse(text)]
    assert found == [("FROM", "a AS b", 0), ("RUN", "one && two", 0), ("FROM", "c", 1), ("ENTRYPOINT", '["x"]', 1)]


PIP = """#!/bin/sh
echo "$PWD $*" >> {log}
case "$1" in
wheel) mkdir -p {folder}/dist && touch {folder}/dist/cxr_fast-0-py3-none-any.whl ;;
*) printf '#!/bin/sh\\necho "$HOME $PWD $*" >> {log}\\n' > {folder}/opt/cxr-fast/bin/cxrfast
   chmod +x {folder}/opt/cxr-fast/bin/cxrfast ;;
esac
"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_step_runs_in_its_folder(
    steps: ModuleType, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the packages: a stand-in for pip, which needs a network, records how it was called."""
    folder, log = tmp_path / "image", tmp_path / "log"
    (folder / "base" / "bin").mkdir(parents=True)
    (folder / "base" / "bin" / "pip").write_text(PIP.format(log=log, folder=folder))
    (folder / "base" / "bin" / "pip").chmod(0o755)
    (folder / "base" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("SECRET", "of the caller")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    image = steps.Image(folder)
    for step in steps.parse(path.read_text("utf-8")):
        image.do(step)
    image.call("--version")
    wheel, install, called = log.read_text().splitlines()
    assert wheel.startswith(f"{folder}/src wheel ")
    assert wheel.endswith(f"--wheel-dir {folder}/dist .")
    assert (
        f"--python {folder}/opt/cxr-fast install --no-cache-dir {folder}/dist/cxr_fast-0-py3-none-any.whl[" in install
    )
    assert called == f"{folder}/tmp {folder}/data --version"
    assert "SECRET" not in image.environment
    assert (folder / "src" / "cxr_fast" / "py.typed").is_file()


def test_a_step_that_fails_or_is_unknown_ends_the_run(steps: ModuleType, tmp_path: Path) -> None:
    image = steps.Image(tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        image.do(steps.Step("RUN", "false && true", 0))
    with pytest.raises(ValueError, match="HEALTHCHECK is not known here"):
        image.do(steps.Step("HEALTHCHECK", "CMD true", 0))
    with pytest.raises(ValueError, match="only a path that exists"):
        image.do(steps.Step("COPY", "--from=build /opt/other /opt/other", 1))
