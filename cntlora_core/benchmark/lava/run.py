"""``cntlora bench lava``: runs the experiments, one small piece after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cntlora_core.benchmark.lava.cost import cost_experiment
from cntlora_core.benchmark.lava.dynamics import SPECTRUM, VARIANCE
from cntlora_core.benchmark.lava.experiments import EXPERIMENTS, Experiment, key_of
from cntlora_core.benchmark.lava.finetuning import Task, prepare_task
from cntlora_core.benchmark.lava.plots import plot_experiment
from cntlora_core.benchmark.lava.results import ResultFile
from cntlora_core.benchmark.lava.settings import ExperimentName, LavaBenchmark
from cntlora_core.benchmark.lava.text import prepare_text_task
from cntlora_core.runtime.console import result_console
from cntlora_core.runtime.files import require_writable_folder
from cntlora_core.runtime.progress import Reporter, silent

_NOT_SHOWN = ("steps", "course", "middle", "curve", "by_seed")


def experiment_of(name: ExperimentName, settings: LavaBenchmark) -> Experiment:
    """One experiment by its name."""
    return {
        **EXPERIMENTS,
        "variance": VARIANCE,
        "spectrum": SPECTRUM,
        "cost": cost_experiment(settings),
    }[name]


def run_lava(asked: LavaBenchmark, reporter: Reporter = silent) -> dict[str, list[dict[str, Any]]]:
    """Run what was asked for and is not there yet.

    Each experiment leaves ``<name>.json`` (every run, and the summary) and ``<name>.png``.

    Returns:
        The summaries, rows by experiment.

    Raises:
        ValueError: if the folder holds results of other settings.
        OSError: if it cannot be written to.
    """
    settings = asked.effective()
    folder = require_writable_folder(settings.output)
    tasks: dict[str, Task] = {}
    summaries: dict[str, list[dict[str, Any]]] = {}
    for name in settings.experiments:
        experiment = experiment_of(name, settings)
        summaries[name] = _run_experiment(experiment, settings, folder, tasks, reporter)
    return summaries


def _run_experiment(
    experiment: Experiment,
    settings: LavaBenchmark,
    folder: Path,
    tasks: dict[str, Task],
    reporter: Reporter,
) -> list[dict[str, Any]]:
    results = ResultFile(folder / f"{experiment.name}.json", settings.identity())
    cells = experiment.cells(settings)
    missing = [cell for cell in cells if key_of(cell) not in results.cells]
    known = len(cells) - len(missing)
    if known:
        note = f"{experiment.name}: {known} of {len(cells)} runs are there already"
        reporter(experiment.name, 0, 0, {"note": note})
    for number, cell in enumerate(missing):
        task = None
        if "model" in cell:
            model = cell["model"]
            if model not in tasks:
                if model == "minilm":
                    tasks[model] = prepare_text_task(settings)
                else:
                    pretrained = require_writable_folder(folder / "pretrained")
                    tasks[model] = prepare_task(model, settings, pretrained, reporter)
            task = tasks[model]
        reporter(experiment.name, number, len(missing), {})
        results.keep(key_of(cell), lambda c=cell, t=task: experiment.run(c, t))  # pyright: ignore[reportArgumentType]
        reporter(experiment.name, number + 1, len(missing), {})
    runs = [cell | results.cells[key_of(cell)] for cell in cells]
    rows = experiment.summarise(runs)
    results.write(rows)
    plot_experiment(experiment.name, rows, folder / f"{experiment.name}.png")
    return rows


def show_lava(
    summaries: dict[str, list[dict[str, Any]]],
    settings: LavaBenchmark,
    console: Console | None = None,
) -> None:
    """Print the summaries as tables."""
    console = console or result_console()
    for name, rows in summaries.items():
        title = experiment_of(name, settings).title  # pyright: ignore[reportArgumentType]
        table = Table(title=title, title_justify="left")
        columns = [key for key in rows[0] if key not in _NOT_SHOWN]
        for column in columns:
            table.add_column(column, justify="left" if column in ("model", "method") else "right")
        for row in rows:
            table.add_row(*(_cell(column, row[column]) for column in columns))
        console.print(table)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column in ("accuracy", "spread", "share", "gain", "gain_error", "course_mean"):
        return f"{100 * value:.2f} %"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
