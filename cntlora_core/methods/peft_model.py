"""The public way in for any model: base model + data -> model with a data-driven adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cntlora_core.activations.capture import CapturedMoments, ForwardFn, default_forward
from cntlora_core.activations.collection import ProgressFn, collect_moments
from cntlora_core.activations.token_masks import MaskFn, default_mask
from cntlora_core.adapter.inject import (
    AdapterPlan,
    adapter_layers,
    check_lora_config,
    check_materialised,
    copy_factors,
    inject_adapter,
    stored_plan,
)
from cntlora_core.adapter.record import base_is_rewritten, record_of
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.initialization.report import ROUNDING_TO_MENTION, InitializationReport
from cntlora_core.initialization.solve import solve
from cntlora_core.layers.attachment import AttachmentPoint, attachment_point, find_attachment_points
from cntlora_core.methods.cntlora import ranks_and_scalings
from cntlora_core.runtime.processes import Processes

__all__ = [
    "ROUNDING_TO_MENTION",
    "InitReport",
    "collect_moments",
    "default_forward",
    "default_mask",
    "get_cntlora_model",
    "initialize_lora_cntlora_weights",
]

InitReport = InitializationReport
_Wanted = tuple[list[AttachmentPoint], dict[str, int], dict[str, float]]
"""Attachment points, and by point its rank and its scaling."""

REWRITING_INITIALIZATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of peft's ``init_lora_weights`` that change the base weight."""


def get_cntlora_model(
    model: nn.Module,
    lora_config: LoraConfig,
    cntlora_config: CNTLoRAConfig | None = None,
    dataloader: Iterable[Any] | None = None,
    *,
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
    progress: ProgressFn | None = None,
    sum_across_processes: bool = True,
    moments: CapturedMoments | None = None,
) -> PeftModel:
    """Wrap a base model with an adapter that is initialised from the data.

    Moments are taken on the base model, ranks are decided, then the adapter is injected once, with
    ``rank_pattern`` and ``alpha_pattern`` written for it.

    With ``preserve_output`` the frozen weights are rewritten; :func:`cntlora_core.save_converted`
    saves the trained adapter so that it fits the stock base. Without the adapter (disabled,
    unloaded) such a model is the rewritten base, as with PiSSA.

    Under torch.distributed (Accelerate, torchrun) every process calls this with its own part of the
    data, before the model is wrapped for training, and all get the initialisation of all the data.

    Args:
        model: The base model; its targeted modules are wrapped in place.
        lora_config: peft's configuration; rank patterns are written for it. Patterns of its own
            are followed under ``rank_budget="fixed"``.
        cntlora_config: The method's settings; None for the defaults.
        dataloader: Batches of the data to adapt to; any iterable. None where ``moments``
            are given.
        forward_fn: ``forward_fn(model, batch)`` runs one forward pass; default: ``model(**batch)``
            for mappings, ``model(*batch)`` for sequences, ``model(batch)`` else.
        mask_fn: ``mask_fn(batch)`` gives the (batch, tokens) mask that is 1 where a token counts,
            None where all do; default: the model's own masks. See
            :meth:`~cntlora_core.activations.token_masks.TokenMasks.begin`.
        progress: Called with (batches done, total).
        sum_across_processes: False for a process that works by itself within a process group.
        moments: What :func:`cntlora_core.collect_moments` gave for this model's points, instead of
            the data; they stay as they are.

    Returns:
        A :class:`peft.PeftModel`; its ``cntlora_report`` is an :class:`InitializationReport`, its
        ``cntlora_plan`` the :class:`AdapterPlan` with the initial factors.

    Raises:
        ValueError, TypeError: for what does not go together, saying how to mend it.
        FloatingPointError: for activations that are not finite, naming the point and the batch.

    Example:
        >>> model = get_cntlora_model(base, LoraConfig(r=16, lora_alpha=32,
        ...     target_modules=["query", "value"]), CNTLoRAConfig(constraint="cross"), dataloader)
    """
    config = cntlora_config or CNTLoRAConfig()
    processes = Processes(sum_across_processes)

    def prepare() -> _Wanted:
        check_not_distributed(model)
        check_lora_config(lora_config, config.preserve_output)
        if isinstance(lora_config.init_lora_weights, str):
            raise ValueError(
                f"init_lora_weights={lora_config.init_lora_weights!r} asks for another "
                "initialisation than CNTLoRA's: leave it out"
            )
        points = find_attachment_points(model, lora_config)
        return points, *ranks_and_scalings(lora_config, points, config)

    points, ranks, scalings = processes.run(prepare, "preparing the initialisation")
    plan, report = solve(
        model,
        points,
        dataloader,
        config,
        rank=ranks,
        scaling=scalings,
        forward_fn=forward_fn,
        mask_fn=mask_fn,
        progress=progress,
        processes=processes,
        moments=moments,
    )
    peft_model, rounding = processes.run(
        lambda: inject_adapter(model, lora_config, plan, method=config.constraint),
        "wrapping the model",
    )
    return _with_report(peft_model, plan, report, rounding)


def initialize_lora_cntlora_weights(
    peft_model: PeftModel,
    dataloader: Iterable[Any],
    cntlora_config: CNTLoRAConfig | None = None,
    *,
    adapter_name: str = "default",
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
    progress: ProgressFn | None = None,
    sum_across_processes: bool = True,
) -> PeftModel:
    """Give one adapter of a wrapped model a data-driven initialisation, at the ranks that it has.

    Only ``rank_budget="fixed"`` makes sense here: the ranks stand. Activations are those of the
    base, all adapters being disabled. Other adapters stay as they are, which is why
    ``preserve_output`` is refused where there are any: they were made for the base weight as it is.

    Args:
        peft_model: The wrapped model.
        dataloader: As in :func:`get_cntlora_model`, like all that is not named here.
        cntlora_config: The method's settings; default: those of ``rank_budget="fixed"``.
        adapter_name: Which adapter; the others are not touched.
        forward_fn: See there.
        mask_fn: See there.
        progress: See there.
        sum_across_processes: See there.

    Raises:
        ValueError: for a shared rank budget, an adapter that is not there or is merged, or a base
            weight that must not be rewritten (other adapters, quantised or tied weights).
    """
    config = cntlora_config or CNTLoRAConfig(rank_budget="fixed")
    processes = Processes(sum_across_processes)

    def prepare() -> _Wanted:
        if config.rank_budget != "fixed":
            raise ValueError(
                "the model is wrapped already, so its ranks stand: "
                f"rank_budget={config.rank_budget!r} needs get_cntlora_model; use "
                "rank_budget='fixed' here"
            )
        _check_wrapped(peft_model, adapter_name, config)
        layers = {
            name: layer
            for name, layer in adapter_layers(peft_model).items()
            if adapter_name in layer.lora_A
        }
        points = [attachment_point(n, layer.get_base_layer()) for n, layer in layers.items()]
        if not points:
            raise ValueError(
                f"adapter {adapter_name!r} has no layer that an initialisation is known for"
            )
        ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
        scalings = {name: layer.scaling[adapter_name] for name, layer in layers.items()}
        return points, ranks, scalings

    points, ranks, scalings = processes.run(prepare, "preparing the initialisation")
    with peft_model.disable_adapter():
        plan, report = solve(
            peft_model,
            points,
            dataloader,
            config,
            rank=ranks,
            scaling=scalings,
            forward_fn=forward_fn,
            mask_fn=mask_fn,
            progress=progress,
            processes=processes,
        )
    rounding = processes.run(
        lambda: copy_factors(peft_model, plan, adapter_name, config.constraint),
        "copying the initialisation",
    )
    plan = stored_plan(peft_model, plan, adapter_name)
    return _with_report(peft_model, plan, report, rounding)


def check_not_distributed(model: nn.Module) -> None:
    """Refuse a model that is wrapped for training already.

    Raises:
        ValueError: if it is.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel: give the model within (model.module) "
            "and wrap what comes back"
        )


def _check_wrapped(peft_model: PeftModel, adapter_name: str, config: CNTLoRAConfig) -> None:
    check_not_distributed(peft_model)
    if not isinstance(peft_model, PeftModel):
        raise TypeError(
            f"expected a peft.PeftModel, got a {type(peft_model).__name__}; for a base model use "
            "get_cntlora_model"
        )
    if adapter_name not in peft_model.peft_config:
        raise ValueError(
            f"there is no adapter {adapter_name!r}; the model has {sorted(peft_model.peft_config)}"
        )
    lora_config = peft_model.peft_config[adapter_name]
    if not isinstance(lora_config, LoraConfig):
        raise TypeError(
            f"adapter {adapter_name!r} is of {type(lora_config).__name__}; an initialisation is "
            "known for LoraConfig"
        )
    check_lora_config(lora_config, config.preserve_output)
    before = str(lora_config.init_lora_weights).lower()
    if before.startswith(REWRITING_INITIALIZATIONS):
        raise ValueError(
            f"adapter {adapter_name!r} was made with init_lora_weights={before!r}, which has "
            "changed the base weights: make it with init_lora_weights=True"
        )
    merged = [n for n, layer in adapter_layers(peft_model).items() if layer.merged]
    if merged:
        raise ValueError(
            f"adapters are merged into the base weight of {merged[0]!r}: call unmerge_adapter() "
            "first"
        )
    rewritten = [name for name in peft_model.peft_config if record_of(peft_model, name)]
    if base_is_rewritten(peft_model):
        raise ValueError(
            f"the base weights were rewritten for the initialisation of adapter "
            f"{', '.join(rewritten)!r}, "
            "so that they are no longer those of the base model: load it anew"
        )
    check_materialised(peft_model, adapter_name)
    others = sorted(set(peft_model.peft_config) - {adapter_name})
    if others and config.preserve_output:
        raise ValueError(
            "preserve_output=True would rewrite the base weights, which the other adapters "
            f"{others} were made for: use preserve_output=False, or another copy of the model"
        )


def _with_report(
    peft_model: PeftModel,
    plan: AdapterPlan,
    report: InitializationReport,
    rounding: dict[str, float],
) -> PeftModel:
    report = dataclasses.replace(report, rounding=max(rounding.values(), default=0.0))
    object.__setattr__(peft_model, "cntlora_plan", plan)
    object.__setattr__(peft_model, "cntlora_report", report)
    return peft_model
