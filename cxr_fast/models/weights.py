"""Weights of a vision tower as files: on the Hugging Face hub, or in a folder; read, and hashed.

Three layouts are known by their files: those of open_clip, timm and transformers. Only the tensors of the vision tower
are read. They come through safetensors, those of open_clip also through `torch.load(weights_only=True)`; nothing else
is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..config import BIOMEDCLIP, OPENAI_MEAN, OPENAI_STD, WEIGHT_CONFIGS
from ..errors import InputError
from ..system.huggingface import explain, hub_errors, hub_resolves, library
from . import timm_towers, transformers_names

CONFIG_NAME, PLAIN_CONFIG = WEIGHT_CONFIGS
WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# Of timm and transformers: one file, or an index that names several.
PLAIN_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
CARD = "README.md"
# What a clone without `git lfs` holds in place of each large file begins with this.
LFS_POINTER = b"version https://git-lfs.github.com/"


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The files of a set of weights in a folder or repository; `get` finds another one there, or None."""

    config: Path
    tensors: tuple[Path, ...]
    where: str
    get: Callable[[str], Path | None]


def read(source: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the config and the tensors (names without `visual.`) of a hub model or of a local folder.

    Raises InputError naming the files to fetch where the hub cannot be reached, and with the reason for a model that
    is not supported.
    """
    files = locate(source)
    if files.config.name == CONFIG_NAME:
        return read_config(files.config), read_visual(files.tensors[0])
    return _read_plain(files)


def locate(source: str) -> WeightFiles:
    """Find the files of a folder, or of a hub model: downloaded where they are not in the hub's cache yet.

    Raises InputError naming what a folder or repository lacks.
    """
    if (folder := Path(source)).is_dir():

        def get(name: str) -> Path | None:
            return folder / name if (folder / name).is_file() else None

        return _locate(get, str(folder), lambda names: names)
    hub = _Hub.of(source)
    # Files already here come first: without a network, asking for the other name would fail.
    return _locate(hub.get, hub.repo, lambda names: sorted(names, key=hub.cached, reverse=True), ask=hub.online)


def _locate(
    get: Callable[[str], Path | None],
    where: str,
    order: Callable[[Iterable[str]], Iterable[str]],
    ask: bool = False,
) -> WeightFiles:
    """Find a set of weights by the names of its files, in `order`; `ask`: for open_clip's config first in any case."""
    config = next((path for name in (WEIGHT_CONFIGS if ask else order(WEIGHT_CONFIGS)) if (path := get(name))), None)
    if config is None:
        raise InputError(
            f"--weights: {where} holds no {CONFIG_NAME} with {' or '.join(WEIGHT_NAMES)}, and no {PLAIN_CONFIG} with "
            f"{PLAIN_WEIGHTS[0]}."
        )
    names = WEIGHT_NAMES if config.name == CONFIG_NAME else PLAIN_WEIGHTS
    path = next((path for name in order(names) if (path := get(name))), None)
    if path is None and names is WEIGHT_NAMES:
        raise InputError(f"--weights: {where} holds neither {' nor '.join(WEIGHT_NAMES)} beside {CONFIG_NAME}.")
    if path is None:
        raise InputError(
            f"--weights: {where} holds no {PLAIN_WEIGHTS[0]}; a pickled file, such as pytorch_model.bin, is not read: "
            "convert it to safetensors."
        )
    tensors = _in_several(path, get) if path.suffix == ".json" else (path,)
    return WeightFiles(config=config, tensors=tensors, where=where, get=get)


def _in_several(index: Path, get: Callable[[str], Path | None]) -> tuple[Path, ...]:
    """The files that an index names."""
    named = read_json(index).get("weight_map")
    names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    found = {name: get(name) for name in names if Path(name).name == name and name.endswith(".safetensors")}
    if not names or (lost := [name for name in names if not found.get(name)]):
        what = f"names {lost[0]}, which does not exist beside it" if names else "names no files"
        raise InputError(f"--weights: {index} {what}.")
    return tuple(path for path in found.values() if path)


@dataclass(frozen=True, kw_only=True)
class _Hub:
    """A repository on the Hugging Face hub."""

    source: str
    repo: str
    library: ModuleType
    online: bool

    @classmethod
    def of(cls, source: str) -> _Hub:
        """The repository of a source. Raises InputError for one that can name none."""
        repo = (BIOMEDCLIP if source == "biomedclip" else source).removeprefix("hf-hub:")
        if repo.count("/") != 1:
            raise InputError(
                f"--weights: {source!r} is neither biomedclip, a hub id (owner/name), an existing folder, nor "
                "random:SEED."
            )
        return cls(source=source, repo=repo, library=library(f"--weights {source}"), online=hub_resolves())

    def look(self, name: str) -> Any:
        """The path of a file in the hub's cache, None, or a mark of the library that the repository lacks it."""
        try:
            return self.library.try_to_load_from_cache(self.repo, name)
        except ValueError:  # not a name a hub could have; fetching it says so
            return None

    def cached(self, name: str) -> bool:
        """Whether a file is in the hub's cache."""
        return isinstance(self.look(name), str)

    def get(self, name: str) -> Path | None:
        """The path of a file, None where the repository lacks it. Raises InputError where it cannot be had."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        if (seen := self.look(name)) is not None and not isinstance(seen, str):
            return None
        try:
            return Path(self.library.hf_hub_download(self.repo, name, local_files_only=not self.online or bool(seen)))
        except hub_errors() as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            named = self.source == "biomedclip" or self.source.startswith("hf-hub:")
            nor_here = "" if named else f", and {self.source} is no folder here"
            plain = f" (of timm or transformers: {PLAIN_CONFIG}, {PLAIN_WEIGHTS[0]}, {PROCESSORS[0]})"
            files = f"{CONFIG_NAME} and {WEIGHT_NAMES[1]} of {self.repo}{'' if self.source == 'biomedclip' else plain}"
            raise InputError(
                f"--weights: cannot fetch {self.repo} from the Hugging Face hub ({explain(error)}){nor_here}.\n"
                f"Fetch {files} elsewhere, then pass --weights FOLDER."
            ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises InputError for anything else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"--weights: {path} is not JSON ({short_reason(error)}).") from error
    if not isinstance(raw, dict):
        raise InputError(f"--weights: {path} holds no JSON object.")
    return raw


def _read_plain(files: WeightFiles) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of timm's or transformers' files."""
    raw, where = read_json(files.config), files.where
    names = [name for path in files.tensors for name in _names(path)]
    of_timm = "architecture" in raw
    if not of_timm and "model_type" not in raw:
        raise InputError(f"--weights: {files.config} names no architecture (timm) and no model_type (transformers).")
    try:
        if of_timm:
            config = timm_towers.read_config(raw, where)
        else:
            config = transformers_names.read_config(raw, _read_processor(files), names, where)
        _require_statistics(config["mean"], config["std"])
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, ArithmeticError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else short_reason(error)
        raise InputError(f"--weights: {where} describes no vision transformer ({said}).") from error
    chosen, left_out = timm_towers.select(names) if of_timm else transformers_names.select(names, config, where)
    if left_out:
        config["left_out"] = left_out
    tensors: dict[str, torch.Tensor] = {}
    for path in files.tensors:
        tensors |= _load(path, chosen)
    if whole := next((name for name, tensor in tensors.items() if not tensor.is_floating_point()), None):
        raise InputError(f"--weights: {where} holds {whole} as {tensors[whole].dtype}; quantised weights are not read.")
    return config, tensors if of_timm else transformers_names.rename(tensors, config, where)


def _read_processor(files: WeightFiles) -> dict[str, Any]:
    """What transformers' image processor does before the model. Raises InputError where no file says it."""
    for name in PROCESSORS:
        if path := files.get(name):
            raw = read_json(path)
            nested = raw.get("image_processor", raw)
            if isinstance(nested, dict) and ("image_mean" in nested or nested.get("do_normalize") is False):
                return nested
    raise InputError(
        f"--weights: {files.where} holds no {PROCESSORS[0]} with image_mean and image_std; these are the model's own, "
        "and without them its embeddings are wrong."
    )


def _require_statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    if len(mean) != 3 or len(std) != 3 or not (all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
        raise ValueError(f"mean {mean} and std {std} must be three numbers each, std positive")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open. Raises InputError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = short_reason(error)
        with suppress(OSError), path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                reason = "it is a Git LFS pointer and not the weights; fetch them with `git lfs pull`."
        raise InputError(f"--weights: cannot read {path}: {reason}") from error


def _names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _load(path: Path, chosen: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The chosen tensors of a file, {name there: name here}, by their names here."""
    with _opened(path) as file:
        return {chosen[name]: file.get_tensor(name) for name in file.keys() if name in chosen}  # noqa: SIM118


def read_licence(files: WeightFiles) -> str:
    """The licence that the card beside the weights names in its header; empty where none does."""
    try:
        card = files.get(CARD)
        text = card.read_text(encoding="utf-8", errors="replace") if card else ""
    except (InputError, OSError):  # a card is not needed
        return ""
    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    said = (
        dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([^\s\"'#]+)", header[1], re.MULTILINE)) if header else {}
    )
    name, detail = said.get("license", ""), said.get("license_name", "")
    return f"{name} ({detail})" if name and detail else name or detail


def read_asked_resize(files: WeightFiles) -> dict[str, str]:
    """How the config of an open_clip model resizes its images: `resize` and `interpolation`, where it says so.

    A config of timm and transformers has it under `preprocess`. It is for a reader, and decides nothing.
    """
    asked = read_json(files.config).get("preprocess_cfg") or {}
    modes = {"shortest": "crop", "longest": "pad", "squash": "squash"}
    found = {"resize": modes.get(str(asked.get("resize_mode")), ""), "interpolation": asked.get("interpolation", "")}
    return {name: str(value) for name, value in found.items() if value}


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
        _require_statistics(mean, std)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"--weights: {path} is not an open_clip config ({short_reason(error)}).") from error
    return {"embed_dim": embed_dim, "vision_cfg": vision, "mean": mean, "std": std}


def read_visual(path: Path) -> dict[str, torch.Tensor]:
    """The tensors under `visual.`, names without that prefix."""
    try:
        if path.suffix == ".safetensors":
            tensors = _load(path, {name: name for name in _names(path) if name.startswith("visual.")})
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
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
