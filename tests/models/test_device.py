"""The device is the one asked for or an error; threads follow what the process may use."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from cxr_fast.errors import DeviceError
from cxr_fast.models import device
from cxr_fast.system import hardware


def test_threads_are_those_asked_for_or_those_there_are() -> None:
    before = torch.get_num_threads()
    try:
        assert device.prepare(1) == torch.get_num_threads() == 1
        assert device.prepare() == torch.get_num_threads() == hardware.cpu_count()
    finally:
        torch.set_num_threads(before)


def test_freed_memory_stays_with_the_process_where_the_allocator_allows() -> None:
    """In a process of its own: 64 MB freed and taken again fault no page the second time."""
    code = """
import resource
from cxr_fast.models import device as cpu
told = cpu.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(64 << 20)
    for i in range(0, len(block), 4096):
        block[i] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(told, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    told, faults = done.stdout.split()
    if platform.libc_ver()[0] == "glibc":
        assert told == "True"
        assert int(faults) < 1000, "16,384 pages of 4 kB would be 64 MB"


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for name in ("cuda", "cuda:1", "tpu", "mps", "cuda:x"):
        with pytest.raises(DeviceError, match="--device"):
            device.pick_device(name)
    assert device.pick_device("auto").type == "cpu"
