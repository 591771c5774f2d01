"""One torch thread for every test of training, whatever an earlier test left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def _one_thread() -> Iterator[None]:
    """Toy tensors gain nothing from a second thread, and stand nearly still with it on a busy machine. A command leaves
    two, and sums of two threads have other last bits than those of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


module_with_one_thread = pytest.fixture(_one_thread, scope="module", autouse=True)
test_with_one_thread = pytest.fixture(_one_thread, autouse=True)
