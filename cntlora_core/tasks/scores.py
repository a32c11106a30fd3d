"""Metrics, from arrays to numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def mean_of_each(names: Sequence[str], rows: Array) -> dict[str, float]:
    """The mean of each column over the rows that have a number there; none of an empty column."""
    columns = {name: column[np.isfinite(column)] for name, column in zip(names, rows.T)}
    return {name: float(column.mean()) for name, column in columns.items() if len(column)}


def accuracy(predicted: Array, labels: Array) -> float:
    """Share of predictions that are right."""
    return float(np.mean(predicted == labels))


def pearson_correlation(predicted: Array, labels: Array) -> float:
    """Pearson's correlation coefficient, -1 to 1; 0 where one of both does not vary."""
    x, y = predicted.astype(float) - predicted.mean(), labels.astype(float) - labels.mean()
    below = float((x @ x) * (y @ y)) ** 0.5
    return float(x @ y) / below if below else 0.0


def matthews_correlation(predicted: Array, labels: Array) -> float:
    """Matthews' correlation coefficient of two classes, which is Pearson's of 0 and 1."""
    return pearson_correlation(predicted.astype(bool), labels.astype(bool))
