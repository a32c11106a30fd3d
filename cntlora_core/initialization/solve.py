"""The one way from attachment points and data to a plan and its report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from cntlora_core.activations.capture import CapturedMoments, ForwardFn
from cntlora_core.activations.collection import ProgressFn, collect_moments
from cntlora_core.activations.token_masks import MaskFn
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.initialization.plan import AdapterPlan, check_points, plan_adapter
from cntlora_core.initialization.report import InitializationReport
from cntlora_core.layers.attachment import AttachmentPoint
from cntlora_core.layers.weights import check_rewritable
from cntlora_core.runtime.memory import give_back_freed_memory
from cntlora_core.runtime.processes import Processes, attempt


def solve(
    model: nn.Module,
    points: Sequence[AttachmentPoint],
    batches: Iterable[Any] | None,
    config: CNTLoRAConfig,
    *,
    rank: int | Mapping[str, int],
    scaling: float | Mapping[str, float],
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
    progress: ProgressFn | None = None,
    solve_progress: ProgressFn | None = None,
    processes: Processes | None = None,
    moments: CapturedMoments | None = None,
) -> tuple[AdapterPlan, InitializationReport]:
    """Second moments of what the points read, and from them ranks and factors; no weight changes.

    Under torch.distributed all processes call this, each with its part of the data, and get one
    plan, bit for bit.

    Args:
        model: What ``forward_fn`` is given.
        points: Attachment points within it.
        batches: The data; None where ``moments`` are given.
        config: The method's settings.
        rank: As in :func:`plan_adapter`.
        scaling: alpha / r, as there.
        forward_fn: As in :func:`collect_moments`.
        mask_fn: As there.
        progress: Called with (batches done, total or 0).
        solve_progress: Called with (eigenproblems solved, total).
        processes: Who works together; default: all processes of torch.distributed.
        moments: Those of the points, where they are known; no data is then read.

    Raises:
        ValueError, TypeError: as :func:`check_points`, before anything is computed; also if
            ``preserve_output`` would rewrite a weight that must not be, or the processes were
            given different settings, or ``moments`` are not those of the points, or both
            ``batches`` and ``moments`` are given, or neither.
        FloatingPointError: if activations are not finite.
    """
    processes = processes or Processes()

    def check() -> None:
        wanted = rank if isinstance(rank, Mapping) else {p.name: rank for p in points}
        check_points(points, config, wanted)
        if (batches is None) == (moments is None):
            raise ValueError("give either the data or its second moments, moments=")
        if moments is not None:
            moments.require(points)
        if config.preserve_output:
            check_rewritable(model, {p.name: p.module for p in points})

    processes.run(check, "preparing the initialisation")
    given = json.dumps([config.describe(), rank, scaling], sort_keys=True, default=dict)
    processes.require_same(given, "configuration")
    start = time.perf_counter()
    captured = moments or collect_moments(
        model,
        points,
        () if batches is None else batches,
        forward_fn=forward_fn,
        mask_fn=mask_fn,
        progress=progress,
        processes=processes,
    )
    give_back_freed_memory()  # activations: what comes next needs much less
    middle = time.perf_counter()
    plan = plan_from_first(
        lambda: plan_adapter(
            points,
            captured,
            config,
            rank=rank,
            scaling=scaling,
            progress=solve_progress,
            release=moments is None,
        ),
        processes,
    )
    return plan, InitializationReport(
        method=config.constraint,
        ranks=plan.ranks,
        pass_seconds=middle - start,
        solve_seconds=time.perf_counter() - middle,
        filled=plan.filled,
        config=config,
        rows={name: captured.of(name).count for name in plan.factors},
        distinct_inputs=len({captured.input_of[name] for name in plan.factors}),
        processes=processes.count,
        solver_error=plan.solver_error,
    )


def plan_from_first(make: Callable[[], AdapterPlan], processes: Processes) -> AdapterPlan:
    """Make a plan on the first process and hand it to all, so that all are the same bit for bit.

    Raises:
        Exception: what ``make`` raised, on the first process; RuntimeError on the others.
    """
    if not processes.together:
        return make()
    plan, error = attempt(make) if processes.first else (None, None)
    processes.raise_together(error, "solving for the initialisation")
    own = plan.tensors() if plan else {}
    shapes = {name: tensor.shape for name, tensor in own.items()}
    header = plan and (plan.numbers(), shapes, plan.rewrites_base, plan.solver_error)
    header = processes.gather(header)[0]
    assert header is not None
    numbers, shapes, rewrites_base, solver_error = header
    tensors = {name: processes.from_first(own.get(name), shape) for name, shape in shapes.items()}
    made = AdapterPlan.of(numbers, tensors, rewrites_base)
    return dataclasses.replace(made, solver_error=solver_error)
