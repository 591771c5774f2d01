"""Quotas, memory, flags and GPUs of made-up machines, and a noise detector that can be shown noise."""

from __future__ import annotations

import json
import math
import mmap
import os
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest

from cxr_fast.system import hardware
from tests.helpers import states


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 1",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/m/cpu.max": "1000 100000",
            },
            3,
        ),
        ({"sys/fs/cgroup/cpu.max": "garbage\n", "proc/self/cgroup": "also garbage\n"}, None),
    ],
)
def test_container_quotas(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    root = put(tmp_path, files)
    assert hardware.cgroup_cores(root) == cores
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert hardware.cpu_count(root) == max(1, min(usable, math.ceil(cores if cores is not None else usable)))


def test_cpu_count_is_that_of_this_process() -> None:
    assert 1 <= hardware.cpu_count() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_cpu_count_follows_affinity() -> None:
    code = (
        "import os, cxr_fast.system.hardware as t\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(t.cpu_count())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "1"


Ticks = namedtuple("Ticks", "user nice system idle iowait irq softirq steal guest guest_nice")


def show_ticks(monkeypatch: pytest.MonkeyPatch, *readings: tuple[float, float, float]) -> None:
    """Make psutil give these (user, idle, steal) seconds, one after the other."""
    left = [Ticks(user, 0, 0, idle, 0, 0, 0, steal, 7, 7) for user, idle, steal in readings]
    monkeypatch.setattr(psutil, "cpu_times", lambda: left.pop(0))


@pytest.mark.parametrize(
    ("after", "share", "noisy"),
    [((0, 10**4, 0), 0.0, False), ((5000, 5000, 0), 0.5, True), ((0, 5000, 5000), 0.5, True)],
)
def test_share_of_others_from_known_ticks(
    monkeypatch: pytest.MonkeyPatch, after: tuple[int, int, int], share: float, noisy: bool
) -> None:
    show_ticks(monkeypatch, (0, 0, 0), after)
    with hardware.OtherCpu() as watch:
        pass
    assert watch.share == pytest.approx(share, abs=0.001)
    assert watch.noisy is noisy


@pytest.mark.parametrize("error", [FileNotFoundError("/proc/stat"), PermissionError("/proc/stat"), IndexError()])
def test_a_system_that_does_not_say_is_no_answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse() -> Any:
        raise error

    monkeypatch.setattr(psutil, "cpu_times", refuse)
    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    with hardware.OtherCpu() as watch:
        pass
    assert watch.share is None
    assert not watch.noisy
    assert hardware.memory_total() is None
    assert hardware.memory_available() == math.inf
    assert hardware.machine()["memory_gib"] is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat on this system")
def test_too_short_a_time_is_no_answer() -> None:
    with hardware.OtherCpu() as watch:
        pass
    assert watch.share is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat on this system")
def test_a_neighbour_is_seen_and_own_work_is_not() -> None:
    with states.busy_core() as burner:
        used = states.cpu_seconds(burner)
        with hardware.OtherCpu(threshold=0.01) as neighbour:
            states.wait_until(lambda: states.cpu_seconds(burner) > used + 0.5, "half a second of the neighbour's")
        used = states.cpu_seconds(burner) - used
    # At least what the neighbour really got, whatever else the machine was doing.
    assert neighbour.share is not None
    assert neighbour.share >= 0.7 * used / (os.cpu_count() or 1)
    assert neighbour.noisy
    with hardware.OtherCpu() as own:
        began = time.process_time()
        total = time.perf_counter()
        while time.process_time() - began < 1:
            pass
        total = time.perf_counter() - total
    # Our own second is not counted: were it, others and we could not fit into the machine.
    assert own.share is not None
    assert own.share <= 1 - 0.8 / (total * (os.cpu_count() or 1))


def test_machine_is_json_and_never_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = hardware.machine()
    assert json.loads(json.dumps(here)) == here
    assert here["cores"] == hardware.cpu_count()
    assert here["python"].startswith("3.")
    root = put(
        tmp_path,
        {
            "proc/cpuinfo": "model name\t: Test CPU\nflags\t: sse avx2 amx_int8\n\nmodel name\t: Other\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        },
    )
    monkeypatch.setattr(hardware, "memory_total", lambda: 2**34)
    known = hardware.machine(root)
    assert (known["cpu"], known["cpu_flags"]) == ("Test CPU", ["avx2", "amx_int8"])
    assert (known["memory_gib"], known["governor"]) == (16.0, "powersave")
    nothing = hardware.machine(tmp_path / "absent")
    assert nothing.keys() == here.keys()
    assert nothing["governor"] is None


@pytest.mark.parametrize(
    ("lines", "cpu"),
    [
        ("cpu family\t: 26\nmodel\t: 2\nmodel name\t: AMD EPYC\n", "AMD EPYC (family 26 model 2)"),
        (
            "cpu family\t: 25\nmodel\t: 17\nmodel name\t: AMD EPYC 9554 64-Core Processor\n",
            "AMD EPYC 9554 64-Core Processor",
        ),
        ("model name\t: AMD EPYC\n", "AMD EPYC"),
    ],
)
def test_a_cpu_whose_name_hides_its_generation_is_named_by_family_and_model(
    tmp_path: Path, lines: str, cpu: str
) -> None:
    """Two machines of one name, twice apart in float32, must not be taken for each other."""
    assert hardware.machine(put(tmp_path, {"proc/cpuinfo": lines}))["cpu"] == cpu


@pytest.mark.parametrize(
    ("script", "gpus"),
    [("echo ' Some GPU, 1.2, 3 MiB'", ["Some GPU, 1.2, 3 MiB"]), ("echo no driver; exit 9", []), (None, [])],
)
def test_gpus_from_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, gpus: list[str]
) -> None:
    if script is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.machine()["gpus"] == gpus


def test_the_import_brings_only_the_standard_library() -> None:
    code = "import sys, cxr_fast.system.hardware; print(sorted({'numpy', 'torch', 'psutil'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


ROW = "0, Some GPU, 555.1, 81559, 1024, 1980, 1980, 2619, 2619, 41, 120.5, Enabled"


@pytest.mark.parametrize(
    ("script", "count"),
    [(f"echo '{ROW}'", 1), (f"echo '{ROW}'; exit 9", 0), ("echo 'No devices were found'", 0), (None, 0)],
)
def test_clocks_of_gpus(script: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if script is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = hardware.gpu_states()
    assert len(found) == count
    if found:
        assert (found[0]["name"], found[0]["clocks.sm"], found[0]["persistence_mode"]) == (
            "Some GPU",
            1980.0,
            "Enabled",
        )


def test_what_a_card_does_not_say_is_none() -> None:
    assert [hardware._cell(text) for text in ("[N/A]", "[Not Supported]", "12.5", "A100")] == [None, None, 12.5, "A100"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512_vnni amx_int8\n\nflags : avx_vnni\n", ["avx512_vnni", "amx_int8"]),
        ("Features\t: fp asimd asimddp i8mm\n", ["i8mm", "asimddp"]),
        ("flags : avx2 avx512f xavx_vnni\n", []),
        ("", []),
        (None, []),
    ],
)
def test_flags_that_int8_is_fast_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    root = put(tmp_path, {} if text is None else {"proc/cpuinfo": text})
    assert hardware.int8_flags(root) == expected
    assert set(hardware.INT8_FLAGS) <= set(hardware.CPU_FLAGS), "a machine's record shows every flag that int8 asks for"


@pytest.mark.parametrize(
    ("flags", "machine", "said"),
    [
        ("avx2 avx512_vnni amx_int8", "x86_64", "AMX: int8 products in tiles"),
        ("avx2 avx512_vnni", "x86_64", "VNNI (avx512_vnni): int8 is fast"),
        ("avx2 avx_vnni", "x86_64", "VNNI (avx_vnni): int8 is fast"),
        ("sse avx2", "x86_64", "AVX2 only: int8 is slower; pairs of products add up in 16 bits, which"),
        ("sse", "x86_64", "neither VNNI nor AMX nor AVX2: int8 is slower; pairs of products add up in 16 bits"),
        ("fp asimddp i8mm", "aarch64", "ARM dot products (i8mm): int8 is fast"),
        ("fp asimd", "aarch64", "no dot products: int8 is slow here; sums are exact"),
        ("", "x86_64", "the system does not say"),
    ],
)
def test_what_the_cpu_makes_of_int8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, machine: str, said: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(hardware.platform, "machine", lambda: machine)
    root = put(tmp_path, {"proc/cpuinfo": f"flags : {flags}\n"})
    assert hardware.describe_int8(root).startswith(said)
    if machine == "x86_64" and flags:
        assert ("in 16 bits" in said) == (not hardware.int8_flags(root)), "what is fast is exact, and the reverse"


def test_an_apple_cpu_has_dot_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(hardware.platform, "machine", lambda: "arm64")
    assert hardware.int8_flags(tmp_path) == ["asimddp"]


@pytest.mark.parametrize(
    ("total", "files", "expected"),
    [
        (None, {}, None),
        (1_024_000, {}, 1_024_000),
        (1_024_000, {"sys/fs/cgroup/memory.max": "5000\n"}, 5000),
        (1_024_000, {"sys/fs/cgroup/memory.max": "max\n"}, 1_024_000),
        (
            None,
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "3000\n",
                "sys/fs/cgroup/a/b/memory.max": "4000\n",
            },
            3000,
        ),
        (None, {"proc/self/cgroup": "4:memory:/x\n", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "7000\n"}, 7000),
        (1024, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 1024),
        (None, {"proc/self/cgroup": "::\nx\n"}, None),
    ],
)
def test_the_memory_limit_is_the_tightest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int | None, files: dict[str, str], expected: int | None
) -> None:
    monkeypatch.setattr(hardware, "memory_total", lambda: total)
    assert hardware.memory_limit(put(tmp_path, files)) == expected


def test_memory_is_that_of_this_machine() -> None:
    assert 0 < hardware.memory_available() <= (hardware.memory_total() or 0)


def test_peak_memory_is_that_since_the_reset(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t   2048 kB\n")
    assert hardware.peak_rss(tmp_path) == 2 * 2**20
    assert hardware.peak_rss(tmp_path / "gone") is None
    assert hardware.reset_peak(tmp_path / "gone") is False
    if not hardware.reset_peak():
        pytest.skip("this system does not reset the peak")
    low = hardware.peak_rss()
    block = mmap.mmap(-1, 2**26)  # the allocator may keep what other tests freed
    block[:] = b"1" * len(block)
    high = hardware.peak_rss()
    assert low is not None
    assert high is not None
    assert high - low > 0.8 * len(block)
    block.close()
    hardware.reset_peak()
    again = hardware.peak_rss()
    assert again is not None
    assert again < high - 2**25
