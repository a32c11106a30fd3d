"""Progress in a log file: lines with an estimate, not too many; Ctrl-C between two reports."""

from __future__ import annotations

import io
import signal

import pytest
from rich.console import Console

from cntlora_core.runtime import console
from cntlora_core.runtime.console import Cancelled, ConsoleReporter


def test_a_log_gets_lines_with_an_estimate_and_notes(monkeypatch):
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    reporter = ConsoleReporter(Console(file=stream, force_terminal=False))
    for step in range(1, 31):
        reporter("training", step, 30, {"loss": 0.5})
    reporter("notes", 0, 0, {"note": "one photo was skipped"})
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "• one photo was skipped"
    assert lines[-2].startswith("training: 30 of 30")
    assert 5 <= len(lines) <= 12
    assert all("s left, loss 0.5000" in line for line in lines[:-2])


@pytest.fixture
def logged(monkeypatch):
    """A reporter whose clock goes on by 10 s at each look, and what it has written."""
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    return ConsoleReporter(Console(file=stream, force_terminal=False)), stream


def test_a_stage_that_is_done_again_is_estimated_anew(logged):
    reporter, stream = logged
    for step in range(101):
        reporter("training", step, 100, {"loss": 9.0})
    for step in range(3):
        reporter("training", step, 100, {"loss": 1.0})
    line = stream.getvalue().splitlines()[-1]
    assert line == "training: 2 of 100, 30 s, 1470 s left, loss 1.0000"


def test_a_resumed_run_is_estimated_from_where_it_goes_on(logged):
    reporter, stream = logged
    reporter("training", 81, 100, {})
    reporter("training", 82, 100, {})
    assert stream.getvalue().splitlines()[-1] == "training: 82 of 100, 20 s, 180 s left"


def test_ctrl_c_is_raised_at_the_next_report_and_the_handler_restored():
    before = signal.getsignal(signal.SIGINT)
    reporter = ConsoleReporter(Console(file=io.StringIO()))
    with reporter.running():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Cancelled):
            reporter("training", 1, 2, {})
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
