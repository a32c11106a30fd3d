"""``cntlora bench convergence`` and ``cntlora bench report``: what is asked for, what is run.

Imports nothing slow, for the command's help.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from cntlora_core.runtime.flags import UserPath
from cntlora_core.runtime.progress import Reporter, silent

if TYPE_CHECKING:
    from cntlora_core.benchmark.convergence.grid import Grid
    from cntlora_core.benchmark.convergence.pool import Outcome, Work
    from cntlora_core.benchmark.convergence.run import Task

    _Each = Callable[[Work, list[Task], str], Iterator[Outcome]]


@dataclass(frozen=True)
class ConvergenceBenchmark:
    """Train a grid of settings, method against method, and measure each run on its way.

    What is there already is not run again; the same command goes on where it was interrupted.
    docs/experiments/convergence.md describes the grid file and what is measured.

    Attributes:
        grid: The grid, a TOML file.
        output: Folder for the runs, one JSON file each.
        workers: Runs at once, one process and one thread each; default: the number of GPUs, or of
            cores.
        ray: Address of a Ray cluster to run on instead; local: one that is started here.
    """

    grid: tyro.conf.Positional[UserPath]
    output: UserPath
    workers: int | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.workers is not None and self.ray is not None:
            raise ValueError("give --workers or --ray: a cluster runs as many as it has cores")


@dataclass(frozen=True)
class ConvergenceReport:
    """Tables and plots of the runs in a folder of `cntlora bench convergence`.

    Leaves report.md with its pictures, and report.html, one page that holds everything.

    Attributes:
        folder: The folder.
        baselines: Methods that all others are compared with, at equal settings; `lora@2e-3` is one
            at this learning rate.
        choose_by: By which metric, at the last step, the best learning rate of a method is chosen.
    """

    folder: tyro.conf.Positional[UserPath]
    baselines: tuple[str, ...] = ("lora", "eva")
    choose_by: Literal["loss", "dino", "clip_i"] = "loss"

    def __post_init__(self) -> None:
        for name in self.baselines:
            method, at, rate = name.partition("@")
            if not method or (at and not _is_positive(rate)):
                raise ValueError(
                    f"{name!r} is no baseline: give a method, or a method at a learning rate, "
                    "such as lora@2e-3"
                )


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def run_convergence(settings: ConvergenceBenchmark, reporter: Reporter = silent) -> int:
    """Run what is missing of a grid.

    Returns:
        How many runs there are, all of them done.

    Raises:
        ValueError: for a grid that cannot be run; after all others, if some runs failed.
        BlockingIOError: if another process is at work in the output folder.
    """
    from cntlora_core.benchmark.convergence.grid import read_grid
    from cntlora_core.benchmark.convergence.run import FAILURE_NAME, execute, prepare
    from cntlora_core.benchmark.convergence.subjects import subject_names
    from cntlora_core.diffusion.run_lock import only_run_in
    from cntlora_core.runtime.files import require_writable_folder, write_json_atomic

    grid = read_grid(settings.grid, subject_names)
    folder = require_writable_folder(settings.output).resolve()
    with only_run_in(folder), _doer(settings, grid.bench.device, reporter) as each:
        tasks = tasks_of(grid, folder, reporter)
        missing = [task for task in tasks if not is_done(task)]
        if known := len(tasks) - len(missing):
            note = f"{known} of {len(tasks)} runs are there already"
            reporter("runs", 0, 0, {"note": note})
        classes = first_of_each_class(missing)
        for outcome in each(prepare, classes, "generating class images"):
            if outcome.error is not None:
                note = f"{classes[outcome.task].run.subject}: {outcome.error}"
                reporter("generating class images", 0, 0, {"note": note})
        failed = 0
        for outcome in each(execute, missing, "runs"):
            task = missing[outcome.task]
            if outcome.error is None:
                continue
            failed += 1
            told = {"error": outcome.error, "settings": task.run.values()}
            require_writable_folder(task.place)
            write_json_atomic(
                task.place / FAILURE_NAME, told | {"traceback": outcome.traceback.splitlines()}
            )
            note = f"{describe(task)} failed: {outcome.error}"
            reporter("runs", 0, 0, {"note": note})
    if failed:
        raise ValueError(
            f"{failed} of {len(tasks)} runs failed, all others are done; failed.json in "
            f"{folder / 'runs'} says why. The same command tries them again"
        )
    return len(tasks)


def tasks_of(grid: Grid, folder: Path, reporter: Reporter = silent) -> list[Task]:
    """The tasks of a grid, no two of one key.

    Raises:
        ValueError: for a subject or a model that is not there.
    """
    from cntlora_core import mini
    from cntlora_core.benchmark.convergence.run import Task, run_key
    from cntlora_core.benchmark.convergence.subjects import bench_subject
    from cntlora_core.diffusion.pipeline import model_fingerprint

    bench = grid.bench
    model = model_fingerprint(mini.model_path() if bench.small else bench.model, reporter)
    # Of each subject what tells it apart, not its photos: thirty subjects' fill gigabytes.
    subjects: dict[tuple[Any, ...], tuple[dict[str, Any], str]] = {}
    tasks: dict[str, Task] = {}
    for run in grid.runs:
        place = (run.subject, run.photos)
        if place not in subjects:
            found = bench_subject(bench, run)
            subjects[place] = found.identity(), found.subject.prompts.class_prompt
        identity, class_prompt = subjects[place]
        key = run_key(run, bench, identity, model)
        tasks.setdefault(key, Task(folder, key, run, bench, class_prompt))
    return list(tasks.values())


def is_done(task: Task) -> bool:
    """Whether the run is there as a whole."""
    from cntlora_core.benchmark.convergence.run import RECORD_NAME

    try:
        return json.loads((task.place / RECORD_NAME).read_text("utf-8"))["key"] == task.key
    except (OSError, ValueError, KeyError, TypeError):
        return False


def first_of_each_class(tasks: list[Task]) -> list[Task]:
    """One task for each set of class images that the tasks share."""
    found: dict[str, Task] = {}
    for task in tasks:
        values = task.run.values()
        shared = {k: v for k, v in values.items() if k.startswith(("class_", "num_class_"))}
        shared |= {name: values[name] for name in ("resolution", "precision")}
        found.setdefault(json.dumps([task.class_prompt, shared], sort_keys=True), task)
    return list(found.values())


def describe(task: Task) -> str:
    """A run in a few words."""
    run = task.run
    return (
        f"{run.method}, {run.subject}, seed {run.training.seed}, rank {run.adapter.rank}, "
        f"{run.training.learning_rate:g} ({task.key})"
    )


@contextmanager
def _doer(
    settings: ConvergenceBenchmark, device: str | None, reporter: Reporter
) -> Iterator[_Each]:
    """What does tasks: processes of this machine for the length of the block, or a cluster."""
    from cntlora_core.benchmark.convergence.pool import ProcessPool, run_on_ray

    address = settings.ray
    if address is not None:
        yield lambda work, tasks, stage: run_on_ray(work, tasks, address, reporter, stage)
        return
    with ProcessPool(settings.workers or _default_workers(device)) as pool:
        yield lambda work, tasks, stage: pool.run(work, tasks, reporter, stage)


def _default_workers(device: str | None) -> int:
    import torch

    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    return gpus or os.cpu_count() or 1
