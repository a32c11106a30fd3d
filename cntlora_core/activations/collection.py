"""A model and its data in, second moments out: one pass of the frozen model over the batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

from torch import nn

from cntlora_core.activations.across_processes import sum_partial_moments
from cntlora_core.activations.capture import (
    CapturedMoments,
    ForwardFn,
    MomentCapture,
    PartialMoments,
    SharedInputError,
    length_of,
    reading,
)
from cntlora_core.activations.token_masks import MaskFn
from cntlora_core.layers.attachment import AttachmentPoint
from cntlora_core.runtime.processes import Processes, attempt

logger = logging.getLogger(__name__)

ProgressFn = Callable[[int, int], None]


def collect_moments(
    model: nn.Module,
    points: Sequence[AttachmentPoint],
    batches: Iterable[Any],
    *,
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
    progress: ProgressFn | None = None,
    processes: Processes | None = None,
) -> CapturedMoments:
    """Run the batches through the frozen model, in eval mode, and sum up what the points read.

    Where torch.distributed is initialised, all processes call this, each with its part of the data
    (which may be none), and get the moments of all of it.

    Args:
        model: What ``forward_fn`` is given; its training flags are restored.
        points: Attachment points within it.
        batches: A dataloader or any iterable.
        forward_fn: ``forward_fn(model, batch)`` runs one forward pass.
        mask_fn: Which tokens count: see :meth:`.TokenMasks.begin`.
        progress: Called with (batches done, total or 0) after each batch.
        processes: Who adds up; default: all processes of torch.distributed.

    Raises:
        ValueError: if there is no batch, or no point was called.
        FloatingPointError: for activations that are not finite, naming the point and the batch.
        RuntimeError: on every other process, if one of them fails.
    """
    processes = processes or Processes()
    _require_same_points(points, processes)
    total = length_of(batches)
    _warn_of_repeated_samples(batches, processes)

    def run_all(share_inputs: bool) -> tuple[PartialMoments, int]:
        capture, done = MomentCapture(points, share_inputs), 0
        with reading(model, points, capture.see, forward_fn=forward_fn, mask_fn=mask_fn) as run:
            for done, batch in enumerate(batches, 1):
                run(batch)
                capture.end_batch()
                if progress is not None:
                    progress(done, total)
        return capture.partial(), done

    outcome, error = attempt(lambda: run_all(True))
    if _all_run_again(error, batches, processes):
        logger.info("%s; capturing again without sharing", error or "on another process")
        outcome, error = attempt(lambda: run_all(False))
    processes.raise_together(error, "reading activations")
    assert outcome is not None
    partial, done = outcome
    if sum(processes.gather(done)) == 0:
        raise ValueError("there are no batches to read activations from: give at least one")
    partial = sum_partial_moments(points, partial, processes)
    if points and not partial.leaders:
        raise ValueError(
            f"no attachment point was called in {done} batches: forward_fn must run the very model "
            f"that was given, {type(model).__name__}"
        )
    return partial.finish(points)


def _all_run_again(
    error: BaseException | None, batches: Iterable[Any], processes: Processes
) -> bool:
    """Whether a sharing of inputs that did not last is the only trouble, and can be mended.

    All processes read their data again or none does: reading may itself be a collective call.
    """
    ended = isinstance(error, SharedInputError)
    seen = processes.gather((ended, error is None or ended, not isinstance(batches, Iterator)))
    return any(ended for ended, _, _ in seen) and all(fine and again for _, fine, again in seen)


def _require_same_points(points: Sequence[AttachmentPoint], processes: Processes) -> None:
    described = [f"{p.name!r} ({p.in_features} -> {p.out_features})" for p in points]
    for rank, other in enumerate(processes.gather(described)):
        if other != described:
            mine, theirs = next(
                pair for pair in zip_longest(described, other, fillvalue="none") if len({*pair}) > 1
            )
            raise ValueError(
                f"process {rank} has other attachment points than process {processes.rank}, for "
                f"example {theirs} against {mine}: give all processes the same model and the same "
                "target_modules"
            )


def _warn_of_repeated_samples(batches: Iterable[Any], processes: Processes) -> None:
    """Accelerate's dataloaders repeat samples until all processes have as many batches."""
    sampler = getattr(batches, "batch_sampler", None)
    if not processes.together or not getattr(sampler, "even_batches", False):
        return
    samples = getattr(batches, "total_dataset_length", 0)
    at_once = getattr(batches, "total_batch_size", 0)
    if at_once and samples % at_once:
        logger.warning(
            "the dataloader repeats some of its %d samples so that all %d processes get as many: "
            "they count twice. Prepare it with DataLoaderConfiguration(even_batches=False)",
            samples,
            processes.count,
        )
