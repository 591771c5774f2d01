"""The CPU made ready for heavy work: threads by what this process may use, freed memory kept."""

from __future__ import annotations

import ctypes

from ..system import hardware

# glibc's mallopt: give memory back to the system only beyond this, and serve every size from the heap.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
KEPT = 2**31 - 1


def prepare(threads: int | None = None) -> int:
    """Size torch's thread pool by affinity and cgroup quota, not the host, and keep freed memory; the thread count."""
    import torch

    count = threads or hardware.cpu_count()
    torch.set_num_threads(count)
    keep_freed_memory()
    return count


def keep_freed_memory() -> bool:
    """Have the allocator keep what is freed; whether it could be told to (glibc).

    A step frees and takes the same gigabyte of activations again; page faults for it are a twentieth of the step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc, or no such call
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT)) and bool(mallopt(M_MMAP_MAX, 0))
