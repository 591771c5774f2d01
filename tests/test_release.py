"""What a release has beside the package: pages and metadata that agree with each other and with the code."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import cxr_fast

from .test_architecture import ARGUMENTS, FUNCTION, LINES, MODULES, ORDER, PACKAGE, STRANGERS, TORCH_FREE

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
SECURITY = (ROOT / "SECURITY.md").read_text("utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def test_the_citation_has_what_the_format_needs_and_is_of_this_version() -> None:
    # Citation File Format 1.2.0, required keys: https://github.com/citation-file-format/citation-file-format
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["version"] == cxr_fast.__version__
    assert CITATION["license"] == PROJECT["project"]["license"]
    assert CITATION["repository-code"] == PROJECT["project"]["urls"]["Repository"]
    assert CITATION["authors"] == PROJECT["project"]["authors"]


def test_the_changelog_keeps_its_form() -> None:
    heads = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", head) for head in heads[1:])
    assert f"\n## [{cxr_fast.__version__}]" in CHANGELOG or f"This will be {cxr_fast.__version__}" in CHANGELOG
    kinds = set(re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    links = re.findall(r"^\[(\S+)\]: (\S+)$", CHANGELOG, re.MULTILINE)
    assert [name for name, _ in links] == [head.split("]")[0].lstrip("[") for head in heads]
    assert all(link.startswith(PROJECT["project"]["urls"]["Repository"]) for _, link in links)


def test_contributing_has_the_order_and_the_sizes_that_are_tested() -> None:
    table = re.findall(r"^\| (`.*?) \| (.*) \|$", CONTRIBUTING, re.MULTILINE)
    assert [name for first, _ in table for name in re.findall(r"`(\w+)`", first)] == list(ORDER)
    sizes = f"{MODULES} modules in a folder, {LINES} lines in a module, {FUNCTION} lines in a function, {ARGUMENTS} arg"
    assert f"At most {sizes}" in CONTRIBUTING
    assert (
        f"Everything from `{TORCH_FREE[0]}` to `{TORCH_FREE[-2]}`, and `{TORCH_FREE[-1]}`, never imports torch"
        in CONTRIBUTING
    )
    (line,) = [line for line in CONTRIBUTING.splitlines() if "do not import each other" in line]
    assert set(re.findall(r"`(\w+)`", line)) == STRANGERS


def test_commands_and_files_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    named = {word for line in re.findall(r"\bmake ([a-z -]+)", CONTRIBUTING) for word in line.split() if "-" in word}
    named |= {first for first, *_ in (line.split() for line in re.findall(r"\bmake ([a-z -]+)", CONTRIBUTING))}
    assert {"install", "test", "test-ray", "dist"} <= named <= targets
    for page in (CONTRIBUTING, SECURITY, CHANGELOG):
        names = re.findall(r"`((?:tests|docs|docker|benchmarks|cxr_fast)/[\w./]+)`", page)
        assert all((ROOT / name).exists() for name in names)


def test_nothing_that_is_read_runs_code_as_the_page_says() -> None:
    loads = [
        ast.unparse(node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and re.fullmatch(r"(torch|np|numpy|pickle)\.loads?", ast.unparse(node.func))
    ]
    assert len(loads) > 3
    assert not [call for call in loads if call.startswith("pickle") or "allow_pickle" in call]
    assert all("weights_only=True" in call for call in loads if call.startswith("torch."))
    assert "`weights_only=True`" in SECURITY


# ------------------------------------------------------------------------------------------- the archives


@pytest.fixture(scope="module")
def check_dist() -> ModuleType:
    """.ci/check_dist.py."""
    spec = importlib.util.spec_from_file_location("check_dist", ROOT / ".ci" / "check_dist.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_source_archive_takes_is_named_and_exists() -> None:
    named = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    assert all((ROOT / name).exists() for name in named)
    assert {"cxr_fast", "tests", "docs", "benchmarks"} <= set(named)
    assert not {"demo", "cache", "exports", "dist"} & set(named)


def test_whole_archives_pass_and_what_is_planted_is_found(check_dist: ModuleType) -> None:
    own = ["cxr_fast/__init__.py", "cxr_fast/py.typed", "cxr_fast/report/templates/card.md.j2"]
    sdist = [*check_dist.NEEDED, *own, "cache/README.md", "exports/README.md", "tests/test_release.py"]
    wheel = [*own, "cxr_fast-0.dist-info/METADATA"]
    assert check_dist.problems(sdist, wheel) == []
    for name in (
        *("demo/data/a.png", "cache/nih.h5", "exports/run/run.json", "tests/__pycache__/a.pyc", ".pytest_cache/x"),
        *("tests/.hypothesis/x", "docs/tutorial/first_run/model.onnx", ".venv/bin/python", "dist/a.whl"),
    ):
        assert check_dist.problems([*sdist, name], wheel) == [f"the source archive holds {name}"]
    assert check_dist.problems(sdist[1:], wheel) == ["the source archive lacks README.md"]
    assert check_dist.problems(sdist, wheel[1:]) == ["the wheel lacks cxr_fast/__init__.py"]
    assert check_dist.problems(sdist, [*wheel, "tests/x.py"]) == ["the wheel holds tests/x.py"]
    without = [name for name in wheel if not name.endswith("py.typed")]
    assert "the wheel lacks cxr_fast/py.typed" in check_dist.problems(sdist, without)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_install_follows_the_extras(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()

    def plan(*flags: str) -> str:
        words = ["make", "-n", "install", "NO_UV=1", *flags]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "-e '.[train,gpu,dev]'" in plan()
    assert "rm -rf" not in plan(), "nothing is there to be made anew"
    (tmp_path / ".venv" / ".installed-train-gpu-dev").touch()
    assert "[train" not in plan()
    assert "-e '.[train,cpu,dev]'" in (again := plan("CPU=1"))
    assert "rm -rf .venv" in again, "pip would keep torch with CUDA, and both builds of ONNX Runtime"
