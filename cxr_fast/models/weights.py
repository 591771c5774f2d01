"""Weights of a vision tower as files: on the Hugging Face hub, or in a folder; read, and hashed.

Only the tensors under `visual.` are read. They come through safetensors or `torch.load(weights_only=True)`; nothing
else is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import BIOMEDCLIP, OPENAI_MEAN, OPENAI_STD
from ..errors import InputError
from ..system.huggingface import explain, hub_errors, hub_resolves, library

CONFIG_NAME = "open_clip_config.json"
WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def read(source: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the config and the tensors (names without `visual.`) of a hub model or of a local folder.

    Raises InputError naming the files to fetch where the hub cannot be reached.
    """
    folder = Path(source)
    config_path, weights_path = find_in_folder(folder) if folder.is_dir() else fetch_from_hub(source)
    return read_config(config_path), read_visual(weights_path)


def find_in_folder(folder: Path) -> tuple[Path, Path]:
    """The config and the weights of open_clip's names in a folder."""
    config_path = folder / CONFIG_NAME
    weights = next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if not config_path.is_file() or weights is None:
        raise InputError(f"--weights: {folder} must hold {CONFIG_NAME} and {WEIGHT_NAMES[0]} or {WEIGHT_NAMES[1]}.")
    return config_path, weights


def fetch_from_hub(source: str) -> tuple[Path, Path]:
    """The config and the weights of a hub model, downloaded where they are not in the hub's cache yet."""
    repo = (BIOMEDCLIP if source == "biomedclip" else source).removeprefix("hf-hub:")
    if repo.count("/") != 1:
        raise InputError(
            f"--weights: {source!r} is neither biomedclip, a hub id (owner/name), an existing folder, nor random:SEED."
        )
    hub = library(f"--weights {source}")
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    nor_here = "" if source == "biomedclip" or source.startswith("hf-hub:") else f", and {source} is no folder here"
    online = hub_resolves()

    def cached(name: str) -> bool:
        try:
            return isinstance(hub.try_to_load_from_cache(repo, name), str)
        except ValueError:  # not a name a hub could have; fetching it says so
            return False

    def fetch(name: str) -> Path:
        try:
            return Path(hub.hf_hub_download(repo, name, local_files_only=not online or cached(name)))
        except hub_errors() as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise FileNotFoundError(name) from error
            raise InputError(
                f"--weights: cannot fetch {repo} from the Hugging Face hub ({explain(error)}){nor_here}.\n"
                f"Fetch {CONFIG_NAME} and {WEIGHT_NAMES[1]} of {repo} elsewhere, then pass --weights FOLDER."
            ) from error

    try:
        config_path = fetch(CONFIG_NAME)
    except FileNotFoundError as error:
        raise InputError(f"--weights: {repo} holds no {CONFIG_NAME}; is it an open_clip model?") from error
    # Files already here come first: without a network, asking for the other name would fail.
    for name in sorted(WEIGHT_NAMES, key=cached, reverse=True):
        try:
            return config_path, fetch(name)
        except FileNotFoundError:
            continue
    raise InputError(f"--weights: {repo} holds neither {WEIGHT_NAMES[0]} nor {WEIGHT_NAMES[1]}.")


def read_config(path: Path) -> dict[str, Any]:
    """`embed_dim`, `vision_cfg`, `mean` and `std` of an open_clip config."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        model = raw["model_cfg"]
        vision, embed_dim = dict(model["vision_cfg"]), int(model["embed_dim"])
        preprocess = dict(raw.get("preprocess_cfg") or {})
        mean, std = (
            tuple(float(value) for value in preprocess.get(name) or openai)
            for name, openai in (("mean", OPENAI_MEAN), ("std", OPENAI_STD))
        )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {mean} and std {std} must be three numbers each, std positive")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--weights: {path} is not an open_clip config ({short_reason(error)}).") from error
    return {"embed_dim": embed_dim, "vision_cfg": vision, "mean": mean, "std": std}


def read_visual(path: Path) -> dict[str, torch.Tensor]:
    """The tensors under `visual.`, names without that prefix."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith("visual.")}  # noqa: SIM118
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise InputError(f"--weights: cannot read {path}: {short_reason(error)}") from error
    except Exception as error:  # the unpickler raises what the bytes make it; its own advice is to allow any code
        raise InputError(
            f"--weights: {path} is damaged, not fully downloaded, or holds more than tensors; nothing in it was run.\n"
            f"Fetch it again, or convert it to {WEIGHT_NAMES[0]}."
        ) from error
    if isinstance(tensors, dict) and "state_dict" in tensors:
        tensors = tensors["state_dict"]
    visual = {
        name.removeprefix("visual."): tensor
        for name, tensor in (tensors.items() if isinstance(tensors, dict) else ())
        if isinstance(name, str) and name.startswith("visual.") and isinstance(tensor, torch.Tensor)
    }
    if not visual:
        raise InputError(f"--weights: {path} holds no tensor named visual.*; is it an open_clip checkpoint?")
    return visual


def weights_sha256(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> str:
    """sha256 (hex) over name, dtype, shape and bytes of the named tensors, in sorted order."""
    hasher = hashlib.sha256()
    for name in sorted(names):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        hasher.update(tensor.numpy().data)
    return hasher.hexdigest()


def short_reason(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
