"""Table and plot of the dynamics that the study of tasks has recorded.

python -m cntlora_core.benchmark.tasks.dynamics_report runs/tasks --output docs/experiments
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from cntlora_core.benchmark.convergence.statistics import estimate, paired
from cntlora_core.benchmark.tasks.report import BASELINE, seeds_of
from cntlora_core.benchmark.tasks.study import VARIANTS, Run, read_runs
from cntlora_core.dynamics.groups import LANGUAGE, VISION
from cntlora_core.dynamics.log import FILE_NAME, Record, read_dynamics
from cntlora_core.dynamics.plots import plot_dynamics
from cntlora_core.dynamics.token_moments import TEXT, VISUAL
from cntlora_core.runtime.files import atomic_write
from cntlora_core.runtime.flags import UserPath

Records = Sequence[Record]
EARLY, LATE = 20, 100
"""Steps at the beginning and at the end that a peak and a level are of."""


@dataclass(frozen=True)
class DynamicsReport:
    """Which runs, and where table and plot go.

    Attributes:
        runs: The study's output folder.
        output: Folder for ``dynamics-tables.md`` and ``dynamics.png``.
        problem: Of the study; its dynamics must have been recorded.
        size: Number of training samples.
        learning_rate: Of all methods.
    """

    runs: Annotated[UserPath, tyro.conf.Positional]
    output: UserPath = Path("docs/experiments")
    problem: str = "captions"
    size: int = 1200
    learning_rate: float = 2e-4


def _values(records: Records, key: str, group: str = "") -> np.ndarray:
    return np.array([r[key][group] if group else r[key] for r in records], float)


def _spikes(records: Records) -> float:
    """How far gradient norms of neighbouring steps are apart, as the deviation of a logarithm."""
    return float(np.diff(np.log(_values(records[-LATE:], "grad_norm"))).std() / 2**0.5)


def token_ratios(records: Records, step: int) -> list[float]:
    """Second moment of visual over text tokens at each layer that reads both.

    Args:
        records: Of one run.
        step: 0 for the first measurement, -1 for the last.
    """
    measured = [r["second_moments"] for r in records if "second_moments" in r][step]
    both = [m for m in measured.values() if m.get(VISUAL) and m.get(TEXT)]
    return [m[VISUAL] / m[TEXT] for m in both]


COLUMNS: Mapping[str, Callable[[Records], float]] = {
    "loss, step 1": lambda r: _values(r, "loss")[0],
    f"loss, last {LATE}": lambda r: _values(r, "loss")[-LATE:].mean(),
    f"gradient norm, peak of the first {EARLY}": lambda r: _values(r, "grad_norm")[:EARLY].max(),
    f"gradient norm, last {LATE}": lambda r: _values(r, "grad_norm")[-LATE:].mean(),
    "its jumps": _spikes,
    "vision / language": lambda r: float(
        np.median((_values(r, "grad_norms", VISION) / _values(r, "grad_norms", LANGUAGE))[-LATE:])
    ),
    "update / weight": lambda r: _values(r, "update_ratios", LANGUAGE)[-LATE:].mean(),
}


def table(by_name: Mapping[str, Mapping[int, Records]]) -> str:
    """One row a method: means over the seeds with 95 % intervals; a star where the difference from
    plain LoRA of the same seeds leaves 0 out.

    Args:
        by_name: Records by method and seed.
    """
    lines = ["| method | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    found = {
        name: [{seed: column(r) for seed, r in runs.items()} for column in COLUMNS.values()]
        for name, runs in by_name.items()
    }
    for name, columns in found.items():
        cells = []
        for i, values in enumerate(columns):
            mean = estimate(list(values.values()))
            assert mean is not None
            width = "" if mean.half_width is None else f" ± {mean.half_width:.2g}"
            other = paired(values, found[BASELINE][i]) if BASELINE in found else None
            star = "*" if name != BASELINE and other and other.differs_from_zero else ""
            cells.append(f"{mean.mean:.3g}{width}{star}")
        lines.append(f"| {name} | {len(by_name[name])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(settings: DynamicsReport) -> Path:
    """Write ``dynamics-tables.md`` and the plot of the lowest seed; returns the former.

    Raises:
        ValueError: if no run of that kind is there.
    """
    runs = read_runs(settings.runs)
    by_name: dict[str, dict[int, Records]] = {}
    for name in VARIANTS:
        asked = (settings.problem, name, settings.size, settings.learning_rate)
        for seed in seeds_of(runs, *asked):
            path = settings.runs / "runs" / Run(*asked, seed).key / FILE_NAME
            by_name.setdefault(name, {})[seed] = read_dynamics(path)
    if not by_name:
        raise ValueError(f"there are no runs of {settings.problem} in {settings.runs}")
    first = {name: found[min(found)] for name, found in by_name.items()}
    plot_dynamics(first, settings.output / "dynamics.png", f"{settings.problem}, one seed")
    ratios = []
    for name, found in by_name.items():
        before, after = (
            np.array([token_ratios(r, step) for r in found.values()]).mean(axis=0)
            for step in (0, -1)
        )
        shown = (
            f"{np.median(row):.2f} ({row.min():.2f} to {row.max():.2f})" for row in (before, after)
        )
        ratios.append(f"| {name} | " + " | ".join(shown) + " |")
    head = "| method | first step | last measurement |\n|---|---|---|\n"
    path = settings.output / "dynamics-tables.md"
    with atomic_write(path) as temporary:
        text = f"{table(by_name)}\n\nVisual over text tokens:\n\n{head}" + "\n".join(ratios) + "\n"
        temporary.write_text(text, "utf-8")
    return path


def main() -> int:
    settings = tyro.cli(DynamicsReport, description=__doc__)
    try:
        print(report(settings))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
