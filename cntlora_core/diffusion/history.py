"""The record of each training step, fetched from the device now and then.

Reading a number of a GPU waits until the GPU has computed it. Steps therefore leave what they
measure there, and it is fetched for several of them at once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

STEPS_BETWEEN_LOOKS = 10
"""How often what a GPU has measured is fetched; of a CPU it is after every step."""
MEASURED = ("loss", "instance_loss", "prior_loss", "grad_norm")
"""What a step leaves on its device."""


class History:
    """One record per step; those of the last few steps may still lack what the device measured.

    Attributes:
        records: By step; ``loss`` is missing where it has not been fetched.
    """

    def __init__(self, records: Sequence[dict[str, float]] = ()) -> None:
        self.records = list(records)
        self._pending: list[Tensor] = []
        self._since = 0.0

    def begin_step(self) -> None:
        """Take the time, of the first step since the last look."""
        if not self._pending:
            self._since = time.perf_counter()

    def add(self, measured: Tensor, values: Mapping[str, float]) -> None:
        """A step's record.

        Args:
            measured: (4,) as ``MEASURED`` says.
            values: What else is noted of the step.
        """
        self._pending.append(measured)
        self.records.append(dict(values))

    def fetch(self) -> list[tuple[int, dict[str, float]]]:
        """Complete the records of all steps.

        Returns:
            The number of each step that has become complete, and its record.
        """
        if not self._pending:
            return []
        rows = torch.stack(self._pending).tolist()
        seconds = (time.perf_counter() - self._since) / len(rows)
        first = len(self.records) - len(rows)
        self._pending.clear()
        for record, row in zip(self.records[first:], rows, strict=True):
            record.update(zip(MEASURED, row, strict=True), seconds=seconds)
        return list(enumerate(self.records[first:], first + 1))
