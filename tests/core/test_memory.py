"""Freed memory is reused within the block and given back after it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from cntlora_core.cli import unexpected
from cntlora_core.runtime.memory import _glibc, freed_memory_kept

PROGRAM = """
import gc, resource, torch
from cntlora_core.runtime.memory import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(12_000_000).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

faults()
plain, start = faults(), resident()
with freed_memory_kept():
    block = [torch.ones(12_000_000) for _ in range(4)]
    del block
    faults()
    kept = faults()
    held = resident()
print(plain, kept, held - start, resident() - start)
"""


@pytest.mark.skipif(_glibc() is None, reason="the C library is not glibc")
@pytest.mark.thorough
def test_freed_memory_is_reused_then_given_back():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    plain, kept, held, left = (int(word) for word in done.stdout.split())
    assert kept < plain / 10
    assert held > 100_000_000
    assert left < held / 4


def test_nothing_happens_where_it_does_not_apply():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with freed_memory_kept(active=False):
        pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt >= before
    with pytest.raises(KeyError), freed_memory_kept():
        raise KeyError


def test_a_lack_of_memory_is_said_with_what_to_lower():
    with pytest.raises(RuntimeError) as on_cpu:
        torch.empty(2**55, dtype=torch.uint8)
    on_gpu = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    for error in (on_cpu.value, on_gpu, MemoryError()):
        said = unexpected(error)
        assert "not enough memory" in said
        assert "--gradient-checkpointing" in said
        assert "traceback" not in said
