"""The public way in for any model: base model + data -> model with a data-driven adapter."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from cntlora_core.adapter import (
    AdapterPlan,
    adapter_layers,
    check_lora_config,
    copy_factors,
    inject_adapter,
    plan_adapter,
)
from cntlora_core.attachment import AttachmentPoint, attachment_point, find_attachment_points
from cntlora_core.capture import CapturedMoments, SharedInputError, capture_moments
from cntlora_core.config import CNTLoRAConfig

logger = logging.getLogger(__name__)

ROUNDING_TO_MENTION = 2e-3
"""Relative loss of a rewritten base weight above which a person should know of it."""

ForwardFn = Callable[[nn.Module, Any], Any]
ProgressFn = Callable[[int, int], None]


@dataclass(frozen=True)
class InitReport:
    """What an initialisation did.

    Attributes:
        points: How many attachment points there are.
        distinct_inputs: How many different tensors they read.
        rows: By point, how many rows (tokens) its second moment was taken over.
        ranks: By point.
        filled: By point, how many directions the data did not support, where there are any.
        capture_seconds: Forward passes and sums.
        solve_seconds: Eigenproblems, ranks and factors.
        config: The settings.
        rounding: The most that a rewritten base weight lost by rounding to its data type, relative
            to its norm; 0 where no base was rewritten.
    """

    points: int
    distinct_inputs: int
    rows: dict[str, int]
    ranks: dict[str, int]
    filled: dict[str, int]
    capture_seconds: float
    solve_seconds: float
    config: CNTLoRAConfig
    rounding: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """One sentence for a person."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        text = (
            f"{self.points} attachment points, {self.distinct_inputs} distinct inputs, "
            f"ranks {low} to {high}; {self.capture_seconds:.1f} s of forward passes, "
            f"{self.solve_seconds:.1f} s of linear algebra"
        )
        if self.filled:
            text += (
                f"; the data supported fewer directions than ranks at {len(self.filled)} points "
                f"({sum(self.filled.values())} directions start as plain LoRA)"
            )
        if self.rounding > ROUNDING_TO_MENTION:
            text += (
                f"; rounding the rewritten base weight lost up to {self.rounding:.1%} of it: keep "
                "the base in float32, or use preserve_output=False"
            )
        return text


def default_forward(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for mappings, ``model(*batch)`` for sequences, ``model(batch)`` else."""
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        return model(**{k: _to(v, device) for k, v in batch.items()})
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return model(*(_to(v, device) for v in batch))
    return model(_to(batch, device))


def collect_moments(
    model: nn.Module,
    points: Sequence[AttachmentPoint],
    batches: Iterable[Any],
    *,
    forward_fn: ForwardFn | None = None,
    progress: ProgressFn | None = None,
) -> CapturedMoments:
    """Run the batches through the frozen model, in eval mode, and sum up what the points read.

    A mapping with an ``attention_mask`` of (batch, tokens) keeps padding out of the moments.

    Args:
        model: What ``forward_fn`` is given; its training flags are restored.
        points: Attachment points within it.
        batches: A dataloader or any iterable.
        forward_fn: ``forward_fn(model, batch)`` runs one forward pass.
        progress: Called with (batches done, total or 0) after each batch.
    """
    forward_fn = forward_fn or default_forward
    training = {name: module.training for name, module in model.named_modules()}
    total = len(batches) if hasattr(batches, "__len__") else 0  # pyright: ignore[reportArgumentType]
    model.eval()
    try:
        try:
            return _run(model, points, batches, forward_fn, progress, total, True)
        except SharedInputError as error:
            if iter(batches) is batches:
                raise
            logger.info("%s; capturing again without sharing", error)
            return _run(model, points, batches, forward_fn, progress, total, False)
    finally:
        for name, module in model.named_modules():
            module.training = training[name]


def _run(
    model: nn.Module,
    points: Sequence[AttachmentPoint],
    batches: Iterable[Any],
    forward_fn: ForwardFn,
    progress: ProgressFn | None,
    total: int,
    share_inputs: bool,
) -> CapturedMoments:
    done = 0
    with capture_moments(points, share_inputs=share_inputs) as capture:
        for done, batch in enumerate(batches, 1):
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            capture.set_mask(mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None)
            forward_fn(model, batch)
            capture.end_batch()
            if progress is not None:
                progress(done, total)
    if done == 0:
        raise ValueError("there are no batches to read activations from: give at least one")
    return capture.result()


def get_cntlora_model(
    model: nn.Module,
    lora_config: LoraConfig,
    cntlora_config: CNTLoRAConfig | None,
    dataloader: Iterable[Any],
    *,
    forward_fn: ForwardFn | None = None,
    progress: ProgressFn | None = None,
) -> PeftModel:
    """Wrap a base model with an adapter that starts from the data.

    Moments are taken on the base model, ranks are decided, then the adapter is injected once, with
    ``rank_pattern`` and ``alpha_pattern`` written for it.

    With ``preserve_output`` the frozen weights are rewritten. To save such a model so that it loads
    onto the stock base, save the start first and let peft subtract it, as for PiSSA:
    ``model.save_pretrained("start")`` before training, and after it
    ``model.save_pretrained("trained", path_initial_model_for_weight_conversion="start")``.

    Args:
        model: The base model; its targeted modules are wrapped in place.
        lora_config: peft's configuration; rank patterns are written for it.
        cntlora_config: The method's settings; None for the defaults.
        dataloader: Batches of the data to adapt to; any iterable.
        forward_fn: ``forward_fn(model, batch)`` runs one forward pass.
        progress: Called with (batches done, total).

    Returns:
        A :class:`peft.PeftModel`; its ``cntlora_report`` is an :class:`InitReport`, its
        ``cntlora_plan`` the :class:`AdapterPlan` with the starting factors.

    Example:
        >>> model = get_cntlora_model(base, LoraConfig(r=16, lora_alpha=32,
        ...     target_modules=["query", "value"]), CNTLoRAConfig(constraint="cross"), dataloader)
    """
    config = cntlora_config or CNTLoRAConfig()
    check_lora_config(lora_config, config.preserve_output)
    points = find_attachment_points(model, lora_config)
    plan, report = _plan(model, points, lora_config, config, dataloader, forward_fn, progress)
    peft_model, rounding = inject_adapter(model, lora_config, plan)
    return _leave_record(peft_model, plan, report, rounding)


def initialize_lora_cntlora_weights(
    peft_model: PeftModel,
    dataloader: Iterable[Any],
    cntlora_config: CNTLoRAConfig | None = None,
    *,
    adapter_name: str = "default",
    forward_fn: ForwardFn | None = None,
    progress: ProgressFn | None = None,
) -> PeftModel:
    """Give an already wrapped model a data-driven start, at the ranks that it has.

    Only ``rank_budget="fixed"`` makes sense here: the ranks stand.

    Raises:
        ValueError: for a shared rank budget or ranks that differ between points.
    """
    config = cntlora_config or CNTLoRAConfig(rank_budget="fixed")
    if config.rank_budget != "fixed":
        raise ValueError(
            f"the model is wrapped already, so its ranks stand: rank_budget={config.rank_budget!r} "
            "needs get_cntlora_model; use rank_budget='fixed' here"
        )
    lora_config = peft_model.peft_config[adapter_name]
    assert isinstance(lora_config, LoraConfig)
    check_lora_config(lora_config, config.preserve_output)
    points = [
        attachment_point(name, layer.get_base_layer())
        for name, layer in adapter_layers(peft_model).items()
        if adapter_name in layer.lora_A
    ]
    with peft_model.disable_adapter():
        plan, report = _plan(
            peft_model, points, lora_config, config, dataloader, forward_fn, progress
        )
    rounding = copy_factors(peft_model, plan, adapter_name)
    return _leave_record(peft_model, plan, report, rounding)


def _plan(
    model: nn.Module,
    points: Sequence[AttachmentPoint],
    lora_config: LoraConfig,
    config: CNTLoRAConfig,
    dataloader: Iterable[Any],
    forward_fn: ForwardFn | None,
    progress: ProgressFn | None,
) -> tuple[AdapterPlan, InitReport]:
    start = time.perf_counter()
    captured = collect_moments(model, points, dataloader, forward_fn=forward_fn, progress=progress)
    middle = time.perf_counter()
    root = lora_config.r**0.5 if lora_config.use_rslora else lora_config.r
    plan = plan_adapter(
        points, captured, config, rank=lora_config.r, scaling=lora_config.lora_alpha / root
    )
    end = time.perf_counter()
    return plan, report_of(plan, captured, config, middle - start, end - middle)


def report_of(
    plan: AdapterPlan,
    captured: CapturedMoments,
    config: CNTLoRAConfig,
    capture_seconds: float,
    solve_seconds: float,
) -> InitReport:
    return InitReport(
        points=len(plan.factors),
        distinct_inputs=len(captured.moments),
        rows={name: captured.of(name).count for name in plan.factors},
        ranks=plan.ranks,
        filled=plan.filled,
        capture_seconds=capture_seconds,
        solve_seconds=solve_seconds,
        config=config,
    )


def _leave_record(
    peft_model: PeftModel, plan: AdapterPlan, report: InitReport, rounding: dict[str, float]
) -> PeftModel:
    report = dataclasses.replace(report, rounding=max(rounding.values(), default=0.0))
    object.__setattr__(peft_model, "cntlora_plan", plan)
    object.__setattr__(peft_model, "cntlora_report", report)
    return peft_model


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
