"""Describe a cache, a run folder, an ONNX model, a set of weights or a benchmark's JSON in a few lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import PARTIAL, SHARDS, WEIGHT_CONFIGS, CacheSpec
from ..errors import InputError
from ..inference import hub
from ..system import extras
from ..system.text import counted, duration, gigabytes, note_own_size

if TYPE_CHECKING:
    from ..activations.file import Header

POOLING = {"token": "class token", "avg": "mean of patches", "map": "attention with one query"}


def describe(path: Path) -> str:
    """A description of the file or folder, or of a model on the hub. Raises InputError when it is none of ours.

    A hub id is `hf-hub:owner/name`, of model files of ours or of weights; without `hf-hub:` it is of weights.
    """
    if hub.is_address(path):
        return _on_hub(path)
    if path.is_dir():
        if any((path / name).is_file() for name in WEIGHT_CONFIGS) and not (path / "run.json").exists():
            return _weights(str(path))
        models = sorted(path.glob("*.onnx"))
        if models and not (path / "run.json").exists():
            return "\n\n".join(_model(model) for model in models)
        return _unfinished(path) if path.name.endswith(PARTIAL) else _run(path)
    if not path.exists():
        if str(path) == "biomedclip" or str(path).startswith("random:") or _is_hub_id(path):
            return _weights(str(path))
        raise InputError(f"{path}: no such file.")
    if path.suffix == ".onnx":
        return _model(path)
    if path.name.endswith(SHARDS):
        return _sharded(path)
    if path.name == "run.json":
        return _run(path.parent)
    if path.suffix == ".json":
        from ..bench import results

        return lines(results.describe(path))
    if path.suffix == ".h5" or path.name.endswith(PARTIAL):
        return _cache(path)
    raise InputError(f"{path}: not a cache (.h5 or {SHARDS}), a run folder, a model (.onnx) or a benchmark (.json).")


def _is_hub_id(path: Path) -> bool:
    """Whether a path that does not exist can name weights on the hub: two parts, and no ending of a file of ours."""
    named = len(path.parts) == 2 and path.parts[0] not in ("/", ".", "..")
    return named and path.suffix not in (".onnx", ".h5", ".json", PARTIAL)


def _on_hub(path: Path) -> str:
    """Describe the model file of an address; where the repository has none, its weights."""
    try:
        file, source = _fetch(path)
    except InputError as none_of_ours:
        try:
            from ..models.weights import locate

            locate(str(path))
        except (InputError, ModuleNotFoundError):
            raise none_of_ours from None
        return _weights(str(path))
    with hub.named_by_address(source, file):
        return _model(file, source)


def _weights(source: str) -> str:
    from ..activations.weights_summary import BLOCKS, FILMS, summarise

    found = summarise(source)
    classes, registers, patches = found.tokens
    grid = f"patches of {found.patch} x {found.patch} pixels"
    parts = [(classes, "class"), (registers, "register"), (patches, grid)]
    asked = ", ".join(found.asked.values())
    return lines(
        {
            "weights": source + (" (RANDOM, not learned)" if found.random else ""),
            "family": found.family,
            "parameters": f"{found.parameters:,}",
            "blocks": f"{found.depth} of width {found.width}, {found.heads} heads",
            "images": f"{found.image_size} x {found.image_size} pixels",
            "tokens": f"{sum(found.tokens):,}: " + ", ".join(f"{count:,} {what}" for count, what in parts if count),
            "embedding": f"{found.embedding} from {POOLING.get(found.pooling, found.pooling)}"
            + (", projected" if found.projection else ""),
            "normalisation": f"mean {_short(list(found.mean))}, std {_short(list(found.std))}",
            "resize": f"{asked} by its files; films are resized bicubic, and become square as --resize says"
            if asked
            else "",
            "left out": ", ".join(found.left_out),
            "licence": found.licence or "not named in the files; see the model's page",
            "cache": f"{found.row_bytes:,} bytes a film: {counted(found.views, 'view')} in {CacheSpec().dtype}, "
            f"{counted(found.left, 'block')} left to train",
            "time": f"about {duration(found.seconds, tenths=True)} for 1,000 films on this machine ({found.device}): "
            f"an estimate from {counted(BLOCKS, 'block')} and {FILMS} films, without reading them",
        }
    )


def _fetch(path: Path) -> tuple[Path, str]:
    """Fetch the file of an address that this machine runs best: without ONNX Runtime, which knows that, the first."""
    try:
        from ..inference.session import locate_for
    except ModuleNotFoundError as error:
        if extras.missing(error) != "onnxruntime":
            raise
        from ..inference.model_file import VARIANTS, file_name

        address = hub.parse_address(path)
        found = hub.list_files(address, [address.file] if address.file else list(map(file_name, VARIANTS)))
        file, taken = hub.download(found, found.names[0])
        return file, str(taken)
    place = locate_for(path)
    return place.path, place.source


def _cache(path: Path) -> str:
    from ..activations import file as store

    header = store.read_header(path)
    with store.open_file(path) as file:
        state, absmax, by = np.array(file["done"]), np.array(file["absmax"]), str(file.attrs["written_by"])
    said = {"activation file": f"{path}, schema {store.SCHEMA}, {by}"}
    return _activations(said, header, state, absmax, path.stat().st_size)


def _sharded(path: Path) -> str:
    from ..activations import cache

    file = cache.open_cache(path)
    size = sum(shard.path.stat().st_size for shard in file.files)
    names = f"{file.files[0].path.name} to {file.files[-1].path.name}"
    images = [len(shard.state) for shard in file.files]
    said = {
        "index": f"{path}, schema {cache.SCHEMA}, {file.written_by}",
        "shards": f"{len(file.files)}: {names}, {min(images):,} to {max(images):,} images each",
    }
    return _activations(said, file.header, file.state, file.absmax, size)


def _activations(said: dict[str, str], header: Header, state: np.ndarray, absmax: np.ndarray, size: int) -> str:
    from ..activations.file import DONE, FAILED

    meta, parts = header.meta, header.meta["fingerprint_parts"]
    done, failed = int((state == DONE).sum()), int((state == FAILED).sum())
    peak = f"{absmax.max():.4g}" if done else "-"
    return lines(
        said
        | {
            "state": f"{done:,} of {len(state):,} images encoded, {failed:,} failed",
            "data": f"{meta['dataset']['name']}, {len(set(header.groups)):,} groups, {len(header.classes)} classes",
            "array": f"{header.shape} {header.dtype}, {size / 1e6:,.0f} MB, largest value {peak}",
            "weights": meta["weights"] + (" (RANDOM, not BiomedCLIP)" if meta["random_weights"] else ""),
            "cut": f"{parts['cut']} ({meta['spec']['unfreeze_blocks']} block(s) left to train), views "
            + ", ".join(parts["views"]),
            "pixels": ", ".join(f"{k} {v}" for k, v in meta["spec"]["preprocess"].items())
            + note_own_size(meta["backbone"]),
            "normalisation": f"mean {_short(parts['mean'])}, std {_short(parts['std'])}",
            "fingerprint": meta["fingerprint"],
        }
    )


def _run(path: Path) -> str:
    from ..training.run_folder import read_info

    run = read_info(path)
    held = run["metrics"]["holdout"]
    figures = "no hold-out"
    if held:
        figures = (
            f"macro AUC {_number(held['macro_auc'])} over {held['classes_defined']} of {held['classes_total']} classes"
            f", macro F1 {_number(held['macro_f1'])}, mAP {_number(held['map'])} on {held['n']:,} images"
        )
    models = sorted(p.name for p in path.glob("*.onnx"))
    return lines(
        {
            "run": f"{path}, schema {run['schema']}, {run['written_by']}, {run['created']}",
            "note": run["provenance"].upper(),
            "data": f"{run['cache']['dataset']['name']}, {run['images']['used']:,} images, "
            f"{run['images']['groups']:,} groups, {len(run['classes'])} classes",
            "cache": f"{run['cache']['path']} ({run['cache']['fingerprint'][:16]})",
            "pixels": ", ".join(f"{k} {v}" for k, v in run["preprocess"].items()) + note_own_size(run["backbone"]),
            "trained": f"{run['trainable']['total']:,} parameters: blocks {run['trainable']['blocks']:,}, "
            f"head {run['trainable']['head']:,}",
            "chosen": f"{counted(run['chosen']['epochs'], 'epoch')}, fold {run['chosen']['fold'] + 1}",
            "final model": f"{run['final']['kind']}: {run['final']['rule']}",
            "hold-out": figures,
            "models": ", ".join(models) or "none yet; `cxrfast export` makes one",
        }
    )


def _unfinished(path: Path) -> str:
    from ..runs.entry import RUNNING, read_entry
    from ..runs.progress import read_progress

    progress, entry = read_progress(path), read_entry(path)
    spec = progress.spec
    again = "it is being trained now" if entry.state == RUNNING else "the same command goes on with it"
    return lines(
        {
            "unfinished run": f"{path}, {gigabytes(entry.size)}",
            "note": entry.note,
            "state": f"{entry.state}: {progress.epochs_done:,} of {progress.epochs_in_all:,} epochs over folds and "
            f"configurations ({100 * progress.share:.0f} %); {again}",
            "data": progress.data,
            "weights": progress.weights,
            "search": f"epochs {','.join(map(str, spec.epochs))}, {counted(spec.folds, 'fold')}, "
            f"{counted(progress.configurations, 'configuration')}",
            "settings": entry.settings or "the defaults",
            "last saved": entry.created,
        }
    )


def _model(path: Path, source: str = "") -> str:
    from ..inference import model_file

    info, size = model_file.read(path), path.stat().st_size
    return lines(
        {
            "model": f"{source or path}, schema {info['schema']}, {info['written_by']}, {size / 1e6:,.0f} MB",
            "note": str(info.get("provenance", "")).upper(),
            "variant": info["variant"],
            "labels": f"{len(info['labels'])}: {', '.join(info['labels'])}",
            "weights": info["weights"],
            "data": info["data"]["name"],
            "recalibrated": _recalibrated(info),
            "pixels": json.dumps(info["preprocess"]) + note_own_size(info.get("backbone", {})),
            "parity": _parity(info.get("parity", {})),
            "nodes": ", ".join(f"{n} {op}" for op, n in sorted(info["nodes"].items(), key=lambda kv: -kv[1])),
            "intended use": info["intended_use"],
        }
    )


def _recalibrated(info: dict[str, Any]) -> str:
    """Where thresholds and calibration were set by `cxrfast evaluate`; empty where they are of the export."""
    found = info.get("recalibrated")
    if not found:
        return ""
    return f"on {found['data']}, for {len(found['classes'])} of {len(info['labels'])} classes; {found['target']}"


def _parity(parity: dict[str, Any]) -> str:
    """How far a variant is from torch, and the limits it was held to: float32 has one, fp16 and int8 several."""
    from ..inference import model_file

    if not parity:
        return ""
    found = float("nan") if (most := parity.get("max_probability_difference")) is None else most
    text = f"{found:.1e} to {parity.get('against')} on {parity.get('images')} images"
    if "limit" in parity:
        beside = model_file.describe_yardstick(parity)
        text += f" (limit {parity['limit']})"
        return f"{text}; decisions changed per 10,000 by the film itself: {beside}" if beside else text
    for key, name in (("macro_auc", "macro AUC"), ("map", "mAP")):
        if f"limit_{key}_drop" in parity:
            drop = parity.get(f"{key}_drop")
            lost = "undefined" if drop is None else f"{round(drop, 4) + 0.0:.4f}"
            text += f"{', ' if key == 'map' else '; '}{name} lost {lost} (limit {parity[f'limit_{key}_drop']})"
    flips, limit = parity.get("flips_per_10000"), parity.get("limit_flips_per_10000")
    shown = f"{limit:.4g}" if model_file.is_number(limit) else limit
    text += f", decisions changed {'undefined' if flips is None else f'{flips:.1f}'} per 10,000 (limit {shown})"
    beside = model_file.describe_yardstick(parity)
    return f"{text}; changed by the film itself: {beside}" if beside else text


def lines(facts: dict[str, str]) -> str:
    """Aligned `name  value` lines; empty values are left out."""
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items() if value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _short(values: list[float]) -> str:
    return "/".join(f"{v:.4g}" for v in values)
