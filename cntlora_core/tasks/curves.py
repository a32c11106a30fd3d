"""Training loss and validation metrics against steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cntlora_core.figures.plots import curve_figure, save_figure

Point = dict[str, float]
TIMES = ("runtime", "per_second", "preparation_time")
"""How the names end of what the Trainer says of its speed."""


@dataclass(frozen=True)
class Curves:
    """What a run has logged.

    Attributes:
        training: Points with ``step``, ``loss``, ``learning_rate`` and ``grad_norm``. The loss is
            the mean since the point before, LAVA's orthogonality penalty included.
        validation: Points with ``step``, ``loss`` and the metrics.
        best: The metric that matters most.
    """

    training: tuple[Point, ...]
    validation: tuple[Point, ...]
    best: str

    @classmethod
    def of(cls, history: Sequence[Mapping[str, Any]], best: str) -> Curves:
        """From the Trainer's log."""
        wanted = ("step", "epoch", "loss", "learning_rate", "grad_norm")
        return cls(
            tuple(
                {key: float(entry[key]) for key in wanted if key in entry}
                for entry in history
                if "loss" in entry
            ),
            tuple(
                {
                    key.removeprefix("eval_"): float(value)
                    for key, value in entry.items()
                    if not key.endswith(TIMES)
                }
                for entry in history
                if any(key.startswith("eval_") for key in entry)
            ),
            best,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


def plot_curves(runs: Mapping[str, Curves], path: Path, title: str = "") -> None:
    """One picture of several runs: training loss to the left, the best metric to the right."""
    best = next(iter(runs.values())).best
    left = {n: [(p["step"], p["loss"]) for p in run.training] for n, run in runs.items()}
    right = {
        n: [(p["step"], p[best]) for p in run.validation if best in p] for n, run in runs.items()
    }
    save_figure(curve_figure({"training loss": left, best: right}, title), path)
