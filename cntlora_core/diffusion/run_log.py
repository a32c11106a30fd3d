"""What a run under way keeps for its record: notes for people, and seconds by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from cntlora_core.runtime.processes import Processes
from cntlora_core.runtime.progress import Reporter


@dataclass
class RunLog:
    """Notes and timings of a run under way, and what its end undoes."""

    reporter: Reporter
    processes: Processes
    end: ExitStack = field(default_factory=ExitStack)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, *texts: str) -> None:
        for text in texts:
            self.notes.append(text)
            self.reporter("notes", 0, 0, {"note": text})

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
