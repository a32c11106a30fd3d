"""Put a LAVA plan into a model, through peft; take a snapshot of what is in one."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from cntlora_core.adapter.inject import anchored
from cntlora_core.adapter.record import (
    InitializationRecord,
    OnRewrittenBase,
    fingerprints_of,
    remember_rewriting,
)
from cntlora_core.lava.config import LavaConfig
from cntlora_core.lava.factors import LavaFactors, LavaPlan
from cntlora_core.lava.layer import LavaLayer, check_adaptable
from cntlora_core.layers.weights import check_rewritable, subtract_from_weight
from cntlora_core.lora_file.algebra import alpha_for


def adaptable_modules(model: nn.Module, config: LavaConfig) -> dict[str, nn.Module]:
    """The modules that peft would wrap under a configuration, in the model's own order.

    Raises:
        ValueError: if nothing matches, or a match is no module that LAVA adapts.
    """
    if not config.target_modules:
        raise ValueError("target_modules is empty: name the modules that get an adapter")
    chosen = _maybe_include_all_linear_layers(copy.deepcopy(config), model)
    found = {
        name: module
        for name, module in model.named_modules()
        if name and check_target_module_exists(chosen, name)
    }
    if not found:
        raise ValueError(
            f"target_modules={config.target_modules!r} matches no module of {type(model).__name__}"
        )
    for name, module in found.items():
        check_adaptable(name, module)
    return found


class LavaOnRewrittenBase(OnRewrittenBase, LavaConfig):
    """The configuration of an adapter that fits a rewritten base only."""

    initialization_field = "init_weights"


def inject_lava(
    model: nn.Module,
    config: LavaConfig,
    plan: LavaPlan,
    adapter_name: str = "default",
    method: str = "",
) -> tuple[PeftModel, dict[str, float]]:
    """Wrap the planned modules of a base model, once, and copy their factors in.

    ``rank_pattern`` and ``alpha_pattern`` are written from the plan, so that the saved
    configuration rebuilds the same adapter. Adapter weights are float32.

    Returns:
        The wrapped model, and for each module what rounding a rewritten weight to its data type
        lost, relative to the weight's norm.

    Raises:
        ValueError: for a base weight that cannot be rewritten where the plan says so.
    """
    rewritten = [n for n, f in plan.factors.items() if plan.rewrites_base and f.v.any()]
    check_rewritable(model, {name: model.get_submodule(name) for name in rewritten})
    config = copy.deepcopy(config)
    config.target_modules = set(plan.factors)  # pyright: ignore[reportAttributeAccessIssue]
    config.layers_to_transform = config.layers_pattern = None
    matched = {n for n, _ in model.named_modules() if check_target_module_exists(config, n)}
    if matched != set(plan.factors):  # peft takes names as suffixes
        config.target_modules = "|".join(re.escape(name) for name in plan.factors)
    config.rank_pattern = {anchored(n): f.rank for n, f in plan.factors.items()}
    config.alpha_pattern = {
        anchored(n): alpha_for(f.scaling, f.rank) for n, f in plan.factors.items()
    }
    wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    assert isinstance(wrapped, PeftModel)
    return wrapped, copy_lava_factors(wrapped, plan, adapter_name, method)


@torch.no_grad()
def copy_lava_factors(
    model: PeftModel, plan: LavaPlan, adapter_name: str = "default", method: str = ""
) -> dict[str, float]:
    """Copy a plan's factors into the adapter of a wrapped model, rewriting the base if planned."""
    layers = lava_layers(model)
    rewritten = {
        name: layers[name].get_base_layer()
        for name, factors in plan.factors.items()
        if plan.rewrites_base and factors.v.any()
    }
    fingerprints = fingerprints_of(rewritten)
    rounding = {}
    for name, factors in plan.factors.items():
        layer = layers[name]
        for key, parameter in layer.factors(adapter_name).items():
            parameter.copy_(factors.named()[key])
        rounding[name] = 0.0
        if name in rewritten:
            rounding[name] = subtract_from_weight(
                rewritten[name], factors.u, factors.down(), factors.scaling
            )
    if rewritten:
        record = InitializationRecord(plan, method, fingerprints)
        remember_rewriting(model, adapter_name, record, LavaOnRewrittenBase)
    return rounding


def lava_layers(model: nn.Module, adapter_name: str | None = None) -> Mapping[str, LavaLayer]:
    """LAVA's layers by the name that the module had before; those with one adapter, if named."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LavaLayer) and (adapter_name is None or adapter_name in module.lava_U)
    }


def snapshot(layer: LavaLayer, adapter_name: str = "default") -> LavaFactors:
    """A copy of an adapter's factors as they are now, float32 on the CPU."""
    u, v, *spatial = (
        factor.detach().to("cpu", torch.float32, copy=True)
        for factor in layer.factors(adapter_name).values()
    )
    return LavaFactors(u, v, tuple(spatial), layer.scaling[adapter_name])
