"""Train every method on the study's problems: what is missing of a grid, one process a run.

    python -m cntlora_core.benchmark.tasks.study --problem glosses --output runs/tasks
    python -m cntlora_core.benchmark.tasks.report runs/tasks --output docs/experiments

First every method is trained at each of its learning rates, with the least data and a seed that the
comparison leaves out. Then come the comparison's seeds, at the method's own best learning rate and,
with the least data, at the source's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from cntlora_core.benchmark.convergence.pool import ProcessPool
from cntlora_core.benchmark.tasks.problems import PROBLEMS, Folders
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.dynamics.callback import DynamicsCallback
from cntlora_core.dynamics.log import FILE_NAME
from cntlora_core.runtime.console import ConsoleReporter
from cntlora_core.runtime.files import finite_or_null, write_json_atomic
from cntlora_core.runtime.flags import UserPath
from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.runtime.reading import read_json_object
from cntlora_core.tasks.run import run_task
from cntlora_core.tasks.settings import TaskSettings, planned

ProblemName = Literal["glosses", "style", "digits", "subject", "captions"]
SEARCH_SEED = 103
"""Another subject, too, than those of the first seeds."""
RATES = (3e-4, 1e-3, 1.7e-3, 3e-3)
LOW, HIGH = (3e-5, 1e-4, 3e-4, 1e-3), (1e-3, 3e-3, 1e-2, 3e-2)
RECORD_NAME, ARCHIVE_NAME = "run.json", "tasks-runs.json"


@dataclass(frozen=True)
class Variant:
    """A method as it stands in the tables.

    Attributes:
        method: Of the registry.
        settings: What the recipe is told besides.
        cntlora: What the closed form is told besides.
        rates: Learning rates that are searched.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    cntlora: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = RATES


_QR = {"factorization": "qr"}
VARIANTS: dict[str, Variant] = {
    **{
        name: Variant(name)
        for name in ("lora", "pissa", "olora", "eva", "corda_ipm", "lora_ga", "dora", "adalora")
    },
    "pissa_niter_16": Variant("pissa_niter_16"),
    "loftq": Variant("loftq"),
    "lora+": Variant("lora", {"lora_plus": 16.0}, rates=LOW),
    "vera": Variant("vera", rates=HIGH),
    "bitfit": Variant("bitfit", rates=HIGH),
    "full": Variant("full", rates=LOW),
    **{name: Variant(name) for name in ("cross", "self", "shift")},
    **{f"{name}-qr": Variant(name, cntlora=_QR) for name in ("cross", "self", "shift")},
}
METHODS = tuple(VARIANTS)
VARIANTS |= {
    f"{name}, head 0.003": Variant(name, {"head_learning_rate": 3e-3})
    for name in ("lora", "eva", "cross", "shift")
}


@dataclass(frozen=True)
class TaskStudy:
    """What is run.

    Attributes:
        output: Folder of the runs; those that it holds are not run again, nor those of a
            ``tasks-runs.json`` in it.
        problem: glosses, style, digits, subject or captions.
        methods: Names of the table; default: all whose head has no learning rate of its own.
        seeds: Of the comparison.
        sizes: Numbers of training samples; default: all of the problem's.
        rates: Learning rates of the comparison, without a search; default: the source's, and each
            method's best one after a search.
        drawings: ``node_modules`` with the emoji, for style and captions.
        llava: Folder of the small LLaVA, for subject and captions.
        workers: Runs at once, one process and one thread each.
    """

    output: UserPath
    problem: ProblemName = "glosses"
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    drawings: UserPath | None = None
    llava: UserPath | None = None
    workers: int = 2


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        problem: Of the table of problems.
        name: Of the table of methods.
        size: Number of training samples.
        learning_rate: At its highest.
        seed: Of data, head, order and initialisation.
    """

    problem: str
    name: str
    size: int
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        """The name of its folder: a hash of all that determines it."""
        problem, variant = PROBLEMS[self.problem], VARIANTS[self.name]
        content = [
            dataclasses.asdict(self),
            dataclasses.asdict(problem.preset),
            problem.sizes[self.size],
            dataclasses.asdict(variant) | {"rates": None},
        ]
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def train(task: tuple[Run, Path, Folders], reporter: Reporter = silent) -> None:
    """Do one run; its folder keeps metrics, curves and dynamics alone.

    Args:
        task: The run, the study's output, and the folders of the data.
        reporter: Told of the steps.
    """
    run, output, folders = task
    problem, variant = PROBLEMS[run.problem], VARIANTS[run.name]
    steps, place = problem.sizes[run.size], output / "runs" / run.key
    at_end = run.seed == SEARCH_SEED or problem.dynamics  # measured there alone
    settings = TaskSettings(
        output=str(place / "work"),
        method=variant.method,
        learning_rate=run.learning_rate,
        steps=steps,
        eval_every=steps + 1 if at_end else math.ceil(steps / 3),
        eval_batch_size=64,
        keep_checkpoints=0,
        init_batches=16,
        seed=run.seed,
        device="cpu",
        overwrite=True,
        cntlora=CNTLoRAConfig(**variant.cntlora),
        **variant.settings,
    )
    plan = planned(settings, problem.preset)
    recorder = DynamicsCallback(place / FILE_NAME, plot=False)
    callbacks = (recorder,) if problem.dynamics else ()
    made = problem.make(plan, run.size, run.seed, folders)
    result = run_task(made, plan, reporter, callbacks=callbacks)
    record = read_json_object(result.folder / "metrics.json", "a run")
    curves = result.curves.to_dict()
    done = record | {"run": vars(run), "curves": finite_or_null(curves)}
    write_json_atomic(place / RECORD_NAME, done)
    shutil.rmtree(place / "work")


def best_rate(runs: Mapping[str, Mapping[str, Any]], problem: str, name: str, size: int) -> float:
    """The learning rate of the best validation metric at the end of the search; of equal ones, that
    of the least loss.

    Args:
        runs: Records by key.
        problem: Its name.
        name: Of the method.
        size: At which it was searched.
    """
    found = {}
    for rate in VARIANTS[name].rates:
        record = runs[Run(problem, name, size, rate, SEARCH_SEED).key]
        metrics = record["metrics"]["validation"]
        found[rate] = tuple(
            -math.inf if value is None else sign * value  # None: it has diverged
            for sign, value in ((1, metrics[record["best"]]), (-1, metrics["loss"]))
        )
    return max(found, key=found.__getitem__)


def search_size(problem: str) -> int:
    """The amount of data at which learning rates are searched: the least."""
    return min(PROBLEMS[problem].sizes)


def read_runs(place: Path) -> dict[str, dict[str, Any]]:
    """The records of all runs by key.

    Args:
        place: A study's folder, or the ``tasks-runs.json`` that its report keeps.
    """
    archive = place if place.is_file() else place / ARCHIVE_NAME
    kept = read_json_object(archive, "the runs of a study") if archive.is_file() else {}
    files = (place / "runs").glob(f"*/{RECORD_NAME}")
    return kept | {path.parent.name: read_json_object(path, "a run") for path in files}


def study(settings: TaskStudy, reporter: Reporter = silent) -> list[str]:
    """Run what is missing; returns what went wrong, one line a run.

    Raises:
        ValueError: for a method or an amount of data that is not in the tables.
    """
    for name in settings.methods:
        if name not in VARIANTS:
            raise ValueError(f"there is no method {name!r}; there are {', '.join(VARIANTS)}")
    sizes, problem = settings.sizes or tuple(PROBLEMS[settings.problem].sizes), settings.problem
    for size in sizes:
        if size not in PROBLEMS[problem].sizes:
            known = ", ".join(map(str, PROBLEMS[problem].sizes))
            raise ValueError(f"{problem} has no size {size}; there are {known}")
    least = search_size(problem)
    search = [
        Run(problem, name, least, rate, SEARCH_SEED)
        for name in settings.methods
        for rate in VARIANTS[name].rates
        if not settings.rates
    ]
    wrong = _run_missing(settings, search, "searching learning rates", reporter)
    done = read_runs(settings.output)
    compared = []
    for seed in settings.seeds:
        for size in sizes:
            for name in settings.methods:
                if any(run.key not in done for run in search if run.name == name):
                    continue
                rates = set(settings.rates)
                if not rates:
                    rates.add(best_rate(done, problem, name, least))
                    if size == least:
                        rates.add(PROBLEMS[problem].preset.learning_rate)
                compared += [Run(problem, name, size, rate, seed) for rate in sorted(rates)]
    return wrong + _run_missing(settings, compared, "comparing", reporter)


def _run_missing(settings: TaskStudy, runs: list[Run], stage: str, reporter: Reporter) -> list[str]:
    done = read_runs(settings.output)
    missing = list(dict.fromkeys(run for run in runs if run.key not in done))
    folders = Folders(settings.drawings, settings.llava)
    tasks = [(run, settings.output, folders) for run in missing]
    wrong = []
    with ProcessPool(settings.workers) as pool:
        for outcome in pool.run(train, tasks, reporter, stage):
            if outcome.error is not None:
                run = missing[outcome.task]
                wrong.append(f"{run.name} at {run.learning_rate:g}: {outcome.error}")
    return wrong


def main() -> int:
    settings = tyro.cli(TaskStudy, description=__doc__)
    reporter = ConsoleReporter()
    try:
        with reporter.running():
            wrong = study(settings, reporter)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in wrong:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
