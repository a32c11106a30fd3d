"""Runs to compare with, which are no plain LoRA once initialised: peft wraps the model itself."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import cast

import torch
from peft import (
    AdaLoraConfig,
    AdaLoraModel,
    LoftQConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cntlora_core.adapter.inject import adapter_layers, adapter_weights
from cntlora_core.initialization.report import InitializationReport
from cntlora_core.layers.attachment import AttachmentPoint
from cntlora_core.layers.weights import check_rewritable
from cntlora_core.methods.base import InitializationRequest, WrappedModel
from cntlora_core.methods.from_weights import pattern_of, require_rank

INITIAL_RANK_FACTOR = 1.5
"""AdaLoRA starts this much wider than the rank that is left in the end, as in its paper."""


def wrap_dora(
    model: nn.Module, lora_config: LoraConfig, request: InitializationRequest
) -> WrappedModel:
    """LoRA whose outputs' weight norms are trained apart (arXiv 2402.09353)."""
    config = copy.deepcopy(lora_config)
    config.use_dora = True
    config.init_lora_weights = True
    return _wrapped("dora", model, config, request)


def wrap_loftq(
    model: nn.Module, lora_config: LoraConfig, request: InitializationRequest
) -> WrappedModel:
    """A base rounded to 4 bits (NF4) and the low-rank part of what that loses (arXiv 2310.08659).

    As peft's, and also without a GPU and with any scaling. The rounded weights keep their data
    type and size.

    Raises:
        ValueError: without bitsandbytes, which rounds; for ``loftq_bits`` other than 4; for a rank
            above that of a weight; for weights that cannot be rewritten.
    """
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "method 'loftq' rounds weights by bitsandbytes, which is not installed: pip install "
            "bitsandbytes, or use pissa, the same idea without quantisation"
        )
    config = copy.deepcopy(lora_config)
    asked = LoftQConfig(**cast(dict[str, int], config.loftq_config or {}))
    if asked.loftq_bits != 4 or asked.loftq_iter < 1:
        raise ValueError(
            "method 'loftq' rounds to 4 bits, in one iteration or more: got loftq_bits="
            f"{asked.loftq_bits} and loftq_iter={asked.loftq_iter}"
        )
    check_rewritable(model, {point.name: point.module for point in request.points})
    require_rank("loftq", request, lambda point: point.max_rank, "min(d_in, d_out)")
    config.init_lora_weights, config.loftq_config = True, {}
    wrapped = _wrapped("loftq", model, config, request)
    start = time.perf_counter()
    layers = adapter_layers(wrapped.model)
    for point in request.points:
        _make_up_for_rounding(point, layers[point.name], asked.loftq_iter)
    took = wrapped.report.solve_seconds + time.perf_counter() - start
    return replace(wrapped, report=replace(wrapped.report, solve_seconds=took))


@torch.no_grad()
def _make_up_for_rounding(point: AttachmentPoint, layer: LoraLayer, iterations: int) -> None:
    """Round the point's weight; up and down share the square roots of the singular values."""
    from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports]
        dequantize_4bit,
        quantize_4bit,
    )

    down, up = adapter_weights(layer)
    exact = point.weight().contiguous()
    rounded, made_up = exact, torch.zeros_like(exact)
    for _ in range(iterations):
        rounded = dequantize_4bit(*quantize_4bit(exact - made_up, quant_type="nf4"))
        u, s, vh = torch.linalg.svd(exact - rounded, full_matrices=False)
        root = s[: len(down)].sqrt()
        left, right = u[:, : len(down)] * root, root[:, None] * vh[: len(down)]
        made_up = left @ right
        down.copy_(right.reshape(down.shape))
        up.copy_(left.reshape(up.shape) / layer.scaling["default"])
    weight = point.module.weight
    assert isinstance(weight, Tensor)
    weight.copy_((rounded.T if isinstance(point.module, Conv1D) else rounded).reshape(weight.shape))


def wrap_adalora(
    model: nn.Module, lora_config: LoraConfig, request: InitializationRequest
) -> WrappedModel:
    """Ranks pruned while training, from 1.5 times the rank to the rank (arXiv 2303.10512).

    The first tenth of the steps trains at full width, the last fifth at the final ranks. The
    scaling at the start is that of the other methods.

    Raises:
        ValueError: without the number of steps that will follow.
    """
    steps = request.steps
    if steps is None or steps < 2:
        raise ValueError(
            f"method 'adalora' prunes by a schedule: give steps, how many training steps will "
            f"follow (at least 2), got {steps}"
        )
    initial = max(request.rank, round(INITIAL_RANK_FACTOR * request.rank))
    config = AdaLoraConfig(
        target_r=request.rank,
        init_r=initial,
        # peft divides alpha by the initial rank.
        lora_alpha=request.scaling * initial,  # pyright: ignore[reportArgumentType]
        total_step=steps,
        tinit=steps // 10,
        tfinal=steps // 5,
        deltaT=max(1, steps // 100),
        target_modules=pattern_of(request.points),
        lora_dropout=lora_config.lora_dropout,
        bias=lora_config.bias,
        modules_to_save=lora_config.modules_to_save,
        task_type=lora_config.task_type,
    )
    wrapped = _wrapped("adalora", model, config, request)

    def after_step(step: int) -> None:
        assert isinstance(wrapped.model, PeftModel)
        adalora = wrapped.model.base_model
        assert isinstance(adalora, AdaLoraModel)
        adalora.update_and_allocate(step)

    return WrappedModel(wrapped.model, wrapped.report, after_step=after_step)


class AdaLoraOrthogonality:
    """The regulariser of AdaLoRA (arXiv 2303.10512, equation 4) as peft weighs it, a callable
    without arguments: peft adds it to the loss of models with a task type alone.

    Args:
        model: A peft model with an AdaLoRA adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        assert isinstance(model, PeftModel)
        config = model.active_peft_config
        assert isinstance(config, AdaLoraConfig)
        self.weight = config.orth_reg_weight
        self.factors = [
            parameter.T if ".lora_B." in name else parameter
            for name, parameter in model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        ]

    def __call__(self) -> Tensor:
        """A scalar: the mean over the factors of how far their vectors are from orthonormal."""
        terms = [
            (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).norm()
            for rows in self.factors
        ]
        return self.weight * torch.stack(terms).mean()


def wrap_vera(
    model: nn.Module, lora_config: LoraConfig, request: InitializationRequest
) -> WrappedModel:
    """Two trained vectors a layer around shared random matrices (arXiv 2310.11454)."""
    config = VeraConfig(
        r=request.rank,
        target_modules=pattern_of(request.points),
        projection_prng_key=request.seed,
        vera_dropout=lora_config.lora_dropout,
        bias=lora_config.bias.replace("lora", "vera"),
        modules_to_save=lora_config.modules_to_save,
        task_type=lora_config.task_type,
    )
    return _wrapped("vera", model, config, request)


def wrap_full(
    model: nn.Module, _lora_config: LoraConfig, _request: InitializationRequest
) -> WrappedModel:
    """Every floating-point weight of the model trains, in place and in its own data type."""
    notes = []
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
            if parameter.dtype != torch.float32 and not notes:
                notes.append(
                    f"weights train in {parameter.dtype}: small steps are rounded away; load the "
                    "model in float32, or train under autocast"
                )
    return WrappedModel(model, InitializationReport("full", {}, 0.0, 0.0, notes=tuple(notes)))


def wrap_bitfit(
    model: nn.Module, lora_config: LoraConfig, _request: InitializationRequest
) -> WrappedModel:
    """The model's biases and the modules to save train, in place (arXiv 2106.10199).

    Raises:
        ValueError: if the model has no biases.
    """
    heads = tuple(lora_config.modules_to_save or ())
    biases = 0
    for name, parameter in model.named_parameters():
        is_bias = name.endswith("bias")
        biases += is_bias
        parameter.requires_grad_(is_bias or any(part in heads for part in name.split(".")))
    if not biases:
        raise ValueError(
            "method 'bitfit' trains biases, and this model has none: use lora, or vera, which "
            "trains as few numbers"
        )
    return WrappedModel(model, InitializationReport("bitfit", {}, 0.0, 0.0))


def _wrapped(
    name: str, model: nn.Module, config: PeftConfig, request: InitializationRequest
) -> WrappedModel:
    start = time.perf_counter()
    peft_model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    ranks = {point.name: request.rank for point in request.points}
    return WrappedModel(
        peft_model, InitializationReport(name, ranks, 0.0, time.perf_counter() - start)
    )
