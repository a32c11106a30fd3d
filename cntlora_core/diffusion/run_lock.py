"""One run at a time in an output folder."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cntlora_core.runtime.files import write_json_atomic

LOCK_NAME, HOLDER_NAME = ".lock", ".running.json"


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep other processes, and other runs of this one, out of the folder for the block.

    The system takes the lock back when the process ends, however it ends. The lock's empty file
    stays: whoever removed it could let two runs in. On a file system that knows no locks the block
    runs without one.

    Raises:
        BlockingIOError: if another run holds the folder; the message names its process.
        OSError: if the lock's file cannot be opened, or is a symbolic link.
    """
    lock, holder = FileLock(folder / LOCK_NAME, timeout=0), folder / HOLDER_NAME
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"{folder} is in use by another run, {_holder(holder)}: wait for it to end, stop it, "
            "or choose another output folder"
        ) from None
    except NotImplementedError:  # no locks there
        yield
        return
    try:
        write_json_atomic(holder, {"process": os.getpid(), "host": platform.node()})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    """Who has written the note beside the lock."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(path.read_text("utf-8"))
        return f"process {int(found['process'])} on {str(found['host'])!r}"
    return "whose process is not known"
