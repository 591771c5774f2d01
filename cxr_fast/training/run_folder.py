"""The run folder: what it says of itself, and the model built again from it. torch loads only with the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..config import digest
from ..errors import InputError, SchemaError
from ..metrics import calibration
from ..system.files import AnyPath
from ..unlikeness.record import RunUnlikeness, read_unlikeness
from . import operating_points, predictions
from .operating_points import AS_CHOSEN, OperatingPoint

if TYPE_CHECKING:
    import torch

    from ..models.backbone import Backbone
    from .pixels.module import PixelModel

SCHEMA = 2
KIND = "cxr-fast run"
# Of an unfinished run: what it works on, for people; the plan decides whether it goes on.
ABOUT = "about.json"
TOWER, TAILS = "visual.", "tails."
# Where a tail's parts stand in the tower; its blocks are numbered from the cut.
PLACES = {"norm": "trunk.norm", "attn_pool": "trunk.attn_pool", "fc_norm": "trunk.fc_norm", "projection": "head"}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One model: open_clip's whole tower with a trained tail in place, and the head."""

    visual: Any
    head: Any

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Slow trusted path: normalised (B, 3, S, S) through open_clip's whole tower and the head, (B, C) float32."""
        import torch

        with torch.inference_mode():
            out: torch.Tensor = self.head(torch.nn.functional.normalize(self.visual(pixels), dim=-1))
        return out


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run folder: its description, and the final model rebuilt from it, one member or several.

    The members of an ensemble share the tensors of the frozen part.
    """

    folder: Path
    info: dict[str, Any]
    members: tuple[Member, ...]
    chosen: str  # the kind of final model the sweep chose, by flag
    tta: str | None  # the views it was scored on there
    unlikeness: RunUnlikeness | None = None  # none in a run of an earlier version, or where the films were too few

    @property
    def visual(self) -> Any:
        """The tower of the (first) member."""
        return self.members[0].visual

    @property
    def head(self) -> Any:
        """The head of the (first) member."""
        return self.members[0].head

    def module(self) -> PixelModel:
        """The final model as an `nn.Module`, from uint8 pixels (N, S, S) to logits (N, C) as the ONNX file gives them.

        >>> model = read_run("exports/indiana").module()
        >>> pixels = torch.zeros((2, model.image_size, model.image_size), dtype=torch.uint8)
        >>> model(pixels).shape == (2, len(model.classes))
        True
        """
        from .pixels.module import PixelModel

        return PixelModel(self.info, self.members)

    def raw_probabilities(self, pixels: torch.Tensor) -> np.ndarray:
        """Mean of the members' probabilities (B, C) float32 for normalised images (B, 3, S, S), not calibrated; of
        the mirrored images too where the run was scored on both views."""
        views = [pixels, pixels.flip(-1)] if self.info["train"].get("tta") == "flip" else [pixels]
        each = [member.logits(view).sigmoid().numpy() for member in self.members for view in views]
        return np.asarray(np.mean(each, axis=0, dtype=np.float64), np.float32)


def read_info(folder: Path) -> dict[str, Any]:
    """`run.json` of a run folder. InputError or SchemaError with one line when it is not one."""
    path = folder / "run.json"
    if not path.is_file():
        model = min(folder.glob("*.onnx"), default=None)
        inside = f"; it holds a model file, which `cxrfast info {model}` describes" if model else ""
        raise InputError(f"{folder}: not a run folder (no run.json){inside}; `cxrfast sweep` makes one.")
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}).") from error
    if not isinstance(info, dict) or info.get("kind") != KIND:
        raise InputError(f"{path}: not written by `cxrfast sweep`.")
    if info.get("schema") != SCHEMA:
        raise SchemaError(
            f"{path}: schema {info.get('schema')} (written by {info.get('written_by')}); cxr-fast {__version__} "
            f"reads schema {SCHEMA}. Run `cxrfast sweep` again."
        )
    return info


def read_run(
    folder: AnyPath,
    final: str | None = None,
    *,
    tta: str | None = None,
    logit_adjustment: float = 0.0,
    point: OperatingPoint = AS_CHOSEN,
) -> Run:
    """Read a run's description and its final model, or the one that `read_run_info` describes; the hash of each part is
    checked.

    >>> run = read_run("exports/indiana")
    >>> run.info["final"]["kind"]
    'best-fold'
    """
    folder = Path(folder)
    from safetensors import SafetensorError, safe_open

    from ..models.backbone import weights_sha256

    own = read_info(folder)
    info = read_run_info(folder, final, tta=tta, logit_adjustment=logit_adjustment, point=point)
    path = folder / "model.safetensors"
    parts: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for part in ("tower", *info["final"]["members"]):
                start = TOWER if part == "tower" else f"{TAILS}{part}."
                parts[part] = {n.removeprefix(start): file.get_tensor(n) for n in names if n.startswith(start)}
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: cannot read the model ({str(error)[:120]}).") from error
    for part, tensors in parts.items():
        if weights_sha256(tensors, tensors) != info["weights_sha256"][part]:
            raise InputError(
                f"{path}: not the weights run.json was written with (hash of {part} differs); run the sweep again."
            )
    tower = parts.pop("tower")
    members = tuple(_member(info, tower, tail) for tail in parts.values())
    return Run(
        folder=folder,
        info=info,
        members=members,
        chosen=own["final"]["kind"],
        tta=own["train"].get("tta"),
        unlikeness=read_unlikeness(folder, info, members[0].visual),
    )


def read_run_info(
    folder: Path,
    final: str | None = None,
    *,
    tta: str | None = None,
    logit_adjustment: float = 0.0,
    point: OperatingPoint = AS_CHOSEN,
) -> dict[str, Any]:
    """`run.json` as if the sweep had been asked for a final model of this kind, for this operating point, for these
    views ("none" or "flip"), and for logits adjusted by the training labels after training; torch is not needed."""
    info = read_info(folder)
    if final not in (None, info["final"]["kind"]):
        info = _other_final(info, str(final))
    if point.changes:
        if logit_adjustment and point.calibration not in (None, "none"):
            raise InputError(
                f"--logit-adjustment does not go with --calibration {point.calibration}; leave one of them out."
            )
        info = info | clean(operating_points.choose_again(predictions.read(folder, info), point))
    if tta is not None and tta != info["train"].get("tta", "none"):
        info = _other_views(info, str(tta))
    return _adjusted(info, folder, logit_adjustment) if logit_adjustment else info


def _adjusted(info: dict[str, Any], folder: Path, strength: float) -> dict[str, Any]:
    """run.json with logits adjusted after training; thresholds move along, so that no decision changes.

    Figures that do not follow from ranking or decisions change, so none is kept.
    """
    if info["calibration"] is not None:
        raise InputError("--logit-adjustment: this run is calibrated, which the adjustment would undo; leave it out.")
    try:
        with np.load(folder / "predictions.npz") as file:
            labels = file["labels"][file["fold"] >= 0]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / 'predictions.npz'}: cannot be read; run the sweep again.") from error
    fitted = calibration.adjust(labels, strength)
    limits = calibration.move_thresholds(fitted, np.asarray(info["thresholds"]))
    return info | {
        "calibration": fitted,
        "thresholds": [float(limit) for limit in limits],
        "threshold_source": f"{info['threshold_source']}; moved with the logit adjustment",
        "metrics": dict.fromkeys(info["metrics"]),
    }


def _other_views(info: dict[str, Any], tta: str) -> dict[str, Any]:
    """run.json with a final model that answers for other views than those the run scored.

    Thresholds and calibration stay and say so; the figures were not measured and are left out.
    """
    own, other = ("the plain view", "both views") if tta == "flip" else ("both views", "the plain view")
    return info | {
        "train": info["train"] | {"tta": tta},
        "threshold_source": f"{info['threshold_source']}; found on {own}, used on {other}",
        "metrics": dict.fromkeys(info["metrics"]),
    }


def _other_final(info: dict[str, Any], kind: str) -> dict[str, Any]:
    """run.json as if the sweep had been asked for another final model.

    Thresholds and calibration are of the folds' own predictions, or of those of the retrained heads; the hold-out
    figures are the kind's own.
    """
    folds = [f"fold{k}" for k in range(info["spec"]["folds"])]
    retrained = [f"retrained{k}" for k in range(info["spec"]["folds"])]
    members = {
        "best-fold": [f"fold{info['chosen']['fold']}"],
        "refit": ["refit"],
        "ensemble": folds,
        "retrained": retrained,
    }.get(kind)
    if members is None:
        raise InputError(f"--final: {kind!r} is not best-fold, refit, ensemble or retrained.")
    if lacking := [name for name in members if name not in info["weights_sha256"]]:
        again = "run the sweep again" + (" with --retrain-head balanced" if kind == "retrained" else "")
        raise InputError(f"--final {kind}: the run kept no {lacking[0]}; {again}.")
    decision = dict(info.get("decisions", {}).get("retrained" if kind == "retrained" else "folds", {}))
    validated = decision.pop("out_of_fold", info["metrics"]["out_of_fold"])
    return info | {
        "final": {
            "kind": kind,
            "members": members,
            "rule": f"chosen when exporting; the sweep's was {info['final']['kind']}",
        },
        "model_sha256": model_sha256(info["weights_sha256"], members),
        **decision,
        "metrics": {"out_of_fold": validated, "holdout": (info["finals"] or {}).get(kind)},
    }


def _member(info: Mapping[str, Any], tower: Mapping[str, Any], tail: Mapping[str, Any]) -> Member:
    from ..models.backbone import assemble

    visual = assemble(info["backbone"], {**tower, **in_tower(tail, info["unfreeze_blocks"], tower)})
    state = {name.removeprefix("head."): tensor for name, tensor in tail.items() if name.startswith("head.")}
    head = _empty_head(info, state)
    head.load_state_dict(state)
    return Member(visual=visual, head=head.eval().requires_grad_(False))


def _empty_head(info: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    """The head of a run before its weights are in it: ours, or one of the user's own."""
    from ..models import heads
    from ..models.tail import Head

    own = info.get("custom") or {}
    if own.get("head") is None:
        return Head(state["0.weight"].shape[1], len(info["classes"]), dropout=0.0)
    if own["layers"] is None:
        raise InputError(
            f"this run's head, made by {own['head']}, holds a {own['unknown']}, which no file of ours can describe; a "
            f"head of torch.nn.Sequential with {', '.join(heads.KNOWN)} can be exported."
        )
    return heads.build(own["layers"])


def in_tower(tail: Mapping[str, Any], unfreeze_blocks: int, tower: Mapping[str, Any]) -> dict[str, Any]:
    """A tail's tensors (the head's aside) under their names in the tower."""
    depth = 1 + max(int(name.split(".")[2]) for name in tower if name.startswith("trunk.blocks."))
    out = {}
    for name, tensor in tail.items():
        kind, _, rest = name.partition(".")
        if kind == "blocks":
            number, _, rest = rest.partition(".")
            out[f"trunk.blocks.{depth - unfreeze_blocks + int(number)}.{rest}"] = tensor
        elif kind in PLACES:
            out[f"{PLACES[kind]}.{rest}"] = tensor
    return out


def save_model(path: Path, backbone: Backbone, tails: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, str]:
    """Write the whole frozen tower once, and every tail: nothing else is needed to build any of the models.

    Returns the sha256 of each part, `tower` and the tails' names.
    """
    from safetensors.torch import save_file

    from ..models.backbone import weights_sha256

    parts = {"tower": backbone.visual.state_dict(), **tails}
    tensors: dict[str, torch.Tensor] = {}
    for part, state in parts.items():
        start = TOWER if part == "tower" else f"{TAILS}{part}."
        tensors |= {start + name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, path)
    path.chmod((path.parent / "..").stat().st_mode & 0o666)  # safetensors writes for the owner alone
    return {part: weights_sha256(state, state) for part, state in parts.items()}


def model_sha256(weights: Mapping[str, str], members: list[str]) -> str:
    """One hash of the tower and the tails a final model consists of."""
    return digest({part: weights[part] for part in ("tower", *members)})


def clean(value: Any) -> Any:
    """JSON-ready: numpy numbers become Python's, NaN becomes null."""
    if isinstance(value, Mapping):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
