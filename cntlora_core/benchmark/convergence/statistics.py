"""Means with confidence intervals, paired differences, and steps to a value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval, by Student's t.

    Attributes:
        mean: The mean.
        half_width: Half the width of the interval; None for a single value.
        count: How many values.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def differs_from_zero(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate | None:
    """Mean and interval of independent values; None without any."""
    count = len(values)
    if not count:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = t_quantile((1 + confidence) / 2, count - 1)
    return Estimate(mean, quantile * math.sqrt(variance / count), count)


def paired(
    values: Mapping[Any, float], baseline: Mapping[Any, float], confidence: float = CONFIDENCE
) -> Estimate | None:
    """Mean difference from a baseline, over what both have (subjects and seeds); None if nothing.

    Args:
        values: By subject and seed, or whatever pairs them.
        baseline: Likewise.
        confidence: Of the interval.
    """
    shared = [key for key in values if key in baseline]
    return estimate([values[key] - baseline[key] for key in shared], confidence)


def t_cdf(t: float, degrees: int) -> float:
    """Distribution function of Student's t for whole degrees of freedom (a finite sum).

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {degrees}")
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * square
        total += term
    if not odd:
        return 0.5 + sine * total / 2
    return 0.5 + (angle + (sine * total if degrees > 1 else 0.0)) / math.pi


def t_quantile(probability: float, degrees: int) -> float:
    """Where the distribution function of Student's t has this value, by bisection.

    Raises:
        ValueError: if the probability does not lie between 0 and 1.
    """
    if not 0 < probability < 1:
        raise ValueError(f"the probability must lie between 0 and 1, got {probability}")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def steps_to(
    course: Sequence[tuple[int, float]], target: float, *, higher_is_better: bool
) -> float | None:
    """After how many steps a course first reaches a value; None if it never does.

    Args:
        course: (step, value) in the order of steps; in between values are interpolated.
        target: The value to reach.
        higher_is_better: Whether values start below it.
    """
    sign = 1.0 if higher_is_better else -1.0
    before: tuple[int, float] | None = None
    for step, value in course:
        missing = sign * (target - value)
        if missing <= 0:
            if before is None:
                return float(step)
            last_step, last_missing = before
            return last_step + (step - last_step) * last_missing / (last_missing - missing)
        before = (step, missing)
    return None
