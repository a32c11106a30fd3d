"""Many tasks on few processes: each process does one after the other; one that dies is replaced."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from cntlora_core.runtime.progress import Reporter
from cntlora_core.runtime.reading import reason

Work = Callable[[Any, Reporter], None]
_QUIET_AND_ALONE = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
_TELL_SECONDS = 0.5
_SECONDS_TO_END = 10.0
_TOLD = ("training", "generating class images")


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes:
        task: Its number among the tasks.
        error: What went wrong, in words; None where nothing did.
        traceback: Where; empty where that is not known.
    """

    task: int
    error: str | None = None
    traceback: str = ""


def guarded(work: Work, task: Any, number: int, reporter: Reporter) -> Outcome:
    """Do a task; what it raises becomes words."""
    try:
        work(task, reporter)
    except Exception as error:
        words = f"{type(error).__name__}: {reason(error)}"
        return Outcome(number, words, "".join(traceback.format_exception(error)))
    return Outcome(number)


class ProcessPool:
    """Processes of one thread each, for as long as the block lasts; they start when needed.

    Args:
        workers: How many at most.
    """

    def __init__(self, workers: int) -> None:
        self._slots = list(range(workers))
        self._idle: list[_Worker] = []
        self._busy: dict[Any, _Worker] = {}

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        workers = (*self._idle, *self._busy.values())
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.end()

    def run(
        self, work: Work, tasks: Sequence[Any], reporter: Reporter, stage: str
    ) -> Iterator[Outcome]:
        """Do all tasks; yields how each ended, as they end.

        A task that raises, or whose process is killed, does not keep the others from being done.

        Args:
            work: ``work(task, reporter)``, a function of a module.
            tasks: What can be pickled.
            reporter: Told of the tasks done; what it raises is to end the block.
            stage: What is done, for the reporter.
        """
        waiting = list(range(len(tasks)))[::-1]
        fractions: dict[int, float] = {}
        done = 0
        while waiting or self._busy:
            while waiting and (self._idle or self._slots):
                worker = self._idle.pop() if self._idle else _Worker(self._slots.pop(0))
                self._busy[worker.connection] = worker
                number = waiting.pop()
                worker.give(work, number, tasks[number])
            for connection in wait(list(self._busy), timeout=_TELL_SECONDS):
                worker = self._busy[connection]
                said = worker.hear()
                if not isinstance(said, Outcome):
                    fractions[worker.task] = said
                    continue
                fractions.pop(worker.task, None)
                done += 1
                del self._busy[connection]
                if worker.dead:
                    worker.end()
                    self._slots.append(worker.slot)
                else:
                    self._idle.append(worker)
                yield said
            reporter(stage, done, len(tasks), {"within": sum(fractions.values())})


class _Worker:
    """A process, and the task that it was given last."""

    def __init__(self, slot: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.slot, self.task, self.dead = slot, -1, False
        self.process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
        with _environment(_QUIET_AND_ALONE | _one_gpu(slot)):
            self.process.start()
        theirs.close()

    def give(self, work: Work, number: int, task: Any) -> None:
        self.task = number
        with suppress(OSError):  # it has died: hear() will tell
            self.connection.send((work, number, task))

    def hear(self) -> Outcome | float:
        """How its task ended, or how much of it is done."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.dead = True
            self.process.join()
            code = self.process.exitcode or 0
            how = f"by signal {-code}" if code < 0 else f"with status {code}"
            return Outcome(self.task, f"its process was ended {how}")

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join(_SECONDS_TO_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(connection: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C ends
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a state is saved
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    while True:
        try:
            work, number, task = connection.recv()
            connection.send(guarded(work, task, number, _teller(connection, parent)))
        except (EOFError, OSError):
            return


def _teller(connection: Connection, parent: int) -> Reporter:
    """Tells the parent how far a task is; ends this process when the parent is no more."""
    told = 0.0

    def tell(stage: str, done: int, total: int, values: dict[str, Any]) -> None:
        nonlocal told
        if os.getppid() != parent:
            os._exit(1)
        if stage in _TOLD and total and time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            connection.send(done / total)

    return tell


def _one_gpu(slot: int) -> dict[str, str]:
    import torch

    count = torch.cuda.device_count()
    if count < 2 or "CUDA_VISIBLE_DEVICES" in os.environ:
        return {}
    return {"CUDA_VISIBLE_DEVICES": str(slot % count)}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_on_ray(
    work: Work, tasks: Sequence[Any], address: str, reporter: Reporter, stage: str
) -> Iterator[Outcome]:
    """As :meth:`ProcessPool.run`, as remote tasks of one core each on a Ray cluster.

    Args:
        work: Must be importable on every node, and see the same files.
        tasks: What can be pickled.
        address: Of the cluster; ``local`` starts one here, ``auto`` finds the one that runs here.
        reporter: As above.
        stage: As above.

    Raises:
        ImportError: without Ray.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("--ray needs Ray: pip install 'cntlora[bench]'") from error
    if not ray.is_initialized():
        ray.init(address=address, runtime_env={"env_vars": _QUIET_AND_ALONE}, log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_guarded_silently)
    waiting = {remote.remote(work, task, number): number for number, task in enumerate(tasks)}
    done = 0
    try:
        while waiting:
            reporter(stage, done, len(tasks), {})
            ready, _ = ray.wait(list(waiting), timeout=_TELL_SECONDS)
            for reference in ready:
                number = waiting.pop(reference)
                try:
                    outcome = ray.get(reference)
                except Exception as error:  # the task's process or its node is no more
                    outcome = Outcome(number, f"{type(error).__name__}: {reason(error)}")
                done += 1
                yield outcome
        reporter(stage, done, len(tasks), {})
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _guarded_silently(work: Work, task: Any, number: int) -> Outcome:
    from cntlora_core.runtime.progress import silent

    return guarded(work, task, number, silent)
