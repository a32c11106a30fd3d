"""Peak of a process's resident memory."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


def reset_peak() -> None:
    """Forget the peak of this process's resident memory so far, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(process: str = "self") -> int:
    """Peak resident memory of a process since `reset_peak`; elsewhere than on Linux, of all time.

    Raises:
        OSError: there is no such process, or its memory cannot be read.
    """
    status = Path(f"/proc/{process}/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if process != "self":
        raise OSError(f"the memory of process {process} cannot be read")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
