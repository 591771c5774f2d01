"""Tables of how a run was set and made: against the published recipe, against other runs, and its facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import FORMER, JPEG_95, ONE_PIXEL, CacheSpec, PreprocessSpec, SweepSpec, TrainSpec, to_dict
from ..errors import CxrFastError
from ..inference import model_file
from ..metrics import drift
from ..recipes import RECIPES, reference_value
from ..system.text import Figure, Label, Table, duration, note_own_size
from .summary import Record


def choice_table(run: Record) -> Table:
    """Everything that was set differently from the published recipe, and why."""
    differ = [row for row in run["recipe"]["differences"] if row["here"] != row["published"]]
    return Table(
        title="Choices",
        columns=["choice", "here", "published", "why"],
        rows=[
            *([str(row[key]) for key in ("field", "here", "published", "why")] for row in differ),
            *([name, setting(here), setting(published), why] for name, here, published, why in _by_flag(run)),
        ],
    )


def _by_flag(run: Record) -> Iterator[tuple[str, Any, Any, str]]:
    """What a flag or a recipe changed against the published recipe: field, value here, published value, and why."""
    reasons = _reasons(run)
    explained = {row["field"] for row in run["recipe"]["differences"]}
    given = ((CacheSpec, run["cache"]["spec"]), (PreprocessSpec, run["preprocess"]), (SweepSpec, run["spec"]))
    for spec, values in (*given, (TrainSpec, run["train"])):
        for name, here in values.items():
            # The size is the backbone's unless another was asked for, the seed nobody's choice.
            own_size = name == "size" and "own_image_size" not in run["backbone"]
            if name in explained or own_size or name in ("train", "preprocess", "seed"):
                continue
            published = reference_value(spec, name)
            published = list(published) if isinstance(published, tuple) else published  # as run.json holds it
            if here != published:
                yield name, here, published, reasons.get(name, "by flag")


def _reasons(run: Record) -> dict[str, str]:
    """Why each field of the recipe that this run follows to the letter has its value; empty where it follows none."""
    given = run["spec"] | run["train"]
    for name in ("longtail", "tuned"):
        wanted = {field: list(v) if isinstance(v, tuple) else v for _, field, v, _ in RECIPES[name]}
        if all(given.get(field) == value for field, value in wanted.items()):
            return {field: f"recipe {name}: {why}" for _, field, _, why in RECIPES[name]}
    return {}


def setting(value: Any) -> str:
    """A setting as text: `30,50,75` for a list."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def fact_table(run: Record) -> Table:
    """Weights, fingerprints, hardware, versions and time; what is unknown is left out."""
    machine, cache, spec, count = run["machine"], run["cache"], run["spec"], run["trainable"]
    weights = f"{cache['weights']} (RANDOM, not BiomedCLIP)" if run["random_weights"] else cache["weights"]
    norm = f", norm {count['norm']:,}" if count.get("norm") else ""
    versions = {**run["toolchain"], "Python": machine.get("python")}
    own = run.get("custom") or {}
    facts = {
        "weights": Label(text=weights, alarm=run["random_weights"]),
        "image size": describe_size(run),
        "cache fingerprint": cache["fingerprint"],
        "model": run["model_sha256"],
        "trained parameters": f"{count['total']:,}: blocks {count['blocks']:,}, head {count['head']:,}{norm}",
        "own head": own.get("head"),
        "own loss": own.get("loss"),
        "final model": f"{run['final']['kind']}: {run['final']['rule']}",
        "arithmetic": f"{run['precision']}, activations {run['residency']}",
        "split": f"{spec['folds']} folds by {spec['split_by']}, hold-out {100 * spec['holdout']:g} %, "
        f"seed {spec['seed']}",
        "labels from": cache["labels_from"],
        "hardware": _hardware(run),
        "system": machine.get("os"),
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items() if value),
        "time": duration(run["seconds"], tenths=True),
        "written": f"{run['written_by']}, {run['created']}",
    }
    return Table(title="Facts", columns=["", ""], rows=[[name, value] for name, value in facts.items() if value])


def describe_size(run: Record) -> str:
    """Text of the image size of a run, and of the size of the backbone's own where that is another."""
    return "{0} x {0} pixels".format(run["preprocess"]["size"]) + note_own_size(run["backbone"])


def _hardware(run: Record) -> str:
    machine = run["machine"]
    gpus = (gpu.get("name", gpu) if isinstance(gpu, Mapping) else gpu for gpu in machine.get("gpus") or [])
    memory = machine.get("memory_gib")
    parts = [
        f"trained on {run['device']}",
        machine.get("cpu") or "unknown CPU",
        f"{machine.get('cores', '?')} cores, threads: {run['threads']}",
        f"{memory:.0f} GiB memory" if memory else "",
        *map(str, gpus),
    ]
    return ", ".join(part for part in parts if part)


def model_files(folder: Path) -> tuple[list[Record], list[str]]:
    """The metadata of each `model.*.onnx` of a run folder, and a line about each that cannot be read."""
    found: list[Record] = []
    unread: list[str] = []
    for path in sorted(folder.glob("model.*.onnx")):
        try:
            found.append(model_file.read(path, check=False) | {"name": path.name})
        except CxrFastError as error:
            unread.append(f"drift of {path.name}: {error}")
    return found, unread


FILES_NOTE = (
    "Decisions in 10,000 that differ from float32 in torch on the same films; beside them what that model itself "
    "changes where they are saved as JPEG 95, or moved by one pixel, at the size they were read. fp16 and int8 "
    f"are kept where they change no more than JPEG 95, and macro AUC and mAP drop by at most {drift.AUC_DROP:g} each."
)


def file_table(files: Sequence[Record], run: Record) -> Table:
    """How far each model file is from float32, beside what the film itself changes; no row without a model file.

    `-` is what a file of an earlier version does not say.
    """
    return Table(
        title="Model files: drift beside what the film itself changes",
        columns=[
            *("file", "final model", "films", "decisions changed", "JPEG 95", "one pixel", "difference to JPEG 95"),
            *("macro AUC change", "mAP change"),
        ],
        rows=[_file_row(info, run) for info in files],
        notes=[FILES_NOTE] if files else [],
    )


def _file_row(info: Record, run: Record) -> list[Any]:
    parity = _record(info.get("parity"))
    kind = str(_record(info.get("final")).get("kind", "-"))
    if kind == run["final"]["kind"] and info.get("model_sha256") != run["model_sha256"]:
        kind += ", of other weights than this run"
    beside = _record(parity.get("yardstick"))
    flips = [parity, *(_record(beside.get(name)) for name in (JPEG_95, ONE_PIXEL))]
    drops = (_number(parity.get(name)) for name in ("macro_auc_drop", "map_drop"))
    margin = _record(parity.get("margin"))
    more = (_number(margin.get(name)) for name in ("more", "low", "high"))
    return [
        str(info["name"]),
        kind,
        _number(parity.get("images")),
        *(Figure(value=_number(each.get("flips_per_10000")), digits=1) for each in flips),
        Figure(**dict(zip(("value", "low", "high"), more, strict=True)), digits=1, signed=True),
        *(Figure(value=None if drop is None else round(-drop, 4) + 0.0, digits=4, signed=True) for drop in drops),
    ]


def _record(value: Any) -> Record:
    """A part of a file's metadata, which may hold anything; empty where it is no record."""
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> Any:
    return value if model_file.is_number(value) else None


def settings_table(runs: Mapping[str, Record]) -> Table:
    """What was set differently in the runs, by their names; no row where nothing was."""
    settings = {name: _settings(run) for name, run in runs.items()}
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    rows = [[key, *(each.get(key) for each in settings.values())] for key in keys]
    return Table(
        title="Settings that differ",
        columns=["setting", *runs],
        rows=[row for row in rows if len(set(row[1:])) > 1],
    )


def _settings(run: Record) -> dict[str, str]:
    # Fields that came after a run was made had their default then, or the value in FORMER.
    spec = {key: value for key, value in (to_dict(SweepSpec()) | FORMER | run["spec"]).items() if key != "train"}
    own = run.get("custom") or {}
    cache = run["cache"]
    out = {"weights": cache["weights"], "cache": cache["fingerprint"][:16], "labels from": cache["labels_from"]}
    out |= {**spec, **to_dict(TrainSpec()), **run["train"], "device": run["device"], "precision used": run["precision"]}
    out |= {"unfreeze_blocks": run["unfreeze_blocks"], **run["preprocess"], "written by": run["written_by"]}
    out |= {f"own {name}": own.get(name) for name in ("head", "loss")}
    return {key: str(value) for key, value in out.items()}
