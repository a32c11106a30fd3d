"""Initialisations that peft computes from one weight at a time, read off as factors.

peft initialises an adapter while it wraps a module. Here it wraps a copy of one attachment point's
weight, in float32 and as (d_out, d_in) whatever the module is; the factors are read off the copy,
which is then thrown away. The model itself is wrapped once, later, from the plan. That makes the
initialisation the same for every data type and for transformers' Conv1D (peft's OLoRA takes its
transposed weight as it is), and holds one weight's copy in memory at a time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import Linear

from cntlora_core.adapter.inject import AdapterPlan, adapter_weights, plan_plain_lora
from cntlora_core.closed_form.factorization import Factors
from cntlora_core.initialization.report import InitializationReport
from cntlora_core.layers.attachment import AttachmentPoint
from cntlora_core.methods.base import InitializationRequest, PlannedInitialization
from cntlora_core.runtime.seeds import torch_seed

TOLERANCE = 1e-3
"""Relative to its norm: how far peft's rewritten weight may be from ``W - scaling * B @ A``."""


def plan_lora(request: InitializationRequest) -> PlannedInitialization:
    """Plain LoRA, Kaiming-uniform (arXiv 2106.09685), drawn from the seed alone."""
    start = time.perf_counter()
    plan = plan_plain_lora(
        request.points, rank=request.rank, scaling=request.scaling, seed=request.seed
    )
    return PlannedInitialization(plan, _report("lora", plan, time.perf_counter() - start))


def plan_from_weights(
    request: InitializationRequest, name: str, init: str
) -> PlannedInitialization:
    """The initialisation that peft calls ``init``, at every point.

    Raises:
        ValueError: for a rank that the decomposition cannot give.
    """
    start = time.perf_counter()
    reads_weight = init not in ("gaussian", "orthogonal")
    if reads_weight:
        require_rank(name, request, lambda point: point.max_rank, "min(d_in, d_out)")
    elif init == "orthogonal" and request.rank % 2:
        raise ValueError(f"method {name!r} needs an even rank, got {request.rank}")
    factors = {}
    with seeded(request.seed):
        for done, point in enumerate(request.points, 1):
            factors[point.name] = factors_by_peft(
                point, request, init, rewrites_base=reads_weight, reads_weight=reads_weight
            )
            if request.solve_progress is not None:
                request.solve_progress(done, len(request.points))
    plan = AdapterPlan(factors, rewrites_base=reads_weight)
    return PlannedInitialization(plan, _report(name, plan, time.perf_counter() - start))


@torch.no_grad()
def factors_by_peft(
    point: AttachmentPoint,
    request: InitializationRequest,
    init: str,
    *,
    rewrites_base: bool,
    reads_weight: bool = True,
    prepare: Callable[[nn.Linear], None] | None = None,
    **options: Any,
) -> Factors:
    """What peft initialises an adapter with on a copy of one weight.

    Args:
        point: Whose weight it is.
        request: Rank and scaling.
        init: peft's ``init_lora_weights``.
        rewrites_base: Whether peft is expected to leave ``W - scaling * B @ A``; else ``W``.
        reads_weight: Whether the initialisation depends on the weight at all.
        prepare: Called with the copy before it is wrapped.
        options: More fields of peft's ``LoraConfig``.

    Raises:
        RuntimeError: if the installed peft does something else to the weight.
    """
    with torch.device("meta"):
        linear = Linear(point.in_features, point.out_features, bias=False)
    if reads_weight:
        weight = point.weight().clone(memory_format=torch.contiguous_format)
    else:
        weight = torch.zeros(point.out_features, point.in_features)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if prepare is not None:
        prepare(linear)
    before = weight.clone() if reads_weight else None
    config = LoraConfig(
        r=request.rank,
        lora_alpha=request.scaling * request.rank,  # pyright: ignore[reportArgumentType]
        target_modules=["0"],
        init_lora_weights=init,  # pyright: ignore[reportArgumentType]
        **options,
    )
    layer = get_peft_model(nn.Sequential(linear), config).get_submodule("base_model.model.0")
    assert isinstance(layer, LoraLayer)
    down, up = (p.detach().to("cpu", torch.float32) for p in adapter_weights(layer))
    factors = Factors(down.contiguous(), up.contiguous(), request.scaling)
    if before is not None:
        after = layer.get_base_layer().weight
        assert isinstance(after, Tensor)
        _check_base(point, init, before.cpu(), after.cpu(), factors, rewrites_base)
    return factors


def _check_base(
    point: AttachmentPoint,
    init: str,
    before: Tensor,
    after: Tensor,
    factors: Factors,
    rewrites_base: bool,
) -> None:
    delta = factors.delta()
    expected = before - delta if rewrites_base else before
    if (after - expected).norm() > TOLERANCE * (before.norm() + delta.norm()):
        raise RuntimeError(
            f"the installed peft changes the weight of {point.name!r} in an unexpected way under "
            f"init_lora_weights={init!r}: use the version in constraints.txt"
        )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` within the block (peft draws from the global generator), then undo it."""
    with torch.random.fork_rng():
        torch.manual_seed(torch_seed(seed))
        yield


def require_rank(
    name: str,
    request: InitializationRequest,
    limit_of: Callable[[AttachmentPoint], int],
    limit_name: str,
) -> None:
    """Refuse a rank that a method cannot give at some point.

    peft's own code does not: it makes factors of another rank than it was asked for.

    Raises:
        ValueError: naming the narrowest point and the largest rank that does.
    """
    if request.rank < 1:
        raise ValueError(f"rank must be at least 1, got {request.rank}")
    narrow = min(request.points, key=limit_of)
    if request.rank > limit_of(narrow):
        raise ValueError(
            f"method {name!r} cannot give rank {request.rank} at {narrow.name!r} "
            f"({narrow.in_features} -> {narrow.out_features}): at most {limit_name}; "
            f"use a rank of at most {limit_of(narrow)}"
        )


def pattern_of(points: Sequence[AttachmentPoint]) -> str:
    """peft's ``target_modules`` for just these points: a regular expression for whole names."""
    return "|".join(re.escape(point.name) for point in points)


def _report(name: str, plan: AdapterPlan, seconds: float) -> InitializationReport:
    return InitializationReport(name, plan.ranks, pass_seconds=0.0, solve_seconds=seconds)
