"""LoRA-GA (arXiv 2407.05000) by peft's own code: initialised along the gradient of the weights."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cntlora_core.activations.capture import ForwardFn, default_forward, length_of
from cntlora_core.adapter.inject import AdapterPlan
from cntlora_core.initialization.report import InitializationReport
from cntlora_core.layers.attachment import AttachmentPoint
from cntlora_core.methods.base import InitializationRequest, PlannedInitialization
from cntlora_core.methods.from_weights import factors_by_peft, pattern_of, require_rank, seeded
from cntlora_core.methods.rows import repeatable

NAME = "lora_ga"
_LEFT_BEHIND = ("_peft_loraga_grad", "_peft_loraga_grad_count")


def plan_lora_ga(request: InitializationRequest) -> PlannedInitialization:
    """Factors from the leading singular vectors of each weight's gradient over the data.

    The gradient is taken on the model itself, whose weights and settings are as before afterwards.

    Raises:
        ValueError: without data or a loss, or for a rank above half a point's width: up and down
            take different singular vectors.
        FloatingPointError: for a loss or gradient that is not finite.
        ImportError: where the installed peft has no LoRA-GA.
    """
    preprocess, config_class = _from_peft()
    require_rank(NAME, request, lambda point: point.max_rank // 2, "min(d_in, d_out) / 2")
    batches = repeatable(request.batches, NAME)
    given = request.lora_config.lora_ga_config if request.lora_config is not None else None
    config = given or config_class()
    loss_of = request.loss_fn or _default_loss(request.forward_fn)
    seconds = {"passes": 0.0}

    def passes() -> None:
        start, done, total = time.perf_counter(), 0, length_of(batches)
        for done, batch in enumerate(batches, 1):
            loss = loss_of(request.model, batch)
            _check_loss(loss, done)
            loss.backward()
            if request.passes_progress is not None:
                request.passes_progress(done, total)
        if done == 0:
            raise ValueError("there are no batches to take gradients of: give at least one")
        seconds["passes"] = time.perf_counter() - start

    started = time.perf_counter()
    with torch.inference_mode(False), seeded(request.seed):
        gradients = _gradients(request, config, preprocess, passes)
        factors = {}
        for done, point in enumerate(request.points, 1):
            factors[point.name] = factors_by_peft(
                point,
                request,
                NAME,
                rewrites_base=True,
                prepare=lambda linear, gradient=gradients[point.name]: setattr(
                    linear, "_peft_loraga_grad", gradient
                ),
                lora_ga_config=config,
            )
            if request.solve_progress is not None:
                request.solve_progress(done, len(request.points))
    plan = AdapterPlan(factors, rewrites_base=True)
    rest = time.perf_counter() - started - seconds["passes"]
    return PlannedInitialization(
        plan, InitializationReport(NAME, plan.ranks, seconds["passes"], rest)
    )


def _gradients(
    request: InitializationRequest,
    config: Any,
    preprocess: Callable[..., None],
    passes: Callable[[], None],
) -> dict[str, Tensor]:
    """By point, the (d_out, d_in) gradient of its weight, averaged over the passes."""
    model = request.model
    training = {name: module.training for name, module in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    kept = {name: p.grad for name, p in model.named_parameters()}
    failures: list[BaseException] = []

    def train_step() -> None:
        # peft takes its hooks off after this, but not when it raises.
        try:
            passes()
        except BaseException as error:
            failures.append(error)

    lora_config = LoraConfig(
        r=request.rank,
        target_modules=pattern_of(request.points),
        init_lora_weights=NAME,  # pyright: ignore[reportArgumentType]
        lora_ga_config=config,
    )
    try:
        for parameter in model.parameters():
            parameter.grad = None
        try:
            with warnings.catch_warnings():
                # The first layer's inputs need no gradient: nothing is amiss.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                preprocess(model, lora_config, train_step)
        except Exception:
            if not failures:
                raise
        if failures:
            raise failures[0]
        return {point.name: _gradient_of(point) for point in request.points}
    finally:
        for point in request.points:
            for leftover in _LEFT_BEHIND:
                point.module.__dict__.pop(leftover, None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
            parameter.grad = kept[name]
        for name, module in model.named_modules():
            module.training = training[name]


def _gradient_of(point: AttachmentPoint) -> Tensor:
    gradient = point.module.__dict__.get("_peft_loraga_grad")
    if gradient is None:
        raise ValueError(
            f"method {NAME!r}: no gradient reached {point.name!r}: leave it out of "
            "target_modules (peft's LoRA-GA knows linear layers only), or give a loss that "
            "depends on it"
        )
    gradient = gradient.float()
    if not torch.isfinite(gradient).all():
        raise FloatingPointError(
            f"the gradient of {point.name!r} is not finite: run the model in float32 or bfloat16"
        )
    if isinstance(point.module, Conv1D):
        gradient = gradient.T
    return gradient.flatten(1)


def _default_loss(forward_fn: ForwardFn | None) -> ForwardFn:
    forward = forward_fn or default_forward

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        output = forward(model, batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"method {NAME!r} needs a loss to take the gradient of, and the model's output has "
                "none: put labels into the batches, or give loss_fn(model, batch)"
            )
        return loss

    return loss_of


def _check_loss(loss: Any, batch: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss_fn must give a scalar tensor, got {type(loss).__name__}")
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss of batch {batch} is {loss.item()}: look for NaN in that batch, or run the "
            "model in float32 or bfloat16"
        )


def _from_peft() -> tuple[Any, Any]:
    try:
        from peft import LoraGAConfig
        from peft.tuners.lora.loraga import preprocess_loraga
    except ImportError as error:
        raise ImportError(
            f"the installed peft has no LoRA-GA ({error}): upgrade peft, see constraints.txt"
        ) from error
    return preprocess_loraga, LoraGAConfig
