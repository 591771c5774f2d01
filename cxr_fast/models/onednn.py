"""float32 linear layers by oneDNN where that is the faster of torch's two libraries for them.

torch on x86 gives float32 products to MKL. On an AMD core of family 26 (Zen 5) that runs them at 108 GFLOP/s, as if in
AVX2, and oneDNN, which is in the same torch and does its bfloat16 products, at 237. Elsewhere nothing is changed: of
other CPUs only a head's products were measured, on family 25 (0.121 ms by oneDNN, 0.113 by MKL).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..system import hardware

AMD, ZEN5 = "AuthenticAMD", 26
# Fewer numbers in the weight, or rows, are left alone: oneDNN gains little there, and a head's step by hand
# (`HeadFold`) keeps the bits of its twin.
WEIGHTS, ROWS = 2**16, 64


class OneDnn(TorchFunctionMode):
    """While it is entered, large float32 linear layers of this thread's CPU tensors are computed by oneDNN."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and suits(*args[:2]):
            return OneDnnLinear.apply(*args, *(None,) * (3 - len(args)))
        return func(*args, **(kwargs or {}))


class OneDnnLinear(torch.autograd.Function):
    """x (..., D), weight (D', D), bias (D',) or None, float32, to (..., D'); `F.linear` within float32's rounding."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of x, weight and bias from g (..., D'), each contiguous."""
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        flat = g.reshape(-1, g.shape[-1])
        return (
            product(g, weight.t()) if wanted[0] else None,
            product(flat.t(), x.reshape(-1, x.shape[-1]).t()) if wanted[1] else None,
            flat.sum(0) if wanted[2] else None,
        )


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., D) times weight (D', D) transposed, plus bias (D',), by oneDNN."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def suits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a layer is one that `OneDnn` takes."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.numel() >= WEIGHTS
        and x.numel() >= ROWS * weight.shape[1]
    )


def float32(device: torch.device) -> AbstractContextManager[Any]:
    """The context in which float32 layers run fastest on this device."""
    return OneDnn() if device.type == "cpu" and onednn_is_faster() else nullcontext()


@cache
def onednn_is_faster(root: Path = Path("/")) -> bool:
    """True on AMD Zen 5 and newer with AVX-512, if torch exposes its oneDNN linear."""
    info = hardware.cpu_info(root)
    newer = info.get("vendor_id") == AMD and int(info.get("cpu family", "0")) >= ZEN5
    usable = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return newer and "avx512f" in info.get("flags", "").split() and usable
