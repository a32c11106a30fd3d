"""From a model and its batches to second moments, through forward hooks that are always undone."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cntlora_core.attachment import AttachmentPoint
from cntlora_core.moments import Moment, SecondMoment


@dataclass(frozen=True)
class CapturedMoments:
    """Second moments of the inputs of attachment points.

    Attributes:
        moments: One per distinct input.
        input_of: For each attachment point's name, the index into ``moments``.
    """

    moments: tuple[Moment, ...]
    input_of: dict[str, int]

    def of(self, name: str) -> Moment:
        return self.moments[self.input_of[name]]


@dataclass(frozen=True)
class PartialMoments:
    """Running sums of what has been read so far, not yet divided by the number of rows.

    Attributes:
        leaders: For each attachment point that was called, the point whose sum it shares (itself,
            where it has one of its own).
        sums: By leader.
    """

    leaders: dict[str, str] = field(default_factory=dict)
    sums: dict[str, SecondMoment] = field(default_factory=dict)

    def finish(self, points: Sequence[AttachmentPoint]) -> CapturedMoments:
        """The moments, which take the sums over; all zeros for points that were not called."""
        moments, index = [], {}
        for point in points:
            if self.leaders.get(point.name, point.name) == point.name:
                index[point.name] = len(moments)
                fitter = self.sums.pop(point.name, None)
                moments.append((fitter or SecondMoment(point.in_features)).result())
        return CapturedMoments(
            tuple(moments), {p.name: index[self.leaders.get(p.name, p.name)] for p in points}
        )


class SharedInputError(RuntimeError):
    """Two attachment points that shared their input at first did not share it later."""


class MomentCapture:
    """Sums up what attachment points read; made by :func:`capture_moments`.

    Points that read the very same tensor share one sum. Which do is seen in the first batch, by
    comparing with tensors that are still alive: a bare ``data_ptr`` is reused after a free.
    """

    def __init__(self, points: Sequence[AttachmentPoint], share_inputs: bool = True) -> None:
        self._points = {point.name: point for point in points}
        self._share = share_inputs
        self._sums: dict[str, SecondMoment] = {}
        self._leader: dict[str, str] = {}
        self._late: set[str] = set()  # called first in a later batch: their rows are others
        self._alive: list[tuple[weakref.ref[Tensor], int, str]] = []
        self._calls: dict[str, int] = {}
        self._batch = 0
        self._mask: Tensor | None = None

    def set_mask(self, mask: Tensor | None) -> None:
        """Say which tokens of the coming forward pass count.

        Args:
            mask: (batch, tokens), true or 1 where a token is no padding; None counts all. It
                applies to inputs of shape (batch, tokens, ...) and (batch * tokens, d_in).

        Raises:
            ValueError: for another shape, or a mask with values other than 0 and 1.
        """
        if mask is None:
            self._mask = None
            return
        if mask.ndim != 2:
            raise ValueError(f"a padding mask is (batch, tokens), got shape {tuple(mask.shape)}")
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(
                "a padding mask holds 1 where a token counts and 0 where it is padding, got values "
                f"from {mask.min().item():g} to {mask.max().item():g}"
            )
        mask = mask.bool()
        self._mask = None if mask.all() else mask  # nothing to leave out: no copies of the rest

    def end_batch(self) -> None:
        """To be called after each forward pass.

        Raises:
            SharedInputError: if points that were taken to share an input do not.
        """
        for name, leader in self._leader.items():
            if self._calls.get(name, 0) != self._calls.get(leader, 0):
                raise SharedInputError(
                    f"{name!r} and {leader!r} read the same input at first but are not called "
                    "alike: capture with share_inputs=False"
                )
        self._alive.clear()
        self._calls.clear()
        self._batch += 1

    def partial(self) -> PartialMoments:
        """The sums so far, which are handed over: the capture starts from nothing again."""
        partial = PartialMoments(dict(self._leader), self._sums)
        self._sums = {}
        return partial

    def result(self) -> CapturedMoments:
        """The moments so far, one for each distinct input; the sums start from nothing again."""
        return self.partial().finish(list(self._points.values()))

    def see(self, name: str, x: Tensor) -> None:
        """Take the input ``x`` of the attachment point ``name`` into account."""
        self._calls[name] = self._calls.get(name, 0) + 1
        known = self._leader.get(name)
        if known is None and self._batch > 0:
            self._late.add(name)
        leader = name if name in self._late else self._leader_of(name, x)
        if known is None:
            self._leader[name] = leader
        elif known != leader:
            raise SharedInputError(
                f"{name!r} shared its input with {known!r} at first and with {leader!r} in batch "
                f"{self._batch}: capture with share_inputs=False"
            )
        if leader != name:
            return
        point = self._points[name]
        if self._mask is not None:
            x = point.without_padding(x, self._mask)
        fitter = self._sums.setdefault(name, SecondMoment(point.in_features))
        try:
            for rows in point.input_rows(x):
                fitter.update(rows)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"the input of {name!r} is not finite in batch {self._batch}, or too large for its "
                "squares to be: look for NaN or infinite values in that batch, or run the model in "
                "float32 or bfloat16"
            ) from error

    def _leader_of(self, name: str, x: Tensor) -> str:
        if not self._share:
            return name
        reading = self._points[name].reading
        for reference, version, leader in self._alive:
            other = reference()
            if (
                other is not None
                and version == _version(x)
                and _same_view(x, other)
                and self._points[leader].reading == reading
            ):
                return leader
        self._alive.append((weakref.ref(x), _version(x), name))
        return name


def _version(x: Tensor) -> int:
    """How often x was changed in place; inference tensors do not count."""
    return 0 if x.is_inference() else x._version


def _same_view(x: Tensor, other: Tensor) -> bool:
    return x is other or (
        x.data_ptr() == other.data_ptr()
        and x.shape == other.shape
        and x.stride() == other.stride()
        and x.dtype == other.dtype
    )


@contextmanager
def capture_moments(
    points: Sequence[AttachmentPoint], *, share_inputs: bool = True
) -> Iterator[MomentCapture]:
    """Hook the points; forward passes inside the block are summed up, without gradients.

    Example:
        >>> with capture_moments(points) as capture:
        ...     for batch in batches:
        ...         model(**batch)
        ...         capture.end_batch()
        >>> moments = capture.result()
    """
    capture = MomentCapture(points, share_inputs)

    def hook_of(name: str):
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            capture.see(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [
        p.module.register_forward_pre_hook(hook_of(p.name), with_kwargs=True) for p in points
    ]
    try:
        # Tensors of inference mode have no version counter to tell an in-place change by.
        with torch.inference_mode(False), torch.no_grad():
            yield capture
    finally:
        for handle in handles:
            handle.remove()
