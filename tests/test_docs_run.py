"""The Python and the shell blocks of the README and of docs/ run, page by page, on toy data under the pages' names."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cxr_fast.cli.main import main
from cxr_fast.report import writer
from tests.helpers.model_edits import changed, put

from .helpers.documents import NOT_RUN, PAGES, ROOT, Block, blocks, command_of, cxrfast_commands, parse, simple_commands

# How many blocks of a page are not run. Each says why, in a comment above it: `<!-- not run: reason -->`.
LEFT_OUT = {
    "README.md": 3,
    "docs/explanation/benchmarks.md": 1,
    "docs/explanation/scaling.md": 1,
    "docs/explanation/unlikeness.md": 1,
    "docs/how-to/clusters.md": 3,
    "docs/how-to/encoders.md": 2,
    "docs/how-to/fit.md": 1,
    "docs/how-to/hub.md": 2,
    "docs/how-to/install.md": 7,
    "docs/how-to/label_errors.md": 1,
    "docs/how-to/latency.md": 3,
    "docs/how-to/other_films.md": 1,
    "docs/how-to/own_tables.md": 2,
    "docs/how-to/review.md": 1,
    "docs/how-to/runs.md": 1,
    "docs/how-to/search.md": 3,
    "docs/recipes.md": 1,
    "docs/reference/run_folder.md": 1,
    "docs/tutorial/demo.md": 2,
}
# tests/test_docs.py runs this block and looks at what it made.
RUN_ELSEWHERE = {("docs/recipes.md", "python")}

# This page compares two files of a run; a toy's int8 file may not be kept, so a copy of the fp32 file has its name
# and says that it is one.
COMPARED = "docs/how-to/latency.md"

# What a page's command gets beside its own flags, so that it is quick on toys; a flag of the page stays.
ADDED = {
    "cache": ("--weights biomedclip_folder",),
    "sweep": ("--epochs 1,2", "--folds 2"),
    "export": ("--check 8", "--variants fp32"),
    "report": ("--resamples 20",),
    "compare": ("--resamples 100",),
    "evaluate": ("--resamples 100",),
    "bench latency": ("--repeats 3", "--warmup 1"),
    "bench throughput": ("--seconds 1",),
    "bench compare": ("--count 4", "--rounds 2"),
}
# One image of `indiana` is broken; a toy's int8 file may be over its limits; three samples decide no percentile; a
# machine may lack what doctor looks for.
ALLOWED = {"cache": {0, 1}, "export": {0, 1}, "doctor": {0, 1}, "bench latency": {0, 1, 3}}


def test_every_block_runs_or_says_why_not() -> None:
    runnable = [block for block in blocks() if block.language in ("python", "sh")]
    assert len(runnable) > 40
    assert Counter(block.page for block in runnable if block.reason) == LEFT_OUT
    assert all(len(block.reason) > 10 for block in runnable if block.reason)
    marks = sum(len(NOT_RUN.findall(text)) for text in PAGES.values())
    assert marks == sum(LEFT_OUT.values()), "a comment `not run` that stands above no block"


@pytest.fixture(scope="session")
def toy_folder(
    phantoms: Path, toy_data: Path, toy_cache: Path, toy_run: Path, toy_model: Path, lively_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """What the pages' commands read, under the names that they use; copy it, links stay links."""
    out = tmp_path_factory.mktemp("pages") / "folder"
    for name in ("cache", "exports", "new_films", "more", "archive"):
        (out / name).mkdir(parents=True)
    shutil.copy(toy_cache, out / "cache" / "indiana.h5")
    for name in ("indiana", "indiana-2"):
        (out / "exports" / name).mkdir()
        for file in toy_run.iterdir():
            (out / "exports" / name / file.name).symlink_to(file)
    (out / "exports" / "indiana" / "model.fp32.onnx").symlink_to(toy_model)
    images = sorted((phantoms / "images").iterdir())
    for image, name in zip(images, ("a.png", "b.png", "c.dcm", "d.png"), strict=False):
        shutil.copy(image, out / "new_films" / name)
    for image, name in zip(images, ("film.png", "more/e.dcm", "archive/f.dcm"), strict=False):
        shutil.copy(image, out / name)
    (out / "broken.png").write_bytes(images[0].read_bytes()[:700])
    (out / "indiana").symlink_to(toy_data)
    (out / "films").symlink_to(phantoms / "images")
    (out / "biomedclip_folder").symlink_to(lively_weights)
    write_table(out, images[4:28])
    with np.load(toy_run / "predictions.npz") as file:
        (out / "test_patients.txt").write_text("\n".join(sorted(set(file["group"].tolist()))[:6]) + "\n")
    return out


def write_table(folder: Path, images: list[Path]) -> None:
    """my.csv: a few findings of some phantoms, a patient each."""
    with (folder / "my.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "group", "view", "meta:sex", "Cardiomegaly", "Effusion"])
        for row, image in enumerate(images):
            table.writerow([image, f"p{row}", "Frontal", "FM"[row % 2], row % 2, row // 2 % 2])


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("page", [name for name in PAGES if blocks("sh", name) or blocks("python", name)])
def test_the_blocks_of_a_page_run(page: str, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(toy_folder, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(writer, "write_report", quick_report)
    if page == COMPARED:
        copied = Path("exports/indiana/model.int8.onnx")
        changed(Path("exports/indiana/model.fp32.onnx"), copied, put("variant", '"int8"'))
    for block in blocks(page=page):
        if block.reason or (page, block.language) in RUN_ELSEWHERE:
            continue
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {"__name__": "page"})
        elif block.language == "sh":
            run_shell(block)


def quick_report(folder: Path, *, write: Any = writer.write_report, **asked: Any) -> Any:
    """Write the report where a command asks for it by `report`; the one at the end of each sweep costs seconds."""
    return write(folder, **asked) if asked else SimpleNamespace(page=folder / "report.html")


def run_shell(block: Block) -> None:
    """Run a shell block: line by line here where it holds only our commands, else by `sh`."""
    ours = cxrfast_commands(block.text)
    if len(ours) < len(list(simple_commands(block.text))):
        run_by_sh(block)
        return
    for line in ours:
        words = parse(line)
        name, command = command_of(words)
        flags = {option for param in command.params for option in param.opts}
        wanted = [*ADDED.get(name, ()), *(["--threads 1"] if "--threads" in flags else [])]
        if name == "cache" and "--out" in words:
            wanted.append("--limit 12")
        if "--split-from" in words:  # takes its folds from the run
            wanted.remove("--folds 2")
        more = [word for extra in wanted if extra.split()[0] not in words for word in extra.split()]
        result = CliRunner().invoke(main, [*words, *more])
        said = f"{block}: {line}\n{result.output}"
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise AssertionError(said) from result.exception
        assert result.exit_code in ALLOWED.get(name, {0}), said


def run_by_sh(block: Block) -> None:
    """Run a block by `sh`, with a `cxrfast` that is this Python's."""
    if not (shutil.which("sh") and shutil.which("awk")):
        pytest.skip("needs sh and awk")
    shims = Path("shims").resolve()
    shims.mkdir(exist_ok=True)
    (shims / "cxrfast").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cxr_fast "$@" --threads 1\n')
    (shims / "cxrfast").chmod(0o755)
    environment = {**os.environ, "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["sh", "-c", block.text], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert result.returncode in (0, 1), f"{block}\n{result.stdout}\n{result.stderr}"
    assert not re.search(r"^(error|usage|Traceback|sh):?", result.stderr, re.MULTILINE | re.IGNORECASE), result.stderr


def test_a_block_that_fails_is_found(toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(toy_folder, tmp_path / "folder", symlinks=True)
    monkeypatch.chdir(tmp_path / "folder")
    for wrong in ("cxrfast info nowhere.h5\n", "cxrfast info nowhere.h5; echo done\n"):
        with pytest.raises(AssertionError, match=r"nowhere\.h5"):
            run_shell(Block("page.md", 1, "sh", wrong, ""))
