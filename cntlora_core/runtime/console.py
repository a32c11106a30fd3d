"""What a terminal shows of long work: progress bars with time estimates, notes, warnings."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cntlora_core.runtime.reading import printable

SECONDS_BETWEEN_LINES = 10.0
"""How often a log that is no terminal gets a line of progress."""

COLUMNS_OF_A_LOG = 180
"""Width of tables where there is no terminal to ask."""


def result_console() -> Console:
    """Where a command prints its tables: standard output, wide enough where it is no terminal."""
    console = Console(emoji=False)
    return console if console.is_terminal else Console(width=COLUMNS_OF_A_LOG, emoji=False)


def message_console() -> Console:
    """Where a command says what it does and what went wrong: standard error."""
    return Console(stderr=True, emoji=False, markup=False, highlight=False)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Prints a message as it is: no markup, no emoji for ``:b:``, no line breaks of its own.

    A path or a command in it can be copied. Control characters appear as escapes.
    """
    console.print(Text(printable(text), style=style or ""), soft_wrap=True)


class Cancelled(KeyboardInterrupt):
    """The user pressed Ctrl-C, or the process was told to end; raised between two steps of work.

    Attributes:
        signal: SIGINT or SIGTERM.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.signal = number


class ConsoleReporter:
    """A reporter that draws one progress bar for each stage; in a log file, a line now and then.

    Ctrl-C and SIGTERM are taken note of and raised as :class:`Cancelled` at the next report, where
    nothing is half done; a second one interrupts at once.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or message_console()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._last_line = 0.0
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}  # when, and how much was done by then
        self._done: dict[str, int] = {}
        self._losses: list[float] = []
        self._cancelled: int | None = None

    def __call__(self, stage: str, done: int, total: int, values: dict[str, Any]) -> None:
        if self._cancelled is not None:
            raise Cancelled(self._cancelled)
        if "note" in values:
            say(self.console, f"• {values['note']}")
        if total <= 0:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(printable(stage), total=total, info="")
            self._began[stage] = time.monotonic(), max(0, done - 1)
        elif done < self._done[stage]:  # the same again, for another LoRA say
            self._progress.reset(self._tasks[stage])
            self._began[stage], self._losses = (time.monotonic(), max(0, done - 1)), []
        self._done[stage] = done
        info = self._info(values)
        self._progress.update(self._tasks[stage], completed=done, total=total, info=info)
        if not self.console.is_terminal:
            self._line(stage, done, total, info)

    def _line(self, stage: str, done: int, total: int, info: str) -> None:
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES and done < total:
            return
        self._last_line = now
        began, first = self._began[stage]
        elapsed = now - began
        each = elapsed / (done - first) if done > first else 0.0
        left = f", {each * (total - done):.0f} s left" if each and done < total else ""
        comma = ", " if info else ""
        say(self.console, f"{stage}: {done} of {total}, {elapsed:.0f} s{left}{comma}{info}")

    def _info(self, values: dict[str, Any]) -> str:
        if "loss" not in values:
            return ""
        self._losses = [*self._losses[-49:], float(values["loss"])]
        return f"loss {sum(self._losses) / len(self._losses):.4f}"

    def _on_interrupt(self, number: int, _frame: FrameType | None) -> None:
        if self._cancelled is not None:
            raise KeyboardInterrupt
        self._cancelled = number
        say(self.console, "stopping after this step (Ctrl-C again: at once) …")

    @contextmanager
    def running(self) -> Iterator[ConsoleReporter]:
        """Show progress, take Ctrl-C and SIGTERM within the block; both are undone after it."""
        before = {
            number: signal.signal(number, self._on_interrupt)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            with self._progress:
                yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
