"""A user's own head: trained like ours, and where it is made of known layers, kept as JSON and exported."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import digest
from ..errors import InputError

# (E, C) to a module from embeddings (B, E) of length one to logits (B, C).
MakeHead = Callable[[int, int], nn.Module]
# (logits (B, C) float32, labels (B, C) int8 with 1, 0, -1 unknown) to a loss, a scalar.
LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Layers that a file can name, with the arguments that make them again. Dropout is nothing once trained.
KNOWN: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Linear": (nn.Linear, ("in_features", "out_features")),
    "BatchNorm1d": (nn.BatchNorm1d, ("num_features", "eps")),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps")),
    "GELU": (nn.GELU, ("approximate",)),
    "Dropout": (nn.Dropout, ("p",)),
    **{kind.__name__: (kind, ()) for kind in (nn.ReLU, nn.SiLU, nn.Tanh, nn.Identity)},
}


@dataclass(frozen=True, kw_only=True)
class Custom:
    """A head and a loss of the user's own; None where ours is taken."""

    head: MakeHead | None = None
    loss: LossFunction | None = None

    def __bool__(self) -> bool:
        return self.head is not None or self.loss is not None

    def make_head(self, embed_dim: int, classes: int, seed: int) -> nn.Module:
        """The head, its random numbers drawn from `seed`. Raises InputError where it is no module that fits."""
        assert self.head is not None
        with torch.random.fork_rng(devices=[]), _given("head", f"cannot be made for ({embed_dim}, {classes})"):
            torch.manual_seed(seed)
            made = self.head(embed_dim, classes)
        if not isinstance(made, nn.Module):
            raise InputError(f"head: it made a {type(made).__name__}, and not a torch.nn.Module.")
        with torch.no_grad(), _given("head", f"cannot take embeddings (2, {embed_dim})"):
            shape = tuple(made.eval()(torch.zeros(2, embed_dim)).shape)
        if shape != (2, classes):
            raise InputError(f"head: from (2, {embed_dim}) it makes {shape}, and not logits (2, {classes}).")
        return made

    def require_loss(self, classes: int, device: torch.device) -> None:
        """Try the loss once. Raises InputError where it gives no single number with a gradient."""
        if self.loss is None:
            return
        logits = torch.zeros(2, classes, device=device, requires_grad=True)
        labels = torch.zeros(2, classes, dtype=torch.int8, device=device)
        labels[0], labels[1, -1] = 1, -1
        with _given("loss", f"cannot take logits and labels (2, {classes})"), torch.random.fork_rng(devices=[]):
            made: Any = self.loss(logits, labels)
        if not isinstance(made, torch.Tensor):
            raise InputError(f"loss: it gave a {type(made).__name__}, and not a torch.Tensor.")
        if made.ndim:
            raise InputError(f"loss: from (2, {classes}) it makes {tuple(made.shape)}, and not a single number.")
        if not made.requires_grad:
            raise InputError("loss: it has no gradient by the logits; use torch's own functions of them.")

    def mark(self) -> dict[str, str]:
        """Name and hash of the source of each, by which an interrupted sweep knows its own."""
        return {
            name: f"{described(given)} {digest(_source(given))[:16]}"
            for name, given in (("head", self.head), ("loss", self.loss))
            if given is not None
        }


NOTHING_OWN = Custom()


@contextmanager
def _given(what: str, wrong: str) -> Iterator[None]:
    """What goes wrong in a user's own function, whatever it is, becomes an InputError."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:120]
        raise InputError(f"{what}: it {wrong} ({type(error).__name__}: {said}).") from error


def described(given: Callable[..., Any]) -> str:
    """`module.name` of a function."""
    return f"{getattr(given, '__module__', '?')}.{getattr(given, '__qualname__', type(given).__name__)}"


def _source(given: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(given)
    except (OSError, TypeError):
        return ""


def describe(module: nn.Module) -> dict[str, Any] | None:
    """A head of known layers as JSON; None where it holds another one, or more than a chain of them."""
    kind = type(module)
    if kind is nn.Sequential:
        inside = {name: describe(layer) for name, layer in module.named_children()}
        return None if None in inside.values() else {"layer": "Sequential", "inside": inside}
    name = kind.__name__
    if name not in KNOWN or KNOWN[name][0] is not kind:
        return None
    norm = kind in (nn.BatchNorm1d, nn.LayerNorm)
    parts = ("weight", "bias", "running_mean", "running_var")
    if norm and any(getattr(module, part, module) is None for part in parts):
        return None
    arguments = {each: getattr(module, each) for each in KNOWN[name][1]}
    if "normalized_shape" in arguments:
        arguments["normalized_shape"] = list(arguments["normalized_shape"])
    if kind is nn.Linear:
        arguments["bias"] = module.bias is not None
    return {"layer": name, **arguments}


def unknown_layer(module: nn.Module) -> str:
    """The class of the first layer that `describe` cannot name; empty where it can name all."""
    if type(module) is nn.Sequential:
        return next((name for layer in module if (name := unknown_layer(layer))), "")
    return "" if describe(module) else type(module).__name__


def build(description: Mapping[str, Any]) -> nn.Module:
    """The head that `describe` described, its weights not set."""
    values = dict(description)
    name = values.pop("layer")
    if name == "Sequential":
        made = nn.Sequential()
        for key, inside in values["inside"].items():
            made.add_module(key, build(inside))
        return made
    return KNOWN[name][0](**values)


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a head in the order they are applied."""
    if isinstance(module, nn.Sequential):
        for layer in module:
            yield from leaves(layer)
    else:
        yield module
