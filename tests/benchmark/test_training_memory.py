"""Fake tensors of a training step are counted as real ones are."""

from __future__ import annotations

import dataclasses

import pytest

from cntlora_core.benchmark import training_memory
from cntlora_core.diffusion.family import SD15


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fake_step_holds_what_a_real_one_does(tiny_model, monkeypatch, precision):
    small = dataclasses.replace(SD15, configs=tiny_model)
    monkeypatch.setattr(training_memory, "SD15", small)
    b = training_memory.Benchmark(rank=4)
    (fake,), (real,) = (
        training_memory.measure(b, precision, False, [128], fake=fake) for fake in (True, False)
    )
    assert fake["weights"] == real["weights"]
    assert fake["between_steps"] == pytest.approx(real["between_steps"], rel=0.01)
    assert fake["peak"] == pytest.approx(real["peak"], rel=0.05)
    assert fake["peak"] > 1.5 * fake["weights"]
    (checkpointed,) = training_memory.measure(b, precision, True, [128])
    assert checkpointed["peak"] < 0.7 * fake["peak"]
