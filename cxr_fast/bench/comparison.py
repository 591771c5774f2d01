"""Two models side by side on this machine: how far their answers are apart, and how many times as long one takes.

Each model has a process of its own and is asked one thing at a time: the threads of an idle session spin for a while
and took half the machine from another model in the same process (int8: 72 ms for 34). Before each timed call the
other's threads get REST seconds to fall asleep, and one call that is not timed wakes the own ones; so each is timed as
`predict` runs it, spinning allowed. Two copies of a 64-wide ViT in turns, batch 16: 23.6 ms without the rest, 9.4 with
it, 9.0 where the other never runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..config import FILM_CHANGES, PreprocessSpec, from_dict
from ..errors import CxrFastError, InputError, ParityError
from ..inference import hub
from ..metrics import drift
from ..system import hardware
from ..system.extras import needs
from ..system.text import Table, number, to_plain
from . import measure, results
from .films import ComparedFilms, read_compared
from .records import COMPARISON, ComparisonResult

REST = 0.2
BATCH = 8
# Two float32 roads of one model: the export allows 1e-5, another machine's golden answer 1e-4.
SAME = 1e-4
FLOAT32 = ("fp32", "torch")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model: an ONNX file, a run folder's final model of a kind in torch float32, or what `opener` opens for it."""

    path: Path
    torch: bool = False
    final: str | None = None
    device: str = "auto"
    threads: int | None = None
    opener: Callable[[Arm], tuple[About, Callable[[np.ndarray], np.ndarray]]] | None = None


@dataclass(frozen=True, kw_only=True)
class About:
    """What an opened model says of itself; `weights` tells trained weights apart, `variant` is fp32, int8, torch ..."""

    name: str
    variant: str
    where: str
    labels: tuple[str, ...]
    thresholds: tuple[float, ...]
    spec: PreprocessSpec
    weights: str
    warning: str


@dataclass(frozen=True, kw_only=True)
class CompareSpec:
    """`count` images, evenly spread over those of `images` or `manifest`, else 6 phantoms, are answered by both.

    A manifest's labels give AUCs. The model alone is timed at `batch_size` for `rounds` turns.
    """

    images: Path | None = None
    manifest: Path | None = None
    count: int = 256
    rounds: int = 30
    batch_size: int = 1


def compare(
    one: Arm, other: Arm, spec: CompareSpec, on_progress: Callable[[str, int, int], None] | None = None
) -> ComparisonResult:
    """Answers of both on the same images, then A B A B, the model alone; JSON-ready.

    Raises InputError for models of other classes, ParityError, before anything is timed, where two float32 roads of
    the same weights differ.
    """
    say, before = on_progress or (lambda text, done, total: None), hardware.gpu_states()
    with (
        measure.Watch() as watch,  # closed last: a worker counts as our own once it was waited for
        working(one) as a,
        working(other) as b,
    ):
        _require_same_labels(a.about, b.about)
        specs = a.about.spec, b.about.spec
        films = read_compared(spec.images, spec.manifest, spec.count, a.about.labels, specs)
        ours, theirs = (_answers(each, films.pixels[each.about.spec], say) for each in (a, b))
        yardstick = _changed(a, films, ours, say)
        far = difference(a.about, b.about, ours, theirs, films.labels, yardstick)
        samples: dict[str, list[float]] = {"a": [], "b": []}
        for done in range(spec.rounds):
            samples["a"].append(a.call("time", done, spec.batch_size))
            samples["b"].append(b.call("time", done, spec.batch_size))
            say("rounds", done + 1, spec.rounds)
    source = "manifest" if spec.manifest is not None else "given files" if spec.images is not None else "phantoms"
    shown = ("name", "variant", "where", "weights", "warning")
    return {
        **results.turns(COMPARISON, samples, watch, before),
        "seconds": measure.spreads(samples),
        "models": {name: {k: getattr(m.about, k) for k in shown} for name, m in (("a", a), ("b", b))},
        "images": {"answered": len(films.labels), "left_out": films.left_out, "source": source},
        "batch_size": spec.batch_size,
        "rounds": spec.rounds,
        "ratio": measure.ratio_fields(samples["b"], samples["a"]),
        "difference": far,
        "yardstick": {name: {"flips": change.flips, "p99": change.p99} for name, change in yardstick.changes.items()},
    }


def against_torch(model: Path, run: Path | None, *, threads: int | None = None) -> tuple[Arm, Arm]:
    """A model file beside the run's own torch model of the same weights, both on the CPU.

    `run` defaults to the file's folder. Raises InputError where that is no run or not the one the file is of.
    """
    from ..inference import model_file
    from ..inference.session import locate
    from ..training.run_folder import read_run_info

    if importlib.util.find_spec("torch") is None:
        raise InputError(f"--against torch {needs('torch')}")
    folder = run or (model if model.is_dir() else model.parent)
    path = model / "model.fp32.onnx" if model.is_dir() else model
    if not (folder / "run.json").is_file():
        raise InputError(f"--against torch: {folder} is not a run folder; give the one {path.name} is of with --run.")
    place = locate(hub.with_file(path, "model.fp32.onnx"), "cpu", explicit=True)
    said = model_file.read(place.path, check=False)
    kind = said["final"]["kind"]
    if read_run_info(folder, kind)["model_sha256"] != said["model_sha256"]:
        raise InputError(f"--run: {path.name} was exported from other weights than those of {folder}.")
    return (
        Arm(path=Path(place.source), device="cpu", threads=threads),
        Arm(path=folder, torch=True, final=kind, device="cpu", threads=threads),
    )


# The answers.


def difference(
    a: About,
    b: About,
    ours: np.ndarray,
    theirs: np.ndarray,
    labels: np.ndarray,
    yardstick: drift.Yardstick | None = None,
) -> dict[str, Any]:
    """How far B's probabilities (n, C) are from A's, each judged at its own thresholds; labels (n, C), -1 unknown.

    Raises ParityError where both are float32 of the same weights and differ.
    """
    far = drift.measure(ours, theirs, labels, a.thresholds, yardstick)
    if a.thresholds != b.thresholds and np.isfinite(far.largest):
        flipped = ((ours >= np.asarray(a.thresholds)) != (theirs >= np.asarray(b.thresholds))).sum(axis=1)
        margin = None if yardstick is None else yardstick.margin(flipped, ours.shape[1])
        count = int(flipped.sum())
        far = replace(far, flipped=count, flips=1e4 * count / ours.size, margin=margin)
    alike = a.weights == b.weights and a.spec == b.spec and a.variant in FLOAT32 and b.variant in FLOAT32
    if alike and not far.largest <= SAME:
        raise ParityError(
            f"{a.name} and {b.name} are the same weights in float32 and differ by {far.largest:.1e} in probability "
            f"(limit {SAME:g}); nothing was timed. `cxrfast verify {a.name}` says which of them is wrong."
        )
    found = {name: None if isinstance(v, float) and not np.isfinite(v) else v for name, v in asdict(far).items()}
    return found | {"expected_alike": alike, "same_weights": a.weights == b.weights}


def _require_same_labels(a: About, b: About) -> None:
    if a.labels == b.labels:
        return
    how = "the same classes in another order" if sorted(a.labels) == sorted(b.labels) else "other classes"
    raise InputError(
        f"{a.name} ({len(a.labels)}) and {b.name} ({len(b.labels)}) have {how}: their answers do not compare."
    )


def _answers(each: ModelProcess, pixels: np.ndarray, say: Callable[[str, int, int], None], of: str = "") -> np.ndarray:
    """Its probabilities (n, C) of pixels (n, S, S), which stay its own for the timing."""
    out, count = [], len(pixels)
    each.call("pixels", pixels)
    for start in range(0, count, BATCH):
        out.append(each.call("answer", start, BATCH))
        say(f"answers of {each.about.name}{of}", min(start + BATCH, count), count)
    return np.concatenate(out)


def _changed(
    a: ModelProcess, films: ComparedFilms, ours: np.ndarray, say: Callable[[str, int, int], None]
) -> drift.Yardstick:
    """What A itself does where the films are saved as JPEG 95 or moved by one pixel."""
    found = {name: _answers(a, pixels, say, f", {FILM_CHANGES[name]}") for name, pixels in films.changed.items()}
    a.call("pixels", films.pixels[a.about.spec])
    return drift.measure_changes(ours, found, films.labels, a.about.thresholds, films.groups, films.unit)


# A model in a process of its own.


class ModelProcess:
    """A model in a process of its own, asked one thing at a time."""

    def __init__(self, arm: Arm) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would take our threads' locks along
        self.name = arm.path.name
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=work, args=(far, arm), daemon=True)
        self.process.start()
        far.close()
        self.about: About = self._reply()

    def call(self, *request: Any) -> Any:
        """The answer to a request; what went wrong over there is raised here."""
        self.pipe.send(request)
        return self._reply()

    def _reply(self) -> Any:
        try:
            found = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise InputError(
                f"{self.name}: its process ended with code {self.process.exitcode}; out of memory?"
            ) from None
        if isinstance(found, CxrFastError):
            raise found
        return found

    def close(self) -> None:
        """End the process and wait, so that its CPU time counts as ours."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextlib.contextmanager
def working(arm: Arm) -> Iterator[ModelProcess]:
    """The model's process, ended whatever happens."""
    worker = ModelProcess(arm)
    try:
        yield worker
    finally:
        worker.close()


def work(pipe: Connection, arm: Arm) -> None:
    """The other process: opens the model, says what it is, then answers and times until told to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's, which ends this one
    try:
        about, run = (arm.opener or (_open_torch if arm.torch else _open_onnx))(arm)
    except CxrFastError as error:
        pipe.send(error)
        return
    pipe.send(about)
    pixels = np.zeros(0)
    while (request := _next(pipe)) is not None:
        kind, *rest = request
        try:
            if kind == "pixels":
                pixels = rest[0]
                pipe.send(None)
            elif kind == "answer":
                pipe.send(run(pixels[rest[0] : rest[0] + rest[1]]))
            else:
                pipe.send(_timed(run, pixels, *rest))
        except CxrFastError as error:
            pipe.send(error)


def _next(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:  # the other side is gone
        return None


def _timed(run: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, turn: int, batch_size: int) -> float:
    """Seconds of one call, on the images whose turn it is, once the other model's threads are asleep."""
    batch = pixels[(turn * batch_size + np.arange(batch_size)) % len(pixels)]
    time.sleep(REST)
    run(batch)
    began = time.perf_counter()
    run(batch)
    return time.perf_counter() - began


def _open_onnx(arm: Arm) -> tuple[About, Callable[[np.ndarray], np.ndarray]]:
    from ..inference.predictor import Predictor

    predictor = Predictor(arm.path, device=arm.device, threads=arm.threads)
    about = About(
        name=predictor.source if hub.is_address(predictor.source) else os.path.relpath(predictor.path),
        variant=predictor.info["variant"],
        where=predictor.where,
        labels=predictor.labels,
        thresholds=tuple(predictor.info["thresholds"]),
        spec=predictor.spec,
        weights=str(predictor.info.get("model_sha256", predictor.path)),
        warning=predictor.warning,
    )
    return about, predictor.probabilities


def _open_torch(arm: Arm) -> tuple[About, Callable[[np.ndarray], np.ndarray]]:
    """The trusted path in torch, open_clip's whole tower in float32, as `export` compares with."""
    import torch

    from ..activations.encoder import normalise
    from ..metrics import calibration
    from ..models import device as cpu
    from ..training.run_folder import read_run

    threads, run = cpu.prepare(arm.threads), read_run(arm.path, arm.final)
    mean, std = (torch.tensor(run.info[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))

    def answer(pixels: np.ndarray) -> np.ndarray:
        x = normalise(torch.from_numpy(pixels), mean, std)
        return calibration.apply(run.info["calibration"], run.raw_probabilities(x))

    about = About(
        name=os.path.relpath(arm.path),
        variant="torch",
        where=f"CPU, {threads} thread(s)",
        labels=tuple(run.info["classes"]),
        thresholds=tuple(run.info["thresholds"]),
        spec=from_dict(PreprocessSpec, run.info["preprocess"]),
        weights=run.info["model_sha256"],
        warning=str(run.info["provenance"]),
    )
    return about, answer


# The text.


def describe(result: ComparisonResult) -> str:
    """Times and differences in one table, and what they rest on."""
    far, ratio, models = result["difference"], result["ratio"], result["models"]
    drop = far["macro_drop"]
    after = None if far["macro_auc"] is None or drop is None else far["macro_auc"] - drop
    rows = []
    for key, auc in (("a", far["macro_auc"]), ("b", after)):
        s, model = result["seconds"][key], models[key]
        times = [f"{1000 * s[name]:.1f}" for name in ("median", "min", "max")]
        rows.append([f"{key.upper()}  {model['name']}", model["variant"], *times, number(auc)])
    rows.append(["B over A", "", results.describe_ratio(ratio), "", "", "-" if drop is None else f"{-drop:+.4f}"])
    images = result["images"]
    sizes = ["not finite" if far[name] is None else f"{far[name]:.1e}" for name in ("largest", "p99")]
    apart = [f"{images['answered']} images ({images['source']})", *sizes, f"{far['flips']:.1f}"]
    lines = [
        to_plain(Table(columns=["model alone, ms", "", "median", "min", "max", "macro AUC"], rows=rows)),
        "",
        to_plain(Table(columns=["B's probabilities against A's", "largest", "p99", "flips/10,000"], rows=[apart])),
        "",
        f"{result['rounds']} rounds A B A B, batch {result['batch_size']}, a process each; "
        f"A on {models['a']['where']}, B on {models['b']['where']}, {result['machine']['cpu']}",
        results.RATIOS,
        _why(far),
        *_beside(result),
    ]
    if not far["classes"]:
        lines.append("no AUC: it takes --manifest with labels of both signs")
    if images["left_out"]:
        lines.append(f"{images['left_out']} image(s) cannot be read and were left out")
    lines += [f"note: {text.upper()}" for text in dict.fromkeys(m["warning"] for m in models.values()) if text]
    return "\n".join([*lines, *results.describe_noise(result)])


def _beside(result: ComparisonResult) -> list[str]:
    """What the films themselves change, beside B; nothing of a result of an earlier version."""
    if not (changes := result.get("yardstick")):
        return []
    found, margin = result["difference"]["flips"], result["difference"].get("margin")
    said = ", ".join(f"{FILM_CHANGES[name]} {change['flips']:.1f}" for name, change in changes.items())
    text = f"of 10,000 decisions of A: changed by B {found:.1f}, by the film itself: {said}"
    return [text if margin is None else f"{text}; {drift.Margin(**margin).describe()}"]


def _why(far: dict[str, Any]) -> str:
    if far["expected_alike"]:
        return f"the same weights in float32: checked before timing to agree within {SAME:g}"
    if far["same_weights"]:
        return "the same weights in another precision (or pixels): the difference is what it costs"
    return "other weights: the difference is between two models"
