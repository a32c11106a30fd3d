"""Means with confidence intervals, paired differences, and steps to a value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

try:
    from scipy.stats import t as student_t
except ImportError as error:
    raise ImportError("the report's intervals need SciPy: pip install scipy") from error

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
        """Whether the interval leaves 0 out; values that are all equal have none."""
        least = 1e-9 * abs(self.mean)  # what rounding leaves of 0
        return self.half_width is not None and abs(self.mean) > self.half_width > least


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate | None:
    """Mean and interval of independent values; None without any."""
    count = len(values)
    if not count:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = float(student_t.ppf((1 + confidence) / 2, count - 1))
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
