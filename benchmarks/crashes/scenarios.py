"""The commands that are killed, on toy data: 24 phantoms of 64 pixels, a ViT of 6 blocks and width 64."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Sequence
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
# What is made for them beside the phantoms, in this order, and what each is made of.
MADE_OF: dict[str, tuple[str, ...]] = {
    "films.csv": (), "older": (), "toy.h5": (), "head.h5": (), "sharded": (), "run": ("toy.h5",), "reviewed": ("run",),
    "replaced": ("reviewed", "head.h5"),
}  # fmt: skip


class Inputs:
    """Makes, in `folder`, what scenarios read and begin with: only what those that are run need."""

    def __init__(self, commands: Commands, folder: Path, scenarios: Sequence[Scenario], say: OnStep) -> None:
        self.commands, self.folder, self.say = commands, folder, say
        text = " ".join(f"{' '.join(scenario.words)} START/{scenario.start}" for scenario in scenarios)
        self.wanted = {name for name in MADE_OF if f"{{in}}/{name}" in text or f"START/{name}" in text}
        for name, others in reversed(MADE_OF.items()):
            self.wanted |= set(others if name in self.wanted else ())

    def make(self) -> None:
        """Make them in their order."""
        self.run("phantom", self.folder / "data", "--studies", 12, "--size", 64)
        steps = (
            self.list_films, self.cache_older, self.cache, self.cache_head, self.cache_shards, self.train,
            self.copy_run, self.leave_unfinished,
        )  # fmt: skip
        for name, step in zip(MADE_OF, steps, strict=True):
            if name in self.wanted:
                step()

    def run(self, *words: object) -> None:
        """Run a command that must end well; films that failed are no error."""
        self.say(f"cxrfast {words[0]}")
        if self.commands.run([str(word) for word in words]) not in (0, 1):
            raise SystemExit(f"{' '.join(map(str, words))}\n{self.commands.text()}")

    def cache_to(self, out: Path, *more: object) -> None:
        """Encode the phantoms."""
        self.run(*(word.replace("{in}", str(self.folder)) for word in CACHE), "--out", out, *more)

    def list_films(self) -> None:
        """A manifest."""
        self.run("prepare", self.folder / "data", "--out", self.folder / "films.csv")

    def cache_older(self) -> None:
        """A cache of the same list from before a quarter of its films changed."""
        films = sorted((self.folder / "data" / "images").iterdir())
        kept = {path: path.read_bytes() for path in films}
        for one, other in zip(films[::4], films[1::4], strict=False):
            one.write_bytes(kept[other])
        (self.folder / "older").mkdir()
        self.cache_to(self.folder / "older" / "toy.h5")
        for path, content in kept.items():
            path.write_bytes(content)

    def cache(self) -> None:
        """Two blocks to train."""
        self.cache_to(self.folder / "toy.h5")

    def cache_head(self) -> None:
        """The head alone to train."""
        self.cache_to(self.folder / "head.h5", "--unfreeze-blocks", 0)

    def cache_shards(self) -> None:
        """Three shards."""
        (self.folder / "sharded").mkdir()
        self.cache_to(self.folder / "sharded" / "toy.shards.json", "--shards", 3)

    def train(self) -> None:
        """A run with a model file."""
        self.run("sweep", self.folder / "toy.h5", "--out", self.folder / "run", *SWEEP, *RATE)
        (self.folder / "reviewed").mkdir()
        shutil.copytree(self.folder / "run", self.folder / "reviewed" / "run")
        self.run("export", self.folder / "run", "--variants", "fp32", "--check", 8)

    def copy_run(self) -> None:
        """A run without a model file: `train` has made it."""

    def leave_unfinished(self) -> None:
        """A run, and beside it an unfinished one with other settings."""
        out, long = self.folder / "replaced", self.folder / "long"
        shutil.copytree(self.folder / "reviewed", out)
        other = ("--epochs", "400", "--folds", "3", "--lr", "1e-2", "--batch-size", "4", "--device", "cpu")
        self.commands.start(["sweep", str(self.folder / "head.h5"), "--out", str(long), *other])
        states = long.with_name("long.partial") / "states"
        while len(list(states.glob("*.safetensors"))) < 3 and not self.commands.is_over():
            time.sleep(0.01)
        self.commands.kill()
        if self.commands.wait() != -signal.SIGKILL:
            raise SystemExit(f"a sweep that was to be killed has ended\n{self.commands.text()}")
        shutil.move(long.with_name("long.partial"), out / "run.partial")
