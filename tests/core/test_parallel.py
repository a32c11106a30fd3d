"""Mapping over threads: results in order, errors raised, torch's threads restored."""

from __future__ import annotations

import pytest
import torch

from cntlora_core.runtime.thread_pool import map_in_threads


def test_results_come_in_order_with_progress_and_one_thread_each():
    seen, threads = [], []

    def square(x: int) -> int:
        threads.append(torch.get_num_threads())
        return x * x

    before = torch.get_num_threads()
    assert map_in_threads(square, range(20), lambda *p: seen.append(p)) == [
        x * x for x in range(20)
    ]
    assert set(threads) == {1}
    assert torch.get_num_threads() == before
    assert seen == [(i, 20) for i in range(21)]


def test_errors_are_raised_and_threads_restored():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda x: 1 // x, [1, 0, 1])
    assert torch.get_num_threads() == before
    assert map_in_threads(str, []) == []
