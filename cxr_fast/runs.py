"""The run folder: what it says of itself, and the model built again from it. torch loads only with the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import InputError, SchemaError

if TYPE_CHECKING:
    import torch

    from .backbone import Backbone
    from .tail import Head, Tail

SCHEMA = 1
KIND = "cxr-fast run"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run folder: its description, and the model rebuilt from it."""

    folder: Path
    info: dict[str, Any]
    visual: Any
    head: Head

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Slow trusted path: normalised (B, 3, S, S) through open_clip's whole tower and the head, (B, C) float32."""
        import torch

        with torch.inference_mode():
            out: torch.Tensor = self.head(torch.nn.functional.normalize(self.visual(pixels), dim=-1))
        return out


def read_info(folder: Path) -> dict[str, Any]:
    """`run.json` of a run folder. InputError or SchemaError with one line when it is not one."""
    path = folder / "run.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a run folder (no run.json); `cxrfast sweep` makes one.")
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}).") from error
    if not isinstance(info, dict) or info.get("kind") != KIND:
        raise InputError(f"{path}: not written by `cxrfast sweep`.")
    if info.get("schema") != SCHEMA:
        raise SchemaError(
            f"{path}: schema {info.get('schema')} (written by {info.get('written_by')}); cxr-fast {__version__} "
            f"reads schema {SCHEMA}."
        )
    return info


def read_run(folder: Path) -> Run:
    """The run's description and its model, the weights' hash checked."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from .backbone import assemble, weights_sha256
    from .tail import Head

    info = read_info(folder)
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: cannot read the model ({str(error)[:120]}).") from error
    if weights_sha256(tensors, tensors) != info["model_sha256"]:
        raise InputError(f"{path}: not the weights run.json was written with (hash differs); run the sweep again.")
    visual = assemble(info["backbone"], {k[7:]: v for k, v in tensors.items() if k.startswith("visual.")})
    state = {k[5:]: v for k, v in tensors.items() if k.startswith("head.")}
    head = Head(state["0.weight"].shape[1], len(info["classes"]), dropout=0.0)
    head.load_state_dict(state)
    return Run(folder=folder, info=info, visual=visual, head=head.eval().requires_grad_(False))


def save_model(path: Path, backbone: Backbone, tail: Tail) -> None:
    """The whole tower with the trained blocks in place, and the head: nothing else is needed to build the model."""
    from safetensors.torch import save_file

    tower = backbone.visual.state_dict()
    kept = backbone.depth - len(tail.blocks)
    for name, tensor in tail.state_dict().items():
        kind, _, rest = name.partition(".")
        if kind == "blocks":
            number, _, rest = rest.partition(".")
            tower[f"trunk.blocks.{kept + int(number)}.{rest}"] = tensor
    tensors = {f"visual.{name}": tensor for name, tensor in tower.items()}
    tensors |= {f"head.{name}": tensor for name, tensor in tail.head.state_dict().items()}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod((path.parent / "..").stat().st_mode & 0o666)  # safetensors writes for the owner alone
