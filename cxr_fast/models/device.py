"""The device that computes: chosen by --device, its CPU threads sized by what this process may use."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from ..errors import DeviceError
from ..system import hardware

if TYPE_CHECKING:  # a command sizes its threads before it needs torch's two seconds
    import torch

# glibc's mallopt: give memory back to the system only beyond this, and serve every size from the heap.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
KEPT = 2**31 - 1


def pick_device(name: str) -> torch.device:
    """Return the device of `auto`, `cpu`, `cuda` or `cuda:1`; `auto` is a GPU where torch sees one.

    On a GPU float32 is computed in float32: torch would let its convolutions, so the patch embedding, keep 10 bits of
    a product's 23 (TF32), which costs as much accuracy as storing the tokens in float16. Raises DeviceError where the
    device does not exist or torch cannot use it.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"--device: {name!r} is not auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda":
        _require_cuda(device)
        torch.backends.cudnn.allow_tf32 = False
    elif device.type != "cpu":
        raise DeviceError(f"--device: {name!r} is not auto, cpu, cuda or cuda:N.")
    return device


def _require_cuda(device: torch.device) -> None:
    import torch

    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or (device.index or 0) >= count:
        why = "this torch has no CUDA" if not torch.version.cuda else f"torch sees {count} CUDA device(s)"
        raise DeviceError(f"--device {device}: {why}; use --device cpu, or repair the driver or the torch build.")


def prepare(threads: int | None = None) -> int:
    """Size torch's thread pool by affinity and cgroup quota, not by the host; keep freed memory; return the threads."""
    import torch

    count = threads or hardware.cpu_count()
    torch.set_num_threads(count)
    keep_freed_memory()
    return count


def keep_freed_memory() -> bool:
    """Have the allocator keep freed memory; False where it cannot be set (no glibc).

    A step frees and takes the same gigabyte of activations again; page faults for it are a twentieth of the step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc, or no such call
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT)) and bool(mallopt(M_MMAP_MAX, 0))
