"""Intervals against published and hand-computed values."""

from __future__ import annotations

import math

import pytest

from cntlora_core.benchmark.convergence.statistics import (
    estimate,
    paired,
    steps_to,
)


def test_the_interval_of_a_mean():
    found = estimate([1.0, 2.0, 3.0, 6.0])
    assert found is not None
    assert (found.mean, found.count) == (3.0, 4)
    # The squares of the deviations sum to 14; 3.182 is the quantile of 3 degrees of freedom.
    assert found.half_width == pytest.approx(3.182446 * math.sqrt(14 / 3 / 4), rel=1e-6)
    assert not found.differs_from_zero
    single = estimate([5.0])
    assert single is not None
    assert (single.mean, single.half_width) == (5.0, None)
    assert not single.differs_from_zero
    assert estimate([]) is None
    same = estimate([0.1 + 0.2, 0.3])  # one image more on both: no evidence of anything
    assert same is not None
    assert not same.differs_from_zero


def test_pairs_take_out_what_subjects_share():
    own = {("cat", 0): 0.5, ("dog", 0): 0.9, ("tent", 0): 0.3}
    other = {("cat", 0): 0.4, ("dog", 0): 0.79, ("boot", 0): 0.0}
    found = paired(own, other)
    assert found is not None
    assert found.count == 2
    assert found.mean == pytest.approx(0.105)
    assert found.half_width == pytest.approx(12.7062047 * 0.005)
    assert found.differs_from_zero
    assert paired(own, {}) is None


def test_steps_to_a_value():
    rising = [(0, 0.0), (100, 0.5), (200, 0.4), (300, 0.9)]
    assert steps_to(rising, 0.25, higher_is_better=True) == 50
    assert steps_to(rising, 0.5, higher_is_better=True) == 100
    assert steps_to(rising, 0.7, higher_is_better=True) == 260
    assert steps_to(rising, 0.95, higher_is_better=True) is None
    assert steps_to(rising, 0.0, higher_is_better=True) == 0
    falling = [(0, 9.0), (10, 7.0)]
    assert steps_to(falling, 8.0, higher_is_better=False) == 5
    assert steps_to([], 1.0, higher_is_better=True) is None
