"""Intervals against published and hand-computed values."""

from __future__ import annotations

import math

import pytest

from cntlora_core.benchmark.convergence.statistics import (
    estimate,
    paired,
    steps_to,
    t_cdf,
    t_quantile,
)

# scipy.stats.t.ppf
QUANTILES = {
    (0.975, 1): 12.706204736432095,
    (0.975, 2): 4.302652729911275,
    (0.975, 3): 3.182446305284263,
    (0.975, 4): 2.7764451051977987,
    (0.975, 23): 2.0686576104190406,
    (0.975, 100): 1.983971518523552,
    (0.995, 7): 3.4994832973505026,
    (0.6, 10): 0.2601848321920803,
}


@pytest.mark.parametrize(("given", "expected"), QUANTILES.items())
def test_quantiles_of_t(given, expected):
    assert t_quantile(*given) == pytest.approx(expected, rel=1e-6)
    assert t_cdf(expected, given[1]) == pytest.approx(given[0], abs=1e-7)
    assert t_quantile(1 - given[0], given[1]) == pytest.approx(-expected, rel=1e-6)


def test_what_is_no_probability_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        t_quantile(1.0, 3)
    with pytest.raises(ValueError, match="at least 1"):
        t_cdf(1.0, 0)


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
