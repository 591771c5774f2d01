"""The commands that are killed, on toy data: 24 phantoms of 64 pixels, a ViT of 6 blocks and width 64."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .processes import Commands

TOY = "random:0:test_vit"
SWEEP = ("--folds", "3", "--epochs", "2,4", "--batch-size", "4", "--device", "cpu")
RATE = ("--lr", "1e-3")
EVERY = 0.1  # seconds between two looks of `predict --watch`


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One command. Words `{in}` and `{out}` of it stand for the folder of inputs, which it only reads, and the folder
    that it writes into, which begins as a copy of the folder START of the inputs, where there is one.

    `refusal` is what the command says, with exit code 2, once its result is there. `watch` is the table after
    whose first round `predict --watch` is told to end.
    """

    name: str
    words: tuple[str, ...]
    codes: tuple[int, ...] = (0,)
    start: str = ""
    refusal: str = ""
    watch: str = ""

    def arguments(self, inputs: Path, out: Path) -> list[str]:
        """The command's words for these folders."""
        return [word.replace("{in}", str(inputs)).replace("{out}", str(out)) for word in self.words]

    def begin(self, inputs: Path, out: Path) -> None:
        """Make the folder that the command writes into as it is before the first run."""
        shutil.rmtree(out, ignore_errors=True)
        if self.start:
            shutil.copytree(inputs / self.start, out)
        else:
            out.mkdir()


def _sweep(name: str, cache: str, *more: str) -> Scenario:
    words = ("sweep", f"{{in}}/{cache}", "--out", "{out}/run", *SWEEP, *more)
    return Scenario(name=name, words=words, refusal="/run exists; give another --out")


def _predict(name: str, end: str, *more: str, watch: bool = False) -> Scenario:
    return Scenario(
        name=name,
        words=(
            *("predict", "{in}/run/model.fp32.onnx", "{in}/films.csv", "--out", f"{{out}}/answers.{end}"),
            *("--batch-size", "2", "--threads", "1", "--workers", "1", "--device", "cpu", *more),
        ),
        watch=f"answers.{end}" if watch else "",
    )


CACHE = (
    "cache",
    "{in}/data",
    "--weights",
    TOY,
    "--batch-size",
    "4",
    "--workers",
    "1",
    "--threads",
    "1",
    "--device",
    "cpu",
)
ALL = (
    Scenario(name="cache", words=(*CACHE, "--out", "{out}/toy.h5")),
    Scenario(name="cache of changed films", words=(*CACHE, "--out", "{out}/toy.h5"), start="older"),
    Scenario(name="cache --shards 3", words=(*CACHE, "--out", "{out}/toy.shards.json", "--shards", "3")),
    Scenario(
        name="cache, 3 shards to 2", words=(*CACHE, "--out", "{out}/toy.shards.json", "--shards", "2"), start="sharded"
    ),
    _sweep("sweep, head alone", "head.h5", *RATE),
    _sweep("sweep, one block", "toy.h5", "--train-blocks", "1", *RATE),
    _sweep("sweep --grid", "head.h5", "--grid", "lr=1e-3,1e-2"),
    _sweep("sweep --final refit --retrain-head", "toy.h5", *RATE, "--final", "refit", "--retrain-head", "balanced"),
    Scenario(
        name="sweep --overwrite, over a run and an unfinished one",
        words=("sweep", "{in}/head.h5", "--out", "{out}/run", *SWEEP, *RATE, "--overwrite"),
        start="replaced",
    ),
    _predict("predict to CSV", "csv", "--decide"),
    _predict("predict to Parquet, studies", "parquet", "--study-pool", "mean"),
    _predict("predict to JSON lines", "jsonl"),
    _predict("predict --watch", "csv", "--watch", str(EVERY), watch=True),
    Scenario(
        name="evaluate",
        words=("evaluate", "{in}/run/model.fp32.onnx", "{in}/data", "--out", "{out}/page", "--resamples", "20"),
    ),
    Scenario(name="review", words=("review", "{out}/run", "--top", "2"), start="reviewed"),
    Scenario(name="export", words=("export", "{out}/run", "--variants", "fp32", "--check", "8"), start="reviewed"),
    Scenario(
        name="fit",
        words=(
            *("fit", "{in}/data", "--out", "{out}/run", "--cache-out", "{out}/toy.h5", "--cache-weights", TOY),
            *("--cache-workers", "1", "--device", "cpu", "--sweep-folds", "3", "--sweep-epochs", "1,2"),
            *("--sweep-batch-size", "8", "--export-variants", "fp32", "--export-check", "8"),
        ),
    ),
)
OnStep = Callable[[str], None]


def make_inputs(commands: Commands, folder: Path, say: OnStep) -> None:
    """Make what the scenarios read: phantoms, two caches, a run with its model, and folders to begin with."""

    def run(*words: object) -> None:
        say(f"cxrfast {words[0]}")
        if commands.run([str(word) for word in words]) not in (0, 1):
            raise SystemExit(f"{' '.join(map(str, words))}\n{commands.text()}")

    data = folder / "data"
    run("phantom", data, "--studies", 12, "--size", 64)
    run("prepare", data, "--out", folder / "films.csv")
    older = folder / "older"
    older.mkdir()
    inputs = [word.replace("{in}", str(folder)) for word in CACHE]
    # An older cache of the same list: a quarter of its films have changed since.
    films = sorted((data / "images").iterdir())
    kept = {path: path.read_bytes() for path in films}
    for one, other in zip(films[::4], films[1::4], strict=False):
        one.write_bytes(kept[other])
    run(*inputs, "--out", older / "toy.h5")
    for path, content in kept.items():
        path.write_bytes(content)
    run(*inputs, "--out", folder / "toy.h5")
    (folder / "sharded").mkdir()
    run(*inputs, "--out", folder / "sharded" / "toy.shards.json", "--shards", 3)
    run(*inputs, "--out", folder / "head.h5", "--unfreeze-blocks", 0)
    run("sweep", folder / "toy.h5", "--out", folder / "run", *SWEEP, *RATE)
    (folder / "reviewed").mkdir()
    shutil.copytree(folder / "run", folder / "reviewed" / "run")
    run("export", folder / "run", "--variants", "fp32", "--check", 8)
    # A run, and an unfinished one with other settings.
    replaced = folder / "replaced"
    shutil.copytree(folder / "reviewed", replaced)
    other = ("--epochs", "400", "--folds", "3", "--lr", "1e-2", "--batch-size", "4", "--device", "cpu")
    commands.start(["sweep", str(folder / "head.h5"), "--out", str(folder / "long"), *other])
    states = folder / "long.partial" / "states"
    while len(list(states.glob("*.safetensors"))) < 3 and not commands.is_over():
        time.sleep(0.01)
    commands.kill()
    if commands.wait() != -signal.SIGKILL:
        raise SystemExit(f"a sweep that was to be killed has ended\n{commands.text()}")
    shutil.move(folder / "long.partial", replaced / "run.partial")
