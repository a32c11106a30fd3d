"""Several processes of this machine that train together: started, watched, and ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from cntlora_core.diffusion.settings import TrainingSettings
from cntlora_core.runtime.console import say

SECONDS_TO_END = 30.0
"""How long the others have to end by themselves once one process has failed."""

_SECONDS_BETWEEN_LOOKS = 0.1


def check_processes(count: int, training: TrainingSettings) -> None:
    """Refuse a number of processes that cannot work, before any is started.

    Raises:
        ValueError: naming what is too few: GPUs, or photos in a step.
    """
    from cntlora_core.diffusion.batches import require_shareable
    from cntlora_core.runtime.processes import require_devices

    if count < 1:
        raise ValueError(f"processes must be at least 1, got {count}")
    require_devices(count, training.device)
    require_shareable(training, count)


def run_together(arguments: Sequence[str], count: int, console: Console) -> int:
    """Run ``cntlora train`` in several processes.

    Returns the first one's exit status, or where it is 0 that of another.

    The processes are in sessions of their own, so that Ctrl-C reaches them once, from here.

    Args:
        arguments: Of the command line, without the command's name.
        count: How many processes.
        console: Where a process that fails is named.
    """
    port = _free_port()
    children = [_start(arguments, rank, count, port) for rank in range(count)]

    def pass_on(number: int, _frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    with _signals(pass_on):
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children):
                _end(children)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    codes = [child.wait() for child in children]
    for rank, code in enumerate(codes[1:], 1):  # the first says itself what is wrong
        if code not in (0, codes[0]):
            say(console, f"process {rank} ended with status {code}", "red")
    failed = codes[0] or next((code for code in codes if code), 0)
    return failed if failed >= 0 else 128 - failed


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for processes that end because another one has, and kill those that do not."""
    deadline = time.monotonic() + SECONDS_TO_END
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()


def _start(arguments: Sequence[str], rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    # Processes on one CPU share its cores.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    command = [sys.executable, "-m", "cntlora_core.commands.train", *arguments]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def _signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
