"""The experiments on accuracy: each is a list of independent runs and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from cntlora_core.benchmark.lava.finetuning import METHODS, Task, accuracy, adapt, finetune
from cntlora_core.benchmark.lava.settings import ExperimentName, LavaBenchmark, TaskName

Cell = dict[str, Any]
"""One run: JSON values that say which; ``model`` names its network."""


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        name: What it is called by.
        title: One line.
        cells: All its runs.
        run: Does one of them.
        summarise: Makes rows of the runs that there are; each run comes with its cell's values.
    """

    name: ExperimentName
    title: str
    cells: Callable[[LavaBenchmark], list[Cell]]
    run: Callable[[Cell, Task], dict[str, Any]]
    summarise: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def key_of(cell: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in cell.items())


def grid(**values: Iterable[Any]) -> list[Cell]:
    """All combinations, the last name's values running fastest."""
    cells: list[Cell] = [{}]
    for name, options in values.items():
        cells = [{**cell, name: option} for cell in cells for option in options]
    return cells


def some_models(settings: LavaBenchmark) -> tuple[TaskName, ...]:
    return (*settings.models[:3], *(("minilm",) if settings.text else ()))


def fine_tuned(adapted: Any, task: Task, cell: Cell, **more: Any) -> dict[str, Any]:
    """Fine-tune, and say how good it became: on the validation and the test pictures."""
    data = task.data(cell["seed"])
    losses = finetune(adapted, data, task.settings, cell["rate"], cell["seed"])
    trained, whole = adapted.counts()
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "chosen_by": accuracy(adapted.network, data.validation),
        "accuracy": accuracy(adapted.network, data.test),
        "last_loss": mean(last),
        "trained": trained,
        "share": trained / whole,
        "rank": adapted.rank,
        **more,
    }


def at_best_learning_rates(runs: list[dict[str, Any]], by: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each group of runs, at the learning rate with the best validation accuracy.

    Args:
        runs: Runs of several seeds and learning rates.
        by: What tells groups apart.

    Returns:
        ``accuracy`` and ``spread`` (standard deviation over seeds) of the chosen learning rate,
        ``by_seed``, and what is the same for all of a group.
    """
    groups: dict[tuple[Any, ...], dict[float, list[dict[str, Any]]]] = {}
    for run in runs:
        group = groups.setdefault(tuple(run[name] for name in by), {})
        group.setdefault(run["rate"], []).append(run)
    rows = []
    for values, by_learning_rate in groups.items():
        learning_rate = max(
            by_learning_rate,
            key=lambda own: mean(run["chosen_by"] for run in by_learning_rate[own]),
        )
        best = by_learning_rate[learning_rate]
        found = [run["accuracy"] for run in best]
        row = dict(zip(by, values, strict=True)) | {
            "rate": learning_rate,
            "accuracy": mean(found),
            "spread": stdev(found) if len(found) > 1 else 0.0,
            "seeds": len(found),
            "by_seed": {str(run["seed"]): run["accuracy"] for run in best},
            "last_loss": mean(run["last_loss"] for run in best),
            "trained": best[0]["trained"],
            "share": best[0]["share"],
            "rank": best[0]["rank"],
        }
        if "curve" in best[0]:
            row["curve"] = [
                [points[0][0], mean(point[1] for point in points)]
                for points in zip(*(run["curve"] for run in best))
            ]
        rows.append(row)
    return rows


def against(runs: list[dict[str, Any]], key: str, reference: str) -> list[dict[str, Any]]:
    """The rows of :func:`at_best_learning_rates` by network and ``key``, each compared with one of
    them.

    Returns:
        Rows with ``gain``, the mean of the accuracy less the reference's of the same seed, and
        ``gain_error``, its standard error over the seeds.
    """
    rows = at_best_learning_rates(runs, ("model", key))
    compared_with = {row["model"]: row["by_seed"] for row in rows if row[key] == reference}
    for row in rows:
        other = compared_with[row["model"]]
        gains = [row["by_seed"][seed] - accuracy for seed, accuracy in other.items()]
        row["gain"] = mean(gains)
        row["gain_error"] = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return rows


# Reshape-free against reshape-involved: table 1, table 5 and figure 2 of the paper.


def _structure_cells(settings: LavaBenchmark) -> list[Cell]:
    return grid(
        model=settings.models, seed=range(settings.seeds), method=METHODS, rate=settings.rates
    )


def _run_structure(cell: Cell, task: Task) -> dict[str, Any]:
    network = task.fresh(cell["seed"])
    data = task.data(cell["seed"])
    before = accuracy(network, data.test)
    return fine_tuned(adapt(network, cell["method"], task.settings), task, cell, before=before)


# Which factor the term acts on: figure 11.

_FACTORS = ("none", "U", "V", "YX", "UV", "UVYX")


def _factor_cells(settings: LavaBenchmark) -> list[Cell]:
    return grid(
        model=some_models(settings),
        seed=range(settings.seeds),
        factors=_FACTORS,
        rate=settings.rates,
    )


def _run_factors(cell: Cell, task: Task) -> dict[str, Any]:
    chosen = [] if cell["factors"] == "none" else list(cell["factors"])
    network = task.fresh(cell["seed"])
    # The paper's strength for this comparison.
    adapted = adapt(network, "lava_term", task.settings, strength=0.025, orthogonal_factors=chosen)
    return fine_tuned(adapted, task, cell)


# How much the strength of the term and the rank matter: figure 6.

_STRENGTHS = tuple(2.0**power for power in range(-6, 7, 2))
_RANKS = (3, 6, 12, 24)


def _robustness_cells(settings: LavaBenchmark) -> list[Cell]:
    models, seeds = some_models(settings), range(settings.seeds)
    strengths, ranks = (_STRENGTHS, _RANKS) if not settings.quick else (_STRENGTHS[::6], _RANKS[:1])
    varied = [
        ("strength", 0.0),
        *(("strength", s) for s in strengths),
        *(("rank", r) for r in ranks),
    ]
    return [
        {"model": m, "seed": s, "varied": what, "value": value, "rate": learning_rate}
        for m in models
        for s in seeds
        for what, value in varied
        for learning_rate in settings.rates
    ]


def _run_robustness(cell: Cell, task: Task) -> dict[str, Any]:
    network, settings = task.fresh(cell["seed"]), task.settings
    if cell["varied"] == "rank":
        adapted = adapt(network, "lava_term", settings, rank=int(cell["value"]))
    else:  # in units of the base strength
        strength = cell["value"] * settings.orthogonality
        adapted = adapt(network, "lava_term", settings, strength=strength)
    return fine_tuned(adapted, task, cell)


# Plain initialisations against CNTLoRA's closed forms.

_INITIALIZATIONS = ("orthogonal", "lora", "cross", "self", "shift")


def _initialization_cells(settings: LavaBenchmark) -> list[Cell]:
    return grid(
        model=some_models(settings),
        seed=range(settings.seeds),
        start=_INITIALIZATIONS,
        rate=settings.rates,
    )


def _run_initialization(cell: Cell, task: Task) -> dict[str, Any]:
    from cntlora_core.benchmark.lava.initializations import initialized

    settings, data = task.settings, task.data(cell["seed"])
    adapted, found = initialized(
        task.fresh(cell["seed"]), cell["start"], data, settings, cell["seed"]
    )
    every = max(1, settings.steps // 15)
    curve: list[tuple[int, float]] = []

    def look(step: int) -> None:
        if step % every == 0:
            curve.append((step, accuracy(adapted.network, data.validation)))

    losses = finetune(adapted, data, settings, cell["rate"], cell["seed"], at_step=look)
    trained, whole = adapted.counts()
    return {
        "chosen_by": mean(value for _, value in curve),  # the area under the curve: how fast
        "accuracy": accuracy(adapted.network, data.test),
        "last_loss": mean(losses[-max(1, len(losses) // 10) :]),
        "trained": trained,
        "share": trained / whole,
        "rank": adapted.rank,
        "curve": curve,
        **found,
    }


def _summarise_initializations(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each learning rate for itself, since which initialisation is the faster may depend on it.

    ``course_mean`` is the mean accuracy over the course, on the validation pictures.
    """
    rows = [
        row
        for learning_rate in dict.fromkeys(run["rate"] for run in runs)
        for row in against(
            [run for run in runs if run["rate"] == learning_rate], "start", "orthogonal"
        )
    ]
    for row in rows:
        row["course_mean"] = mean(value for _, value in row["curve"])
    models = list(dict.fromkeys(run["model"] for run in runs))
    return sorted(rows, key=lambda row: models.index(row["model"]))


EXPERIMENTS: dict[ExperimentName, Experiment] = {
    "structure": Experiment(
        "structure",
        "reshape-free against reshape-involved",
        _structure_cells,
        _run_structure,
        lambda runs: against(runs, "method", "lora"),
    ),
    "factors": Experiment(
        "factors",
        "the factor that the orthogonality term acts on",
        _factor_cells,
        _run_factors,
        lambda runs: against(runs, "factors", "none"),
    ),
    "robustness": Experiment(
        "robustness",
        "the term's strength, and the rank",
        _robustness_cells,
        _run_robustness,
        lambda runs: at_best_learning_rates(runs, ("model", "varied", "value")),
    ),
    "starts": Experiment(
        "starts",
        "plain initialisations and closed forms",
        _initialization_cells,
        _run_initialization,
        _summarise_initializations,
    ),
}
