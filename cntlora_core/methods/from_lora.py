"""Going on from a LoRA file: its factors, ranks and scales are the initialisation."""

from __future__ import annotations

import time

from cntlora_core.adapter.inject import AdapterPlan
from cntlora_core.closed_form.factorization import Factors
from cntlora_core.initialization.report import InitializationReport
from cntlora_core.lora_file.algebra import LoRALayer, without_mid
from cntlora_core.methods.base import InitializationRequest, PlannedInitialization


def plan_from_lora(request: InitializationRequest) -> PlannedInitialization:
    """The factors of the request's LoRA as they are; the base stays, and the LoRA acts at once.

    Raises:
        ValueError: without a LoRA, for a point that it lacks, or for a layer of another shape than
            its point.
    """
    start = time.perf_counter()
    if request.lora is None:
        raise ValueError(
            "method 'from_lora' goes on from a LoRA file: `cntlora train --from-lora FILE` does, "
            "and an InitializationRequest with its layers"
        )
    factors = {}
    for point in request.points:
        layer = without_mid(request.lora[point.name])
        shape = (layer.up.shape[0], layer.down.flatten(1).shape[1])
        if shape != (point.out_features, point.in_features):
            raise ValueError(
                f"the LoRA changes {shape[1]} -> {shape[0]} features at {point.name!r}, where this "
                f"model has {point.in_features} -> {point.out_features}: is it for another model?"
            )
        factors[point.name] = _factors(layer)
    plan = AdapterPlan(factors, rewrites_base=False)
    seconds = time.perf_counter() - start
    report = InitializationReport("from_lora", plan.ranks, pass_seconds=0.0, solve_seconds=seconds)
    return PlannedInitialization(plan, report)


def _factors(layer: LoRALayer) -> Factors:
    """Those of a convolution as matrices, down (r, in * kh * kw)."""
    down, up = layer.down.flatten(1), layer.up.flatten(1)
    return Factors(down.contiguous(), up.contiguous(), layer.scaling)
