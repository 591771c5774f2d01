"""Read what this machine has: cores, memory, CPU flags and GPUs, and how busy other processes are.

Nothing here imports numpy or torch, and psutil only when it is called: the help page and `predict` start with it.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NOISY = 0.10
# 8-bit dot products. On x86 without VNNI and AMX int8 gains 0-20 %, and sums of earlier versions' files may saturate,
# so that another CPU gives other values; on ARM without them int8 is only slow.
INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp")
CPU_FLAGS = (
    *("fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16", "sve"),
)
GPU_FIELDS = (
    *("index", "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.max.sm", "clocks.mem"),
    *("clocks.max.mem", "temperature.gpu", "power.draw", "persistence_mode"),
)


def machine(root: Path = Path("/")) -> dict[str, Any]:
    """What a figure was measured on, JSON-ready, None where it cannot be read; it never fails.

    cpu, cpu_flags, cores (usable), cores_host, cores_affinity, cores_quota, governor, memory_gib, os, python, gpus.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    flags, memory = cpu_flags(root), memory_total()
    return {
        "cpu": _cpu_name(cpu_info(root)) or platform.processor() or platform.machine() or None,
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": cpu_count(root),
        "cores_host": os.cpu_count(),
        "cores_affinity": affinity,
        "cores_quota": cgroup_cores(root),
        "governor": _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "memory_gib": round(memory / 2**30, 1) if memory else None,
        "os": platform.platform(),
        "python": sys.version.split()[0],
        "gpus": _gpus(),
    }


# Cores.


def cpu_count(root: Path = Path("/")) -> int:
    """Cores this process may use: its affinity, cut to the container's quota (rounded up), at least 1.

    os.cpu_count() names the host's cores; a library that sizes its threads by it runs 64 threads on 2 cores.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cores(root)
    return max(1, affinity if quota is None else min(affinity, math.ceil(quota)))


def cgroup_cores(root: Path = Path("/")) -> float | None:
    """The tightest CPU quota of this process's control groups, version 1 or 2, in cores; None without one."""
    quotas = [_quota(folder) for folder in _cgroup_folders(root, "cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path) -> float | None:
    both = _read(folder / "cpu.max").split()
    if not both:
        both = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    quota, period = (_number(text) for text in [*both, "", ""][:2])
    return quota / period if quota and period and quota > 0 else None


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Every folder whose limits apply: the process's own and all above it. Inside a container the own path is
    often not mounted, and the top of the mount is the container's."""
    base = root / "sys/fs/cgroup"
    folders = [base, base / controller, base / "cpu,cpuacct"]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        if names == "" or controller in names.split(","):
            parts = Path(path.strip().lstrip("/"))
            folders += [base / names / p for p in (parts, *parts.parents)]
    return folders


class OtherCpu:
    """What share of the machine other processes took, and the hypervisor, while this was open.

    with OtherCpu() as others: measure(...)
    if others.noisy: ...

    share: 0..1 of all cores, None where the system does not say or the time was under a tenth of a second. noisy: the
    share is over the threshold. Child processes count as our own once they were waited for.
    """

    def __init__(self, threshold: float = NOISY) -> None:
        self.threshold = threshold
        self.share: float | None = None
        self._began: tuple[float, float, float] | None = None

    @property
    def noisy(self) -> bool:
        """Whether others took more than the threshold."""
        return self.share is not None and self.share > self.threshold

    def start(self) -> OtherCpu:
        """Begin to watch."""
        self.share, self._began = None, _cpu_seconds()
        return self

    def stop(self) -> float | None:
        """The share since `start`."""
        before, after = self._began, _cpu_seconds()
        if before is not None and after is not None:
            total, busy, own = (b - a for a, b in zip(before, after, strict=True))
            # The kernel counts in ticks of 1/100 s: ten of them are the least that means anything.
            if total >= 0.1 * (os.cpu_count() or 1):
                self.share = min(max((busy - own) / total, 0.0), 1.0)
        return self.share

    def __enter__(self) -> OtherCpu:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Seconds over all cores since boot: passed, busy, and our own; None where the system does not say."""
    import psutil

    try:
        ticks = psutil.cpu_times()._asdict()
    except Exception:  # a /proc that is hidden or of another form
        return None
    # Guest time is already in user and nice.
    total = sum(value for name, value in ticks.items() if name not in ("guest", "guest_nice"))
    own = os.times()
    children = own.children_user + own.children_system
    return total, total - ticks["idle"] - ticks.get("iowait", 0.0), time.process_time() + children


# Memory, in bytes.


def memory_total() -> int | None:
    """The machine's memory; None where the system does not say."""
    return _virtual_memory("total")


def memory_available() -> float:
    """Memory that a page cache may fill; infinity where the system does not say."""
    return float(_virtual_memory("available") or math.inf)


def _virtual_memory(what: str) -> int | None:
    import psutil

    try:
        return int(getattr(psutil.virtual_memory(), what)) or None
    except Exception:  # a /proc that is hidden or of another form
        return None


def memory_limit(root: Path = Path("/")) -> int | None:
    """What this process may have: the machine's memory, or the tightest limit of its control groups; None unknown."""
    files = ("memory.max", "memory.limit_in_bytes")
    texts = [_read(folder / file) for folder in _cgroup_folders(root, "memory") for file in files]
    limits = [memory_total() or 0, *(int(text) for text in texts if text.strip().isdigit())]
    # Version 1 writes "no limit" as a number near 2^63.
    return min((limit for limit in limits if 0 < limit < 2**60), default=None)


def reset_peak(proc: Path = Path("/proc/self")) -> bool:
    """Begin a new peak of resident memory; False where the system cannot, and the peak is that of the process."""
    try:
        (proc / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss(proc: Path = Path("/proc/self")) -> int | None:
    """The largest resident memory since `reset_peak`; None where the system does not say. psutil has none on Linux."""
    found = re.search(r"^VmHWM:\s*(\d+) kB", _read(proc / "status"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


# The CPU.


def cpu_info(root: Path = Path("/")) -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    first = _read(root / "proc/cpuinfo").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_flags(root: Path = Path("/")) -> set[str]:
    """What the CPU can do, by Linux's names; empty where the system does not say."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return {"asimddp"}  # every Apple CPU of that name
    info = cpu_info(root)
    return set((info.get("flags") or info.get("Features") or "").split())


def int8_flags(root: Path = Path("/")) -> list[str]:
    """Which of the CPU's flags make int8 fast."""
    present = cpu_flags(root)
    return [flag for flag in INT8_FLAGS if flag in present]


def describe_int8(root: Path = Path("/")) -> str:
    """What the CPU makes of int8 products, in words, by its flags.

    Source: Intel's manual of instructions; `vpmaddubsw`, which AVX2 has instead, adds two products in 16 bits.
    """
    present = cpu_flags(root)
    if "amx_int8" in present:
        return "AMX: int8 products in tiles, the fastest; sums in 32 bits, so they are exact"
    if vnni := next((flag for flag in ("avx512_vnni", "avx_vnni") if flag in present), None):
        return f"VNNI ({vnni}): int8 is fast; sums of four products in 32 bits, so they are exact"
    if arm := next((flag for flag in ("i8mm", "asimddp") if flag in present), None):
        return f"ARM dot products ({arm}): int8 is fast; sums in 32 bits, so they are exact"
    if not present:
        return "the system does not say which instructions the CPU has; int8 may be slow"
    if platform.machine() not in ("x86_64", "AMD64"):
        return "no dot products: int8 is slow here; sums are exact"
    name = "AVX2 only" if "avx2" in present else "neither VNNI nor AMX nor AVX2"
    return f"{name}: int8 is slower; pairs of products add up in 16 bits, which no file of this version passes"


def _cpu_name(info: dict[str, str]) -> str:
    """The model's name; a rented machine's often hides which ("AMD EPYC"), and then its family and model number too."""
    name, numbers = info.get("model name", ""), [info.get("cpu family"), info.get("model")]
    if not name or any(letter.isdigit() for letter in name) or None in numbers:
        return name
    return f"{name} (family {numbers[0]} model {numbers[1]})"


# GPUs.


def gpu_states() -> list[dict[str, Any]]:
    """Driver, memory (MiB), clocks (MHz), temperature and power of each GPU now, None where a card does not say."""
    rows = [[cell.strip() for cell in line.split(",")] for line in _nvidia_smi(GPU_FIELDS, "nounits")]
    return [dict(zip(GPU_FIELDS, map(_cell, row), strict=True)) for row in rows if len(row) == len(GPU_FIELDS)]


def _gpus() -> list[str]:
    """Name, driver and memory of each GPU, a line each."""
    return _nvidia_smi(("name", "driver_version", "memory.total"))


def _nvidia_smi(fields: tuple[str, ...], *options: str) -> list[str]:
    """nvidia-smi's lines, none where it fails or is missing; a hung driver costs ten seconds, no more."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", f"--format={','.join(('csv', 'noheader', *options))}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _cell(text: str) -> str | float | None:
    if text.startswith("["):  # [N/A], [Not Supported]
        return None
    number = _number(text)
    return text if number is None else number


def _read(path: Path) -> str:
    """A small text file, empty where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return float(text)
    return None
