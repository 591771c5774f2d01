"""Two models side by side on this machine: how far their answers are apart, and how many times as long one takes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import PreprocessSpec
from ..data.images import load
from ..data.paths import expand
from ..errors import ImageError, InputError, ParityError
from ..metrics import drift
from ..system import hardware
from ..system.text import number, table
from . import measure, results
from .latency import RATIOS, describe_noise, films, ratio_text
from .worker import About, Arm, Worker, working

BATCH = 8
# Two float32 roads of one model: the export allows 1e-5, another machine's golden answer 1e-4.
SAME = 1e-4
FLOAT32 = ("fp32", "torch")


def compare(
    one: Arm,
    other: Arm,
    *,
    images: Path | None = None,
    manifest: Path | None = None,
    count: int = 256,
    rounds: int = 30,
    batch_size: int = 1,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Answers of both on the same images, then A B A B for `rounds`, the model alone at `batch_size`; JSON-ready.

    `count` images are answered, evenly spread over those of `images` or `manifest`, else 6 phantoms; a manifest's
    labels give AUCs. Raises InputError for models of other classes, ParityError, before anything is timed, where two
    float32 roads of the same weights differ.
    """
    say, before = on_progress or (lambda text, done, total: None), hardware.gpu_states()
    with (
        results.Watch() as watch,  # closed last: a worker counts as our own once it was waited for
        working(one) as a,
        working(other) as b,
        _shown(images, manifest) as source,
    ):
        _require_same_labels(a.about, b.about)
        paths, labels = _listed(source, manifest is not None, count, a.about.labels)
        pixels, labels, left_out = _decoded(paths, labels, (a.about.spec, b.about.spec))
        for each, found in zip((a, b), pixels, strict=True):
            each.call("pixels", found)
        ours, theirs = (_answers(each, len(labels), say) for each in (a, b))
        far = difference(a.about, b.about, ours, theirs, labels)
        samples: dict[str, list[float]] = {"a": [], "b": []}
        for done in range(rounds):
            samples["a"].append(a.call("time", done, batch_size))
            samples["b"].append(b.call("time", done, batch_size))
            say("rounds", done + 1, rounds)
    return {
        **results.turns(results.COMPARISON, samples, watch, before),
        "models": {"a": _said(a.about), "b": _said(b.about)},
        "images": {"answered": len(labels), "left_out": left_out, "source": _source(images, manifest)},
        "batch_size": batch_size,
        "rounds": rounds,
        "ratio": asdict(measure.ratio_interval(samples["b"], samples["a"])),
        "difference": far,
    }


def against_torch(model: Path, run: Path | None, *, threads: int | None = None) -> tuple[Arm, Arm]:
    """A model file beside the run's own torch model of the same weights, both on the CPU.

    `run` defaults to the file's folder. Raises InputError where that is no run or not the one the file is of.
    """
    from ..inference import model_file
    from ..training.run_folder import read_run_info

    folder = run or (model if model.is_dir() else model.parent)
    path = _float32(model) if model.is_dir() else model
    if not (folder / "run.json").is_file():
        raise InputError(f"--against torch: {folder} is not a run folder; give the one {path.name} is of with --run.")
    said = model_file.read(path, check=False)
    kind = said["final"]["kind"]
    if read_run_info(folder, kind)["model_sha256"] != said["model_sha256"]:
        raise InputError(f"--run: {path.name} was exported from other weights than those of {folder}.")
    return (
        Arm(path=path, device="cpu", threads=threads),
        Arm(path=folder, torch=True, final=kind, device="cpu", threads=threads),
    )


def _float32(folder: Path) -> Path:
    return folder / "model.fp32.onnx"


# ------------------------------------------------------------------------------------------------- the answers


def difference(a: About, b: About, ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How far B's probabilities (n, C) are from A's, each judged at its own thresholds; labels (n, C), -1 unknown.

    Raises ParityError where both are float32 of the same weights and differ.
    """
    far = drift.measure(ours, theirs, labels, a.thresholds)
    if a.thresholds != b.thresholds and np.isfinite(far.largest):
        flipped = int(((ours >= np.asarray(a.thresholds)) != (theirs >= np.asarray(b.thresholds))).sum())
        far = replace(far, flipped=flipped, flips=1e4 * flipped / ours.size)
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


def _answers(each: Worker, count: int, say: Callable[[str, int, int], None]) -> np.ndarray:
    out = []
    for start in range(0, count, BATCH):
        out.append(each.call("answer", start, BATCH))
        say(f"answers of {each.about.name}", min(start + BATCH, count), count)
    return np.concatenate(out)


@contextlib.contextmanager
def _shown(images: Path | None, manifest: Path | None) -> Iterator[Path]:
    """Where the images are; phantoms, which go again, where the user named none."""
    if (given := manifest or images) is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as scratch:
        films(Path(scratch))
        yield Path(scratch)


def _source(images: Path | None, manifest: Path | None) -> str:
    return "manifest" if manifest is not None else "given files" if images is not None else "phantoms"


def _listed(source: Path, labelled: bool, count: int, classes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Paths (n), and labels (n, C) for the model's classes, -1 where there is no manifest or it has none."""
    if not labelled:
        paths = _spread(expand([str(source)]), count)
        return paths, np.full((len(paths), len(classes)), -1, np.int8)
    from ..data import manifest as datasets

    read = datasets.read(source)
    shared = [name for name in classes if name in read.classes]
    if not shared:
        raise InputError(f"--manifest: {source} has none of the model's classes ({', '.join(classes[:3])}, ...).")
    rows = _spread(list(range(len(read))), count)
    labels = np.full((len(rows), len(classes)), -1, np.int8)
    for name in shared:
        labels[:, list(classes).index(name)] = read.labels[rows, read.classes.index(name)]
    return [str(read.path(row)) for row in rows], labels


def _spread(values: list[Any], count: int) -> list[Any]:
    places = np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).astype(int))
    return [values[place] for place in places]


def _decoded(
    paths: Sequence[str], labels: np.ndarray, specs: tuple[PreprocessSpec, PreprocessSpec]
) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Pixels (n, S, S) for each spec and labels (n, C) of the images both can read, and how many were left out."""

    def one(path: str) -> list[np.ndarray] | ImageError:
        try:
            return [load(path, spec)[0] for spec in specs]
        except ImageError as error:
            return error

    with ThreadPoolExecutor(hardware.cpu_count()) as pool:
        found = list(pool.map(one, paths))
    good = [i for i, each in enumerate(found) if isinstance(each, list)]
    if not good:
        raise InputError(f"none of the {len(paths)} images can be read; the first, {found[0]}")
    kept = [each for each in found if isinstance(each, list)]
    return [np.stack([each[k] for each in kept]) for k in range(2)], labels[good], len(paths) - len(good)


# ---------------------------------------------------------------------------------------------------- the text


def _said(about: About) -> dict[str, Any]:
    return {name: getattr(about, name) for name in ("name", "variant", "where", "weights", "warning")}


def describe(result: dict[str, Any]) -> str:
    """Times and differences in one table, and what they rest on."""
    far, ratio, models = result["difference"], result["ratio"], result["models"]
    drop = far["macro_drop"]
    after = None if far["macro_auc"] is None or drop is None else far["macro_auc"] - drop
    rows = []
    for key, auc in (("a", far["macro_auc"]), ("b", after)):
        s, model = result["seconds"][key], models[key]
        times = [f"{1000 * s[name]:.1f}" for name in ("median", "min", "max")]
        rows.append([f"{key.upper()}  {model['name']}", model["variant"], *times, number(auc)])
    rows.append(["B over A", "", ratio_text(ratio), "", "", "-" if drop is None else f"{-drop:+.4f}"])
    images = result["images"]
    lines = [
        table(["model alone, ms", "", "median", "min", "max", "macro AUC"], rows),
        "",
        table(
            ["B's probabilities against A's", "largest", "p99", "flips/10,000"],
            [[f"{images['answered']} images ({images['source']})", *_apart(far)]],
        ),
        "",
        f"{result['rounds']} rounds A B A B, batch {result['batch_size']}, a process each; "
        f"A on {models['a']['where']}, B on {models['b']['where']}, {result['machine']['cpu']}",
        RATIOS,
        _why(far),
    ]
    if not far["classes"]:
        lines.append("no AUC: it takes --manifest with labels of both signs")
    if images["left_out"]:
        lines.append(f"{images['left_out']} image(s) cannot be read and were left out")
    lines += [f"note: {text.upper()}" for text in dict.fromkeys(m["warning"] for m in models.values()) if text]
    return "\n".join([*lines, *describe_noise(result)])


def _apart(far: dict[str, Any]) -> list[str]:
    sizes = ["not finite" if far[name] is None else f"{far[name]:.1e}" for name in ("largest", "p99")]
    return [*sizes, f"{far['flips']:.1f}"]


def _why(far: dict[str, Any]) -> str:
    if far["expected_alike"]:
        return f"the same weights in float32: checked before timing to agree within {SAME:g}"
    if far["same_weights"]:
        return "the same weights in another precision (or pixels): the difference is what it costs"
    return "other weights: the difference is between two models"
