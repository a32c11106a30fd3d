"""Tables and plots of the study of tasks.

python -m cntlora_core.benchmark.tasks.report runs/tasks --output docs/experiments
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from cntlora_core.benchmark.convergence.statistics import Estimate, estimate, paired
from cntlora_core.benchmark.tasks.problems import PROBLEMS
from cntlora_core.benchmark.tasks.study import (
    ARCHIVE_NAME,
    SEARCH_SEED,
    VARIANTS,
    Run,
    best_rate,
    read_runs,
    search_size,
)
from cntlora_core.figures.plots import curve_figure, save_figure
from cntlora_core.runtime.files import atomic_write, write_json_atomic
from cntlora_core.runtime.flags import UserPath

Records = Mapping[str, Mapping[str, Any]]
_KEPT = ("run", "metrics", "best", "trained_parameters", "seconds", "versions")
BASELINE = "lora"


@dataclass(frozen=True)
class TaskReport:
    """Which runs, and where the tables and plots go.

    Attributes:
        runs: The study's output folder, or a ``tasks-runs.json``.
        output: Folder for ``tasks-tables.md``, ``tasks-*.png`` and ``tasks-runs.json``, which has
            of each run what the tables and plots are made of, and keeps the runs that it had.
        seeds: Of the comparison; default: all that there are.
        rates: Learning rates by method, for a table of these alone.
    """

    runs: Annotated[UserPath, tyro.conf.Positional]
    output: UserPath = Path("docs/experiments")
    seeds: tuple[int, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)


def seeds_of(records: Records, problem: str, name: str, size: int, rate: float) -> dict[int, Any]:
    """The runs of one setting by seed, without that of the search."""
    found = {}
    for key, record in records.items():
        run = Run(**record["run"])
        wanted = Run(problem, name, size, rate, run.seed)
        if run == wanted and run.seed != SEARCH_SEED and run.key == key:
            found[run.seed] = record
    return dict(sorted(found.items()))


def table(records: Records, problem: str, size: int, rates: Mapping[str, float]) -> str:
    """One row a method: accuracy and loss on the validation set, and differences from plain LoRA,
    or where that is not among them from the first.

    Args:
        records: All runs by key.
        problem: Its name.
        size: Number of training samples.
        rates: The learning rate of each method.
    """
    by_name = {n: seeds_of(records, problem, n, size, rate) for n, rate in rates.items()}
    by_name = {name: runs for name, runs in by_name.items() if runs}
    if not by_name:
        return ""
    baseline = BASELINE if BASELINE in by_name else next(iter(by_name))
    plain = "LoRA" if VARIANTS[baseline].method == "lora" else baseline
    known = next(iter(next(iter(by_name.values())).values()))["metrics"]["validation"]
    others = [metric for metric in known if metric not in ("accuracy", "loss")]
    head = [
        "method", "learning rate", "seeds", "accuracy", f"accuracy - {plain}'s", *others, "loss",
        "parameters", "initialisation",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    accuracies = {name: _metric(runs, "accuracy") for name, runs in by_name.items()}
    for name, runs in by_name.items():
        first = next(iter(runs.values()))
        accuracy = estimate(list(accuracies[name].values()))
        loss = estimate(list(_metric(runs, "loss").values()))
        difference = paired(accuracies[name], accuracies[baseline]) if name != baseline else None
        took = estimate([record["seconds"]["initialisation"] for record in runs.values()])
        assert took is not None
        cells = [
            name, f"{rates[name]:g}", str(len(runs)), f"{_words(accuracy, 100, 1)} %",
            _words(difference, 100, 1, star=True),
            *(_words(estimate(list(_metric(runs, m).values())), 100, 1) for m in others),
            _words(loss, 1, 3), f"{first['trained_parameters']:,}", f"{took.mean:.1f} s",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def archive(records: Records, path: Path) -> None:
    """Write of each run what tables and plots are made of, as one JSON object by key, beside the
    runs that the file has.
    """
    lean = {
        key: {name: record[name] for name in _KEPT} | {"curves": _plotted(record["curves"])}
        for key, record in sorted((read_runs(path) | dict(records)).items())
    }
    write_json_atomic(path, lean, indent=None)


def _plotted(curves: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: [
            {
                key: round(p[key], 5)
                for key in ("step", "loss", "accuracy")
                if p.get(key) is not None
            }
            for p in points
        ]
        for name, points in curves.items()
        if isinstance(points, list)
    }


def report(records: Records, output: Path, rates: Mapping[str, float] | None = None) -> Path:
    """Write ``tasks-tables.md`` and a plot for each problem; returns the former.

    Args:
        records: All runs by key.
        output: The folder.
        rates: Learning rates by method, for a table of these alone.
    """
    parts = []
    for problem, known in PROBLEMS.items():
        least = search_size(problem)
        searched = [
            name
            for name, variant in VARIANTS.items()
            if all(
                Run(problem, name, least, rate, SEARCH_SEED).key in records
                for rate in variant.rates
            )
        ]
        best = {name: best_rate(records, problem, name, least) for name in searched}
        alike = [
            (size, rate)
            for size in known.sizes
            for rate in sorted({float(r["run"]["learning_rate"]) for r in records.values()})
            if seeds_of(records, problem, BASELINE, size, rate)
        ]
        sections: list[tuple[str, int, dict[str, float]]] = [
            (f"{size} samples, every method at {rate:g}", size, dict.fromkeys(VARIANTS, rate))
            for size, rate in alike
        ]
        sections += [
            (f"{size} samples, every method at its best rate", size, best) for size in known.sizes
        ]
        if rates:
            sections += [(f"{size} samples, as asked", size, dict(rates)) for size in known.sizes]
        for title, size, chosen in sections:
            if rows := table(records, problem, size, chosen):
                parts.append(f"### {problem}: {title}\n\n{rows}")
        _plot(records, problem, least, best, output / f"tasks-{problem}.png")
    path = output / "tasks-tables.md"
    with atomic_write(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", "utf-8")
    return path


def _plot(
    records: Records, problem: str, size: int, rates: Mapping[str, float], path: Path
) -> None:
    """Means over the seeds: training loss and accuracy against steps."""
    left: dict[str, list[tuple[float, float]]] = {}
    right: dict[str, list[tuple[float, float]]] = {}
    for name, rate in rates.items():
        runs = list(seeds_of(records, problem, name, size, rate).values())
        if runs:
            left[name] = _mean_course([r["curves"]["training"] for r in runs], "loss")
            right[name] = _mean_course([r["curves"]["validation"] for r in runs], "accuracy")
    if left:
        figure = curve_figure({"training loss": left, "accuracy": right}, f"{size} samples")
        save_figure(figure, path)


def _mean_course(
    courses: Sequence[Sequence[Mapping[str, float]]], key: str
) -> list[tuple[float, float]]:
    points = [[p for p in course if p.get(key) is not None] for course in courses]
    return [
        (row[0]["step"], sum(p[key] for p in row) / len(row)) for row in zip(*points, strict=False)
    ]


def _metric(runs: Mapping[int, Any], name: str) -> dict[int, float]:
    found = {seed: record["metrics"]["validation"][name] for seed, record in runs.items()}
    return {seed: math.nan if value is None else value for seed, value in found.items()}


def _words(found: Estimate | None, factor: float, digits: int, *, star: bool = False) -> str:
    if found is None:
        return ""
    mean = f"{factor * found.mean:{'+' if star else ''}.{digits}f}"
    if found.half_width is None:
        return mean
    return f"{mean} ± {factor * found.half_width:.{digits}f}" + (
        "*" if star and found.differs_from_zero else ""
    )


def main() -> int:
    settings = tyro.cli(TaskReport, description=__doc__)
    runs = read_runs(settings.runs)
    archive(runs, settings.output / ARCHIVE_NAME)
    wanted = {SEARCH_SEED, *settings.seeds}
    records = {
        key: record
        for key, record in runs.items()
        if not settings.seeds or record["run"]["seed"] in wanted
    }
    print(report(records, settings.output, settings.rates))
    return 0


if __name__ == "__main__":
    sys.exit(main())
