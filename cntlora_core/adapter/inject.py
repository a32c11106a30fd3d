"""Put a plan into a model, through peft: wrap once, copy the factors in, rewrite the base."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from cntlora_core.adapter.record import (
    InitializationRecord,
    fingerprints_of,
    remember_rewriting,
)
from cntlora_core.closed_form.factorization import Factors
from cntlora_core.initialization.plan import AdapterPlan, plan_adapter, plan_plain_lora
from cntlora_core.layers.unfolding import same_geometry, with_geometry_of
from cntlora_core.layers.weights import check_rewritable, subtract_from_weight

__all__ = [
    "AdapterPlan",
    "adapter_layers",
    "adapter_weights",
    "check_lora_config",
    "configured_ranks",
    "copy_factors",
    "inject_adapter",
    "match_convolutions",
    "plan_adapter",
    "plan_plain_lora",
    "stored_plan",
]

logger = logging.getLogger(__name__)

VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Fields of peft's configuration that change what an adapter computes (DoRA apart)."""


def inject_adapter(
    model: nn.Module,
    lora_config: LoraConfig,
    plan: AdapterPlan,
    adapter_name: str = "default",
    method: str = "",
) -> tuple[PeftModel, dict[str, float]]:
    """Wrap the planned points of a base model, once, and copy their factors in.

    ``rank_pattern`` and ``alpha_pattern`` of the configuration are written from the plan, as
    escaped and anchored patterns, so that the saved configuration rebuilds the same adapter.
    Adapter weights are float32, whatever the base's dtype.

    Returns:
        The wrapped model, and what :func:`copy_factors` returns.

    Raises:
        ValueError: as :func:`check_lora_config`, for rank patterns that the plan does not follow,
            or a base weight that cannot be rewritten where the plan says so.
    """
    check_lora_config(lora_config, plan.rewrites_base)
    if configured_ranks(lora_config, plan.factors)[0] != plan.ranks and (
        lora_config.rank_pattern or lora_config.alpha_pattern
    ):
        raise ValueError(
            "the configuration has a rank_pattern or alpha_pattern of its own, which the planned "
            "ranks would overwrite: leave them out"
        )
    if plan.rewrites_base:
        check_rewritable(model, {name: model.get_submodule(name) for name in plan.factors})
    lora_config = copy.deepcopy(lora_config)
    lora_config.init_lora_weights = False  # the factors are copied in below
    lora_config.target_modules = set(plan.factors)  # pyright: ignore[reportAttributeAccessIssue]
    lora_config.layers_to_transform = lora_config.layers_pattern = None
    matched = {n for n, _ in model.named_modules() if check_target_module_exists(lora_config, n)}
    if matched != set(plan.factors):  # peft takes names as suffixes
        lora_config.target_modules = "|".join(re.escape(name) for name in plan.factors)
    lora_config.rank_pattern = {anchored(n): f.rank for n, f in plan.factors.items()}
    lora_config.alpha_pattern = {
        anchored(n): alpha_of(f.scaling, f.rank, lora_config.use_rslora)
        for n, f in plan.factors.items()
    }
    # peft would draw random numbers for weights that are overwritten at once. DoRA reads them, and
    # the rows of trainable tokens are copied from the base.
    bare = not (lora_config.use_dora or getattr(lora_config, "trainable_token_indices", None))
    peft_model = get_peft_model(
        model, lora_config, adapter_name=adapter_name, low_cpu_mem_usage=bare
    )
    assert isinstance(peft_model, PeftModel)
    if bare:
        for layer in adapter_layers(peft_model).values():
            weight = layer.get_base_layer().weight
            assert isinstance(weight, Tensor)
            layer.lora_A.get_submodule(adapter_name).to_empty(device=weight.device)
            layer.lora_B.get_submodule(adapter_name).to_empty(device=weight.device)
    return peft_model, copy_factors(peft_model, plan, adapter_name, method)


def check_lora_config(lora_config: LoraConfig, rewrites_base: bool) -> None:
    """Refuse what a planned initialisation cannot be combined with.

    Raises:
        ValueError: if alpha is not a finite number above 0, or a field changes what an adapter
            computes or what it adapts.
    """
    alphas = {"lora_alpha": lora_config.lora_alpha, **(lora_config.alpha_pattern or {})}
    for name, alpha in alphas.items():
        if not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0):
            where = name if name == "lora_alpha" else f"alpha_pattern[{name!r}]"
            raise ValueError(
                f"{where} must be a finite number above 0, got {alpha!r}: an adapter is multiplied "
                "by alpha / r, and its initialisation is divided by that. Twice the rank is usual"
            )
    if lora_config.use_dora and rewrites_base:
        raise ValueError(
            "use_dora=True normalises by the frozen weight, which preserve_output=True rewrites: "
            "use preserve_output=False"
        )
    for name in VARIANTS:
        if getattr(lora_config, name, None):
            raise ValueError(
                f"{name} changes what an adapter computes, and the closed forms are for scaling * "
                "B @ A: leave it out"
            )
    for name in ("layer_replication", "target_parameters"):
        if getattr(lora_config, name, None):
            raise ValueError(
                f"{name} adapts what is no module of the base model, whose inputs are what a "
                "data-driven initialisation is made from: leave it out"
            )


def configured_ranks(
    lora_config: LoraConfig, names: Iterable[str]
) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and scaling that peft would give each module, its patterns included."""
    ranks, scalings = {}, {}
    rank_pattern, alpha_pattern = lora_config.rank_pattern or {}, lora_config.alpha_pattern or {}
    for name in names:
        rank = rank_pattern.get(get_pattern_key(list(rank_pattern), name), lora_config.r)
        alpha = alpha_pattern.get(
            get_pattern_key(list(alpha_pattern), name), lora_config.lora_alpha
        )
        ranks[name] = rank
        scalings[name] = alpha / (rank**0.5 if lora_config.use_rslora else rank)
    return ranks, scalings


@torch.no_grad()
def copy_factors(
    peft_model: PeftModel, plan: AdapterPlan, adapter_name: str = "default", method: str = ""
) -> dict[str, float]:
    """Copy a plan's factors into the adapter of a wrapped model, rewriting the base if planned.

    Nothing is changed unless everything fits. A rewritten base is recorded, under the method's
    name, in the adapter's configuration; see :mod:`cntlora_core.adapter.record`.

    Returns:
        For each point, what rounding the rewritten weight to its dtype lost, relative to the
        weight's norm; zeros where the base stays.

    Raises:
        ValueError: if a point is not wrapped, or wrapped at another rank or scaling, or if its
            weight cannot be rewritten as planned.
    """
    layers = adapter_layers(peft_model)
    check_materialised(peft_model, adapter_name)
    _check_fits(layers, plan, adapter_name)
    fingerprints = {}
    if plan.rewrites_base:
        bases = {name: layers[name].get_base_layer() for name in plan.factors}
        check_rewritable(peft_model, bases)
        fingerprints = fingerprints_of(bases)
    mended = match_convolutions(peft_model)
    if mended:
        logger.warning(
            "the installed peft leaves dilation or padding_mode out of the adapters of "
            "convolutions (%s): where this adapter is loaded, call "
            "cntlora_core.match_convolutions(model) after PeftModel.from_pretrained",
            ", ".join(mended[:3]),
        )
    rounding = {}
    for name, factors in plan.factors.items():
        layer = layers[name]
        down, up = adapter_weights(layer, adapter_name)
        down.copy_(factors.down.reshape(down.shape))
        up.copy_(factors.up.reshape(up.shape))
        bias = getattr(layer.lora_B.get_submodule(adapter_name), "bias", None)
        if bias is not None:
            bias.zero_()
        if layer.use_dora.get(adapter_name):
            # Its magnitudes were taken from the factors that have just been replaced.
            layer.lora_variant[adapter_name].init(layer, adapter_name=adapter_name)
        stored = _stored(layer, adapter_name, factors)
        rounding[name] = (
            subtract_from_weight(layer.get_base_layer(), stored.up, stored.down, stored.scaling)
            if plan.rewrites_base
            else 0.0
        )
    if plan.rewrites_base:
        stored = stored_plan(peft_model, plan, adapter_name)
        record = InitializationRecord(stored, method, fingerprints)
        remember_rewriting(peft_model, adapter_name, record)
    return rounding


def check_materialised(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter that has no memory of its own.

    Raises:
        ValueError: if a parameter of the adapter is on the meta device.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta and adapter_name in name.split("."):
            raise ValueError(
                f"{name!r} is on the meta device, without values: wrap the model without "
                "low_cpu_mem_usage=True, which is for adapters that are loaded afterwards"
            )


def _check_fits(layers: Mapping[str, LoraLayer], plan: AdapterPlan, adapter_name: str) -> None:
    more = {n for n, layer in layers.items() if adapter_name in layer.lora_A} - set(plan.factors)
    if more:
        raise ValueError(f"{sorted(more)[:3]} carry the adapter but are not in the plan")
    for name, factors in plan.factors.items():
        layer = layers.get(name)
        if layer is None or adapter_name not in layer.lora_A:
            raise ValueError(f"{name!r} carries no adapter {adapter_name!r}")
        rank, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
        if rank != factors.rank:
            raise ValueError(f"{name!r} has rank {rank}, the plan has {factors.rank}")
        if abs(scaling - factors.scaling) > 1e-6 * abs(factors.scaling):
            raise ValueError(f"{name!r} has scaling {scaling}, the plan {factors.scaling}")


def stored_plan(
    peft_model: nn.Module, plan: AdapterPlan, adapter_name: str = "default"
) -> AdapterPlan:
    """The plan as a model has just taken it: rounded where its adapter is in half precision."""
    layers = adapter_layers(peft_model)
    factors = {name: _stored(layers[name], adapter_name, f) for name, f in plan.factors.items()}
    return dataclasses.replace(plan, factors=factors)


def _stored(layer: LoraLayer, adapter_name: str, factors: Factors) -> Factors:
    down, up = (weight.detach() for weight in adapter_weights(layer, adapter_name))
    if down.dtype == up.dtype == torch.float32:
        return factors
    return dataclasses.replace(
        factors, down=down.float().flatten(1).cpu(), up=up.float().flatten(1).cpu()
    )


def match_convolutions(model: nn.Module) -> list[str]:
    """Make adapters of convolutions look at their inputs as the convolutions themselves do.

    peft builds the down convolution without the base's dilation and padding mode (as of 0.21). An
    initialisation is put right when it is copied in; an adapter that ``PeftModel.from_pretrained``
    loads needs this call afterwards. Kernels stay the same parameters, and merging needs no such
    care.

    Returns:
        The names of what was changed.
    """
    changed = []
    for name, layer in adapter_layers(model).items():
        base = layer.get_base_layer()
        for adapter_name, down in list(layer.lora_A.items()):
            if isinstance(base, nn.Conv2d) and isinstance(down, nn.Conv2d):
                if same_geometry(down, base):
                    continue
                layer.lora_A[adapter_name] = with_geometry_of(down, base)
                changed.append(name)
    return changed


def adapter_weights(
    layer: LoraLayer, adapter_name: str = "default"
) -> tuple[nn.Parameter, nn.Parameter]:
    """The down (r, d_in) and the up (d_out, r) matrix of an adapter; kernels of a convolution."""
    down = layer.lora_A.get_submodule(adapter_name).weight
    up = layer.lora_B.get_submodule(adapter_name).weight
    assert isinstance(down, nn.Parameter)
    assert isinstance(up, nn.Parameter)
    return down, up


def adapter_layers(model: nn.Module) -> Mapping[str, LoraLayer]:
    """peft's LoRA layers by the name that the module had before it was wrapped."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def anchored(name: str) -> str:
    """A pattern for peft that matches this module and no other."""
    return f"^{re.escape(name)}"


def alpha_of(scaling: float, rank: int, use_rslora: bool) -> float:
    """The alpha that gives a scaling at a rank."""
    return scaling * (rank**0.5 if use_rslora else rank)
