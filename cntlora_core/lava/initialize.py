"""Base model + data -> model with LAVA adapters that are initialised from the data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from torch import nn

from cntlora_core.activations.capture import ForwardFn
from cntlora_core.activations.collection import ProgressFn
from cntlora_core.activations.token_masks import MaskFn
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.initialization.plan import AdapterPlan
from cntlora_core.initialization.report import InitializationReport
from cntlora_core.initialization.solve import solve
from cntlora_core.lava.closed_form import closed_form_points, lava_plan
from cntlora_core.lava.config import LavaConfig
from cntlora_core.lava.factors import LavaPlan
from cntlora_core.lava.inject import adaptable_modules, inject_lava
from cntlora_core.lava.model import rank_and_alpha
from cntlora_core.runtime.processes import Processes


def get_lava_model(
    model: nn.Module,
    lava_config: LavaConfig,
    cntlora_config: CNTLoRAConfig | None,
    dataloader: Iterable[Any],
    *,
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
    progress: ProgressFn | None = None,
    sum_across_processes: bool = True,
) -> PeftModel:
    """Wrap a base model with LAVA adapters that are initialised from CNTLoRA's closed form.

    As :func:`cntlora_core.get_cntlora_model`; each delta is converted to LAVA's factors, which is
    exact for matrices and an approximation for convolutions, whose error is reported. Modules that
    have no closed form (convolutions in groups or in one dimension, or wider than
    ``max_unfolded_width``) are initialised plainly. With ``preserve_output`` the frozen weights are
    rewritten: save the trained adapter with :func:`cntlora_core.save_converted`.

    Args:
        model: The base model; its targeted modules are wrapped in place.
        lava_config: The adapter's settings.
        cntlora_config: The initialisation's settings; None for the defaults. ``split`` is followed
            where the orthogonality term does not act on U.
        dataloader: Batches of the data to adapt to; any iterable.
        forward_fn: See :func:`cntlora_core.get_cntlora_model`, like all that is not named here.
        mask_fn: See there.
        progress: See there.
        sum_across_processes: See there.

    Returns:
        A :class:`peft.PeftModel`; its ``lava_report`` is an :class:`.InitializationReport`, its
        ``lava_plans`` hold the :class:`LavaPlan` of each adapter.

    Raises:
        ValueError, TypeError, FloatingPointError: as there.
    """
    config = cntlora_config or CNTLoRAConfig()
    if config.rank_budget == "parameters":
        raise ValueError(
            "rank_budget='parameters' counts a LoRA's parameters, of which LAVA has fewer: use "
            "rank_budget='ranks' or 'fixed'"
        )
    processes = Processes(sum_across_processes)
    modules = processes.run(
        lambda: adaptable_modules(model, lava_config), "preparing the initialisation"
    )
    plan, report = plan_lava(
        model,
        modules,
        dataloader,
        lava_config,
        config,
        forward_fn=forward_fn,
        mask_fn=mask_fn,
        progress=progress,
        processes=processes,
    )
    wrapped, rounding = processes.run(
        lambda: inject_lava(model, lava_config, plan, method=config.constraint),
        "wrapping the model",
    )
    report = dataclasses.replace(report, rounding=max(rounding.values(), default=0.0))
    object.__setattr__(wrapped, "lava_plans", {"default": plan})
    object.__setattr__(wrapped, "lava_report", report)
    return wrapped


def plan_lava(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any] | None,
    lava_config: LavaConfig,
    config: CNTLoRAConfig,
    *,
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
    progress: ProgressFn | None = None,
    solve_progress: ProgressFn | None = None,
    processes: Processes | None = None,
) -> tuple[LavaPlan, InitializationReport]:
    """Ranks and initial factors of all modules, on the base model as it is.

    Args:
        model: What ``forward_fn`` is given.
        modules: What gets an adapter, by its name within the model.
        batches: What the closed form reads; None for a plain initialisation everywhere.
        lava_config: The adapter's settings.
        config: The closed form's.
        forward_fn: As in :func:`~cntlora_core.initialization.solve.solve`, like all that follows.
        mask_fn: See there.
        progress: See there.
        solve_progress: See there.
        processes: See there.

    Raises:
        ValueError, TypeError, FloatingPointError: as there.
    """
    processes = processes or Processes()
    found = {name: rank_and_alpha(lava_config, name) for name in modules}
    ranks = {name: rank for name, (rank, _) in found.items()}
    scalings = {name: alpha / rank for name, (rank, alpha) in found.items()}
    processes.require_same(json.dumps([config.describe(), found], sort_keys=True), "configuration")
    points, plain = closed_form_points(modules, config)
    closed_form = AdapterPlan({}, config.preserve_output and batches is not None)
    report = InitializationReport(config.constraint, ranks, 0.0, 0.0)
    if points and batches is not None:
        fixed = config.rank_budget == "fixed"
        wanted = {p.name: ranks[p.name] for p in points}
        if fixed:  # a narrow module's delta has fewer ranks than LAVA has terms
            wanted = {p.name: min(ranks[p.name], p.max_rank) for p in points}
        closed_form, report = solve(
            model,
            points,
            batches,
            config,
            rank=wanted,
            scaling={p.name: scalings[p.name] for p in points},
            forward_fn=forward_fn,
            mask_fn=mask_fn,
            progress=progress,
            solve_progress=solve_progress,
            processes=processes,
        )
        ranks |= {} if fixed else closed_form.ranks
    plan = lava_plan(
        modules,
        closed_form,
        lava_config,
        ranks=ranks,
        scalings=scalings,
        split=config.split,
        seed=config.seed,
    )
    return plan, dataclasses.replace(
        report,
        ranks=plan.ranks,
        filled=plan.filled,
        errors={n: f.error for n, f in plan.factors.items() if f.size and len(f.spatial)},
        relative_error=plan.relative_error,
        plain=plain,
    )
