"""`cxrfast fit`: what its parts would do alone, once, whatever interrupts it."""

from __future__ import annotations

import csv
import gc
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from cxr_fast.cli.fit.command import CACHE_ONLY, SOURCE_FLAGS, fit
from cxr_fast.cli.fit.flags import part_context, rename_flags
from cxr_fast.cli.main import main
from cxr_fast.inference import model_file
from tests.helpers import runs, states

SWEEP = ["--epochs", "2,3", "--folds", "2", "--batch-size", "8", "--lr", "1e-3"]
EXPORT = ["--variants", "fp32", "--check", "4"]
SAME = ("model_sha256", "labels", "thresholds", "views")
USUAL = ["--device", "cpu", "--threads", "1"]


def prefixed(part: str, words: Sequence[str]) -> list[str]:
    return [f"--{part}-{word[2:]}" if word.startswith("--") else word for word in words]


def call(*words: Any) -> Result:
    """Run a command. A process of its own would let go of the cache when it ends; here the traceback must go first."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    result.exc_info = None
    if result.exception is not None:
        result.exception.__traceback__ = None
    gc.collect()
    return result


def flags(weights: Path) -> list[str]:
    return ["--cache-weights", str(weights), *prefixed("sweep", SWEEP), *prefixed("export", EXPORT), *USUAL]


@pytest.fixture(scope="module")
def desk(
    toy_data: Path, lively_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], Result]:
    """A folder in which a fit was run, its words, and what it printed; do not write into it."""
    folder = tmp_path_factory.mktemp("fit")
    words = ["fit", str(toy_data), *flags(lively_weights)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, words, call(*words)


def test_it_does_what_its_parts_do(desk: Any, toy_data: Path, lively_weights: Path, tmp_path: Path) -> None:
    folder, _, done = desk
    assert done.exit_code == 1, done.output  # one film is cut short
    assert done.output.count("1 image(s) failed and will not be trained on") == 1
    assert "exit 1: films failed and were not trained on" in done.output
    report, predict = (line for line in done.stdout.splitlines()[-2:])
    (run,) = (folder / "exports").iterdir()
    assert report.startswith(f"report: exports/{run.name}/report.html")
    assert predict == f"predict: cxrfast predict exports/{run.name} new_films/ --out predictions.csv"
    cache = tmp_path / f"{run.name}.h5"
    assert call("cache", toy_data, "--weights", lively_weights, "--out", cache, *USUAL).exit_code == 1
    assert cache.read_bytes() == (folder / "cache" / cache.name).read_bytes()
    assert call("sweep", cache, "--out", tmp_path / "run", *SWEEP, *USUAL).exit_code == 0
    runs.same_numbers(run, tmp_path / "run")
    assert call("export", tmp_path / "run", *EXPORT).exit_code == 0
    one, two = (model_file.read(path / "model.fp32.onnx") for path in (run, tmp_path / "run"))
    assert [one[name] for name in SAME] == [two[name] for name in SAME]
    assert "model.fp32.onnx" in (run / "MODEL_CARD.md").read_text()


def test_the_same_again_keeps_what_is_done(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, words, done = desk
    monkeypatch.chdir(folder)
    (run,) = (folder / "exports").iterdir()
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    again = call(*words)
    assert again.exit_code == done.exit_code
    assert f"exports/{run.name} is a finished run of the same settings and films: kept" in again.output
    assert "export, 4 of 5: files of the same settings exist" in again.output
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before
    assert [path.name for path in (folder / "exports").iterdir()] == [run.name]
    # The settings of the run are those that --from takes; nothing is left to do.
    source = words[1]
    same = call("fit", source, "--from", f"exports/{run.name}", *USUAL)
    assert "finished run of the same settings and films: kept" in same.output
    assert "export, 4 of 5: files of the same settings exist" in same.output
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before
    # The same folder for other settings is refused, with fit's own flag.
    other = call(*words, "--out", f"exports/{run.name}", "--sweep-seed", "1")
    assert other.exit_code == 2
    assert "is a run of other settings or films" in other.output
    assert "--sweep-overwrite" in other.output


def test_a_damaged_model_file_is_exported_again(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, words, _ = desk
    monkeypatch.chdir(folder)
    (run,) = (folder / "exports").iterdir()
    model = run / "model.fp32.onnx"
    model.write_bytes(model.read_bytes()[:-1000])
    again = call(*words)
    assert again.exit_code == 1, again.output  # one film is cut short, as before
    assert "they are not as they were written, and are exported again" in again.output
    assert again.output.rstrip().endswith(f"cxrfast predict exports/{run.name} new_films/ --out predictions.csv")
    assert model_file.read(model)["variant"] == "fp32"
    assert json.loads((run / "fit.json").read_text())["files"] == [str(model)]


def test_a_dry_run_writes_nothing_and_says_all(
    toy_data: Path, lively_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("fit", toy_data, *flags(lively_weights), "--dry-run")
    assert done.exit_code == 0, done.output
    plan = {line.partition(":")[0]: line for line in done.output.splitlines()}
    for part, text in (
        ("prepare", "classes of"),
        ("cache", "encoder "),
        ("cache", "expected time"),
        ("sweep", "2 folds, epochs 2,3"),
        ("sweep", "expected time"),
        ("sweep", "timed on made-up activations"),
        ("export", "fp32; expected time"),
        ("verify", "expected time"),
        ("disk", "free"),
        ("in all", "about "),
        ("in all", "not counted, since not known before: figures and report"),
    ):
        assert text in plan[part], part
    assert not list(tmp_path.iterdir())


def test_the_time_left_is_of_all_parts(desk: Any) -> None:
    _, _, done = desk
    lines = [line for line in done.stderr.splitlines() if "(4 of 5): " in line]
    assert lines
    assert all(re.search(r", about [\dhmins ]+ of all$", line) for line in lines), lines
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("from here on: about ")]
    assert "not counted" in line


def test_a_cache_that_is_there_is_planned_from(
    phantoms: Path, lively_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every film of it is sound, so that nothing is left to encode."""
    monkeypatch.chdir(tmp_path)
    asked = ["fit", phantoms, *flags(lively_weights)]
    clustered = call(*asked, "--dry-run", "--sweep-cluster", "auto")
    assert clustered.exit_code == 0, clustered.output
    assert "; expected time unknown: a cluster trains" in clustered.output
    assert re.search(r"^in all: about [\dhmins ]+ without the sweep; ", clustered.output, re.MULTILINE)
    assert call("cache", phantoms, "--weights", lively_weights, *USUAL).exit_code == 0
    planned = call(*asked, "--dry-run")
    assert planned.exit_code == 0, planned.output
    plan = {line.partition(":")[0]: line for line in planned.output.splitlines()}
    assert plan["sweep"].endswith("; its plan follows")
    assert "in all" not in plan
    assert "expected time" in planned.output.partition("sweep, 3 of 5")[2]
    assert plan["from here on"].startswith("from here on: about ")


def test_what_a_cache_will_not_hold_is_found_before_it_is_made(
    toy_data: Path, lively_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("fit", toy_data, *flags(lively_weights), "--sweep-train-blocks", "3")
    assert done.exit_code == 2, done.output
    assert "--sweep-train-blocks: 3 is more than the 2 block(s)" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sweep-grid", "lr=1e-3", "--sweep-lr", "1e-4"], "--sweep-lr and --sweep-grid lr="),
        (["--sweep-grid", "nothing=1"], "--sweep-grid"),
        (["--export-variants", "fp64"], "--export-variants: 'fp64'"),
        (["--cache-gather"], "--cache-gather is for --cache-cluster"),
        (["--cache-device", "cuda:99"], "cuda"),
        (["--sweep-epochs", "x"], "--sweep-epochs"),
    ],
)
def test_wrong_flags_are_found_before_anything_is_read(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("fit", tmp_path / "missing.csv", *words)
    assert done.exit_code == 2
    assert said in done.output


def test_a_table_of_other_columns_is_read_as_prepare_reads_it(
    toy_data: Path, lively_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films = sorted((toy_data / "images").iterdir())
    table = tmp_path / "films.csv"
    with open(table, "w", newline="") as file:
        csv.writer(file, delimiter=";").writerows(
            [
                ["Datei", "Patient", "Befund"],
                *([f.name, f"p{i // 2}", "Mass" if i % 3 else "Edema"] for i, f in enumerate(films)),
            ]
        )
    monkeypatch.chdir(tmp_path)
    named = ["--path", "Datei", "--group", "Patient", "--labels", "Befund", "--images", toy_data / "images"]
    assert call("prepare", table, *named, "--out", "manifest.csv").exit_code == 0
    alone = call("cache", "manifest.csv", "--limit", "9", "--weights", lively_weights, "--out", "alone.h5", *USUAL)
    assert alone.exit_code == 1, alone.output
    done = call("fit", table, *named, "--cache-limit", "9", "--cache-out", "fit.h5", *flags(lively_weights))
    assert done.exit_code in (1, 2), done.output  # too few patients to train
    from cxr_fast.activations.cache import open_cache

    one, two = open_cache("alone.h5"), open_cache("fit.h5")
    assert one.header.groups == two.header.groups
    assert one.header.classes == two.header.classes
    assert one.header.meta["fingerprint"] == two.header.meta["fingerprint"]
    assert (one.header.labels == two.header.labels).all()
    assert one.sha256 == two.sha256


def test_every_flag_of_the_parts_is_offered() -> None:
    own = {str(param.name): param for param in fit.params if isinstance(param, click.Option)}
    left_out = {
        "prepare": {"out", "labels_only"},
        "cache": {"earlier", "dry_run", *SOURCE_FLAGS},
        "sweep": {"out", "name", "earlier", "dry_run"},
        "export": {"earlier"},
        "verify": set(CACHE_ONLY),
    }
    for part, absent in left_out.items():
        for param in main.commands[part].params:
            if not isinstance(param, click.Option) or param.name in absent:
                continue
            found = own[str(param.name) if part == "prepare" else f"{part}_{param.name}"]
            assert (found.type, found.default, found.help) == (param.type, param.default, param.help)
    assert not [name for name in SOURCE_FLAGS if name not in own]
    flags = [flag for param in fit.params for flag in (*param.opts, *param.secondary_opts)]
    assert len(flags) == len(set(flags))


def test_a_part_sees_what_was_given() -> None:
    words = ["films.csv", "--sweep-folds", "3", "--recipe", "tuned", "--device", "cpu", "--sweep-device", "auto"]
    ctx = fit.make_context("fit", words)
    told = part_context(ctx, main.commands["sweep"], "sweep", cache=None, name=None)
    given = click.core.ParameterSource.COMMANDLINE
    assert (told.params["folds"], told.params["recipe"], told.params["device"]) == (3, "tuned", "auto")
    assert told.get_parameter_source("folds") == told.get_parameter_source("recipe") == given
    assert told.get_parameter_source("epochs") != given
    assert part_context(ctx, main.commands["cache"], "cache", dry_run=False).params["device"] == "cpu"
    assert set(told.params) == {param.name for param in main.commands["sweep"].params}
    text = "--lr: too high; --lr-like --out X, `cxrfast sweep --lr 1` and --no-lr stay"
    assert rename_flags(ctx, "sweep", text) == text.replace("--lr:", "--sweep-lr:")


# The first thing of a part says so, and waits there until the signal comes.
HELD = """
import sys, time
from cxr_fast.activations.encoder import Encoder
from cxr_fast.export import variants
from cxr_fast.training.folds.fold import Fold
name = sys.argv.pop(1)
place, what = {"cache": (Encoder, "__call__"), "sweep": (Fold, "run_epoch"), "export": (variants, "build")}[name]
own, count = getattr(place, what), 0
def held(*args, **named):
    global count
    found, count = own(*args, **named), count + 1
    if count == 3 or name == "export":
        print("here", flush=True)
        for _ in range(3000 if name == "export" else 30):
            time.sleep(0.01)
    return found
setattr(place, what, held)
from cxr_fast.cli.main import main
main()
"""


@pytest.mark.kill
def test_a_signal_at_any_stage_is_gone_on_from(
    desk: Any, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, words, _ = desk
    for stage in ("cache", "sweep", "export"):
        command = [sys.executable, "-c", HELD, stage, *words]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        ) as running:
            assert running.stdout is not None
            assert "here\n" in iter(running.stdout.readline, ""), stage
            running.send_signal(signal.SIGINT)
            states.wait_until(lambda: running.poll() is not None, "an end")
            _, errors = running.communicate()
        assert running.returncode == 130, errors
        assert "same command again" in errors
    (run,) = (tmp_path / "exports").iterdir()
    assert not list(run.glob("model.*.onnx*"))
    monkeypatch.chdir(tmp_path)
    assert call(*words).exit_code == 1  # as without a signal: one film is cut short
    runs.same_numbers(run, folder / "exports" / run.name)
    assert (run / "model.fp32.onnx").is_file()
