"""The file of a run's dynamics: one JSON object a line, appended as the training goes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cntlora_core.runtime.files import atomic_write
from cntlora_core.runtime.reading import reading

FILE_NAME = "dynamics.jsonl"
Record = dict[str, Any]
"""What is known of a step: see :class:`.DynamicsRecorder`."""


class DynamicsLog:
    """Appends records to a file, a line each.

    A run that goes on from a step keeps the records up to it: those after it, and a line that a
    kill cut short, are removed. A run that begins replaces the file.

    Args:
        path: Of the file; missing folders are created.
        step: How many steps were done before.

    Raises:
        ValueError: if the file to go on with is damaged.
        OSError: as :func:`.atomic_write`.
    """

    def __init__(self, path: str | Path, step: int = 0) -> None:
        self.path = Path(path)
        before = read_dynamics(self.path) if step and self.path.exists() else []
        kept = [record for record in before if record["step"] <= step]
        with atomic_write(self.path) as temporary:
            temporary.write_text(_lines(kept), "utf-8")

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records to the end of the file, whole lines at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(records))


def read_dynamics(path: str | Path) -> list[Record]:
    """The records of a file; a last line without an end is left out, as a kill may leave one.

    Raises:
        ValueError: if the file is damaged, naming it.
        FileNotFoundError: if there is none.
    """
    with reading(path, "training dynamics"):
        text = Path(path).read_text("utf-8")
        records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        for record in records:
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("a line is no record of a step")
        return records


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
