"""What the layers of a frozen model read, through forward hooks that are always undone.

:func:`reading` serves every data-driven method; :class:`MomentCapture` sums second moments.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cntlora_core.activations.moments import Moment, SecondMoment
from cntlora_core.activations.token_masks import MaskFn, TokenMasks
from cntlora_core.layers.attachment import AttachmentPoint
from cntlora_core.runtime.modes import evaluating
from cntlora_core.runtime.reading import is_finite
from cntlora_core.runtime.reading import reading as reading_file
from cntlora_core.runtime.tensor_file import read_tensors, write_tensors

_FORMAT = "cntlora-moments-1"
ForwardFn = Callable[[nn.Module, Any], Any]
RunFn = Callable[[Any], None]
"""``run(batch)`` is one forward pass."""
SeeFn = Callable[[AttachmentPoint, Tensor, "Tensor | None"], None]
"""``see(point, x, mask)``: what a point's module reads, and which of its tokens count."""


def default_forward(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for mappings, ``model(*batch)`` for sequences, ``model(batch)`` else."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return model(**{k: _to(v, device) for k, v in batch.items()})
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return model(*(_to(v, device) for v in batch))
    return model(_to(batch, device))


def length_of(batches: Iterable[Any]) -> int:
    """How many batches there are; 0 where that is not known."""
    try:
        return len(batches)  # pyright: ignore[reportArgumentType]
    except TypeError:  # also of a DataLoader over an IterableDataset
        return 0


@contextmanager
def reading(
    model: nn.Module,
    points: Sequence[AttachmentPoint],
    see: SeeFn,
    *,
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
) -> Iterator[RunFn]:
    """Within the block, ``run(batch)`` shows what the points read in one forward pass.

    The model runs in eval mode and without gradients; flags and hooks are as before afterwards.

    Args:
        model: What ``forward_fn`` is given.
        points: Attachment points within it.
        see: Called whenever a point's module is called.
        forward_fn: ``forward_fn(model, batch)``; default: :func:`default_forward`.
        mask_fn: Which tokens count: see :meth:`.TokenMasks.begin`.
    """
    masks, forward = TokenMasks(model, mask_fn), forward_fn or default_forward

    def run(batch: Any) -> None:
        masks.begin(batch)
        forward(model, batch)

    def hook_of(point: AttachmentPoint):
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            see(point, x, masks.of(x))

        return hook

    handles = [p.module.register_forward_pre_hook(hook_of(p), with_kwargs=True) for p in points]
    try:
        # Tensors of inference mode have no version counter to tell an in-place change by.
        with masks.followed(), evaluating(model), torch.inference_mode(False), torch.no_grad():
            yield run
    finally:
        for handle in handles:
            handle.remove()


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


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

    def save(self, path: str | Path) -> Path:
        """Write the moments to a safetensors file; returns its path.

        Raises:
            OSError: as :func:`~cntlora_core.runtime.files.atomic_write`.
        """
        taken = [(m.count, m.rounding) for m in self.moments]
        tensors = {str(i): m.matrix for i, m in enumerate(self.moments)}
        return write_tensors(path, _FORMAT, {"moments": taken, "input_of": self.input_of}, tensors)

    @classmethod
    def load(cls, path: str | Path) -> CapturedMoments:
        """Read moments that :meth:`save` wrote.

        Raises:
            ValueError: if the file is damaged, or of another kind.
            FileNotFoundError: if there is none.
        """
        with reading_file(path, "second moments"):
            header, tensors = read_tensors(path, _FORMAT)
            taken = [Moment(tensors[str(i)], *rest) for i, rest in enumerate(header["moments"])]
            found = cls(tuple(taken), dict(header["input_of"]))
            for name in found.input_of:
                matrix = found.of(name).matrix
                if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not is_finite(matrix):
                    raise ValueError(f"the second moment of {name!r} is no finite square matrix")
            return found

    def require(self, points: Sequence[AttachmentPoint]) -> None:
        """Refuse points that these are not the moments of.

        Raises:
            ValueError: if a point has no moment, or one of another width than it reads.
        """
        for point in points:
            width = self.of(point.name).width if point.name in self.input_of else None
            if width != point.in_features:
                found = "none" if width is None else f"one of width {width}"
                raise ValueError(
                    f"the moments have {found} for {point.name!r}, which reads "
                    f"{point.in_features} features: collect them with this model's points"
                )


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
    """Sums up what attachment points read, as :func:`reading` shows it to :meth:`see`.

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

    def see(self, point: AttachmentPoint, x: Tensor, mask: Tensor | None = None) -> None:
        """Take the input ``x`` of an attachment point into account.

        Args:
            point: One of those that the capture was made for.
            x: What its module reads.
            mask: (batch, tokens), true for the tokens that count; None counts all.

        Raises:
            SharedInputError: if points that were taken to share an input do not.
            FloatingPointError: for values that are not finite, naming the point and the batch.
        """
        name = point.name
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
        fitter = self._sums.setdefault(name, SecondMoment(point.in_features))
        try:
            for rows in point.input_rows(x, mask):
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
