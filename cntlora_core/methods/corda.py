"""CorDA (arXiv 2406.05223) by peft's own code, in both modes."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

from cntlora_core.activations.capture import length_of
from cntlora_core.adapter.inject import AdapterPlan
from cntlora_core.initialization.report import InitializationReport
from cntlora_core.methods.base import InitializationRequest, PlannedInitialization
from cntlora_core.methods.from_weights import factors_by_peft, require_rank
from cntlora_core.methods.rows import RowPasses, StandIn, repeatable, stand_in_names


def plan_corda(
    request: InitializationRequest, mode: Literal["ipm", "kpm"]
) -> PlannedInitialization:
    """Factors of the weight, decomposed along the covariance of what it reads.

    peft takes a batch for one sample: with several it fails on a three-dimensional input. It gets
    the rows of a batch as one sample.

    Raises:
        ValueError: without data, for a rank above a point's width or a point that reads nothing.
        ImportError: where the attrs package is missing, which peft's CorDA needs.
    """
    name = f"corda_{mode}"
    preprocess_corda = _preprocess()
    require_rank(name, request, lambda point: point.max_rank, "min(d_in, d_out)")
    batches = repeatable(request.batches, name)
    config = _corda_config(request, mode)
    names = stand_in_names(request.points)
    stand_ins = nn.ModuleDict({names[p.name]: StandIn(p.weight()) for p in request.points})
    lora_config = LoraConfig(
        r=request.rank,
        target_modules=list(names.values()),
        init_lora_weights="corda",
        corda_config=config,
    )

    def see(point: str, rows: Tensor) -> None:
        # peft squeezes the first dimension off, and would squeeze a single row's too.
        if not rows.any():
            return  # it divides by the largest entry
        stand_ins[names[point]](rows[None])

    passes = RowPasses(request, see)
    seconds = {"passes": 0.0}

    def run_model() -> None:
        start, total = time.perf_counter(), length_of(batches)
        with passes.hooked():
            for done, batch in enumerate(batches, 1):
                passes.run(batch)
                if request.passes_progress is not None:
                    request.passes_progress(done, total)
        passes.require_rows(name)
        unused = [n for n, s in names.items() if not getattr(stand_ins[s], "sample_count", 0)]
        if unused:
            raise ValueError(
                f"method {name!r}: {unused[0]!r} reads nothing but zeros: leave it out of "
                "target_modules"
            )
        seconds["passes"] = time.perf_counter() - start

    started = time.perf_counter()
    with torch.inference_mode(False):
        preprocess_corda(stand_ins, lora_config, run_model=run_model)
        factors = {}
        for done, point in enumerate(request.points, 1):
            stand_in: Any = stand_ins[names[point.name]]
            factors[point.name] = factors_by_peft(
                point,
                request,
                "corda",
                rewrites_base=True,
                prepare=lambda linear, of=stand_in: setattr(linear, "eigens", of.eigens),
                corda_config=config,
            )
            if request.solve_progress is not None:
                request.solve_progress(done, len(request.points))
    plan = AdapterPlan(factors, rewrites_base=True)
    rest = time.perf_counter() - started - seconds["passes"]
    return PlannedInitialization(
        plan, InitializationReport(name, plan.ranks, seconds["passes"], rest)
    )


def _preprocess() -> Any:
    try:
        from peft.tuners.lora.corda import preprocess_corda
    except ImportError as error:
        raise ImportError(
            f"peft's CorDA cannot be imported ({error}): it needs the attrs package, which peft "
            "does not ask for; install it with `pip install attrs`"
        ) from error
    return preprocess_corda


def _corda_config(request: InitializationRequest, mode: Literal["ipm", "kpm"]) -> CordaConfig:
    given = request.lora_config.corda_config if request.lora_config is not None else None
    if given is None:
        return CordaConfig(corda_method=mode)
    if given.cache_file or given.covariance_file:
        raise ValueError(
            "CordaConfig's cache_file and covariance_file are not supported: they are pickles, and "
            "hold names that differ here; leave them out"
        )
    if given.corda_method not in (mode, CordaConfig().corda_method):
        raise ValueError(
            f"CordaConfig(corda_method={given.corda_method!r}) and method 'corda_{mode}' disagree: "
            "leave corda_method out"
        )
    return CordaConfig(
        corda_method=mode, use_float16_for_covariance=given.use_float16_for_covariance
    )
