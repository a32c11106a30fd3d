"""What attachment points read, handed on as rows while the frozen model runs.

peft's data-driven initialisations hook the model itself and want its inputs in one form: CorDA one
sample a batch, EVA a dictionary with a mask. Here they hook *stand-ins*, which carry a point's
weight and do no work; the rows that the model's own layers read are passed to them. So any kind of
batch will do, padding is left out, and nothing is left behind on the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cntlora_core.activations.capture import RunFn, reading
from cntlora_core.layers.attachment import AttachmentPoint
from cntlora_core.methods.base import InitializationRequest

RowSink = Callable[[str, Tensor], None]
"""``sink(point's name, rows)``; the rows (n, d_in) live until the model goes on."""


class StandIn(nn.Linear):
    """A point's weight under its name, for hooks to find; it returns what it is given."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(1, 1, bias=False)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return input


class RowPasses:
    """Forward passes whose rows go to a sink; what each point gave is counted.

    Attributes:
        seconds: Time in the model itself, without the sink's.
        sink_seconds: Time in the sink.
        batches_done: Batches so far.
        rows: By point, rows so far.
    """

    def __init__(self, request: InitializationRequest, sink: RowSink) -> None:
        self._request, self._sink = request, sink
        self._run: RunFn | None = None
        self.seconds = self.sink_seconds = 0.0
        self.batches_done = 0
        self.rows = {point.name: 0 for point in request.points}

    def run(self, batch: Any) -> None:
        """One forward pass, within :meth:`hooked`."""
        assert self._run is not None
        started, before = time.perf_counter(), self.sink_seconds
        self._run(batch)
        self.seconds += time.perf_counter() - started - (self.sink_seconds - before)
        self.batches_done += 1

    def require_rows(self, method: str) -> None:
        """Refuse data without batches, and a point that no pass has called.

        Raises:
            ValueError: naming it.
        """
        if self.batches_done == 0:
            raise ValueError("there are no batches to read activations from: give at least one")
        unread = [name for name, count in self.rows.items() if count == 0]
        if unread:
            raise ValueError(
                f"method {method!r} needs activations, but {unread[0]!r} read nothing in "
                f"{self.batches_done} batches ({len(unread)} such points): leave it out of "
                "target_modules, or give data that reaches it"
            )

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hook the points; undone after the block, with the model's modes."""
        request = self._request
        with reading(
            request.model,
            request.points,
            self._see,
            forward_fn=request.forward_fn,
            mask_fn=request.mask_fn,
        ) as self._run:
            yield

    def _see(self, point: AttachmentPoint, x: Tensor, mask: Tensor | None) -> None:
        started = time.perf_counter()
        for rows in point.input_rows(x, mask):
            self._take(point.name, rows)
        self.sink_seconds += time.perf_counter() - started

    def _take(self, name: str, rows: Tensor) -> None:
        if not torch.isfinite(rows).all():
            raise FloatingPointError(
                f"the input of {name!r} is not finite in batch {self.batches_done}: look for NaN "
                "or infinite values in that batch, or run the model in float32 or bfloat16"
            )
        self.rows[name] += rows.shape[0]
        self._sink(name, rows)


def repeatable(batches: Iterable[Any] | None, method: str) -> Sequence[Any] | Iterable[Any]:
    """The data as something that can be gone through again; a generator is kept as a list.

    Raises:
        ValueError: where there is none.
    """
    if batches is None:
        raise ValueError(f"method {method!r} reads data: give a dataloader")
    return list(batches) if iter(batches) is batches else batches


def stand_in_names(points: Sequence[AttachmentPoint]) -> dict[str, str]:
    """By point, the name of its stand-in: modules within a container may have no dots."""
    return {point.name: f"point{i}" for i, point in enumerate(points)}
