"""The start of a LAVA adapter of a diffusion model: attention, and the denoiser's convolutions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from cntlora_core.activations.capture import ForwardFn
from cntlora_core.activations.collection import ProgressFn, collect_moments
from cntlora_core.adapter.inject import AdapterPlan
from cntlora_core.diffusion.settings import AdapterSettings
from cntlora_core.initialization.across_processes import plan_from_first
from cntlora_core.initialization.plan import check_points, plan_adapter
from cntlora_core.initialization.report import report_of
from cntlora_core.lava import LavaConfig
from cntlora_core.lava.closed_form import closed_form_points, lava_plan
from cntlora_core.lava.factors import LavaPlan
from cntlora_core.lava.layer import check_adaptable
from cntlora_core.lava.start import LavaReport, lava_report
from cntlora_core.runtime.processes import Processes


def lava_config(settings: AdapterSettings) -> LavaConfig:
    """peft's configuration; a plan says which modules it is for, at which ranks."""
    return LavaConfig(
        r=settings.rank,
        lava_alpha=settings.lora_alpha,
        orthogonality=settings.orthogonality,
        orthogonal_factors=list(settings.orthogonal_factors),
    )


def lava_modules(
    unet: nn.Module,
    text_encoder: nn.Module,
    settings: AdapterSettings,
    unet_targets: tuple[str, ...],
    text_encoder_targets: tuple[str, ...],
) -> dict[str, nn.Module]:
    """What gets an adapter, under the prefixes ``unet.`` and ``text_encoder.``."""

    def chosen(model: nn.Module, prefix: str, targets: tuple[str, ...], convolutions: bool):
        endings = tuple(f".{target}" for target in targets)
        return {
            prefix + name: module
            for name, module in model.named_modules()
            if name.endswith(endings) or (convolutions and isinstance(module, nn.Conv2d))
        }

    modules = chosen(unet, "unet.", unet_targets, settings.convolutions)
    if settings.train_text_encoder:
        modules |= chosen(text_encoder, "text_encoder.", text_encoder_targets, False)
    for name, module in modules.items():
        check_adaptable(name, module)
    return modules


def plan_lava(
    models: nn.ModuleDict,
    modules: dict[str, nn.Module],
    batches: Any,
    forward: ForwardFn,
    settings: AdapterSettings,
    *,
    seed: int,
    passes_progress: ProgressFn,
    solve_progress: Callable[[int, int], None],
) -> tuple[LavaPlan, LavaReport | None]:
    """Ranks and starting factors of all modules, on the base models as they are.

    Args:
        models: Both models, as the modules' prefixes name them.
        modules: What gets an adapter, by prefixed name.
        batches: What the closed form reads.
        forward: Runs one forward pass of a batch.
        settings: Method, rank and so on.
        seed: Seed of what is random in the start.
        passes_progress: Told of the forward passes.
        solve_progress: Told of the eigenproblems.

    Returns:
        The plan, and a report (None for a plain start, which reads nothing).
    """
    config = dataclasses.replace(settings.cntlora, seed=settings.cntlora.seed + seed)
    ranks = dict.fromkeys(modules, settings.rank)
    scalings = dict.fromkeys(modules, settings.scaling)
    points, plain = closed_form_points(modules, config)
    start, closed_form = None, AdapterPlan({}, rewrites_base=False)
    if settings.method != "lora" and points:
        fixed = config.rank_budget == "fixed"
        wanted = {
            p.name: min(settings.rank, p.max_rank) if fixed else settings.rank for p in points
        }
        check_points(points, config, wanted)
        began = time.perf_counter()
        captured = collect_moments(
            models, points, batches, forward_fn=forward, progress=passes_progress
        )
        middle = time.perf_counter()
        closed_form = plan_from_first(
            lambda: plan_adapter(
                points,
                captured,
                config,
                rank=wanted,
                scaling=settings.scaling,
                progress=solve_progress,
            ),
            Processes(),
        )
        end = time.perf_counter()
        start = report_of(closed_form, captured, config, middle - began, end - middle)
        if not fixed:
            ranks |= closed_form.ranks
    plan = lava_plan(
        modules,
        closed_form,
        lava_config(settings),
        ranks=ranks,
        scalings=scalings,
        split=config.split,
        seed=config.seed,
    )
    return plan, None if settings.method == "lora" else lava_report(plan, start, plain)
