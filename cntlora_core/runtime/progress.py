"""How long work tells what it does: one callback; who draws it is the caller's business."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Reporter = Callable[[str, int, int, dict[str, Any]], None]
"""``reporter(stage, done, total, values)``, called often by the thread that works.

``stage`` is a phrase for a person, ``values`` what there is to show: loss, image or note;
``within`` is what unfinished items add to ``done``.
An exception raised here ends the work cleanly at that point.
"""


def silent(stage: str, done: int, total: int, values: dict[str, Any]) -> None:
    """A reporter that says nothing."""


def stage_progress(reporter: Reporter, stage: str) -> Callable[[int, int], None]:
    """The ``(done, total)`` callback of one stage."""
    return lambda done, total: reporter(stage, done, total, {})
