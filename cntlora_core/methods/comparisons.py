"""Runs to compare with, which are no plain LoRA once initialised: peft wraps the model itself."""

from __future__ import annotations

import copy
import time

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
from torch import nn

from cntlora_core.initialization.report import InitializationReport
from cntlora_core.methods.base import InitializationRequest, WrappedModel
from cntlora_core.methods.from_weights import pattern_of

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
    """A quantised base and the low-rank part of what that loses (arXiv 2310.08659).

    Raises:
        ValueError: where it cannot run, and for alpha other than the rank: peft's factors leave the
            scaling out, so that any other one would not make up for the loss.
    """
    _require_loftq()
    if request.scaling != 1.0:
        raise ValueError(
            f"method 'loftq' needs lora_alpha equal to r (scaling 1, not {request.scaling:g}): "
            "peft's LoftQ factors leave the scaling out of account"
        )
    config = copy.deepcopy(lora_config)
    config.init_lora_weights = "loftq"
    config.loftq_config = config.loftq_config or vars(LoftQConfig())
    return _wrapped("loftq", model, config, request)


def _require_loftq() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("bitsandbytes", "scipy") if find_spec(name) is None]
    device = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
    if device and not missing:
        return
    lacks = [*missing, *([] if device else ["a CUDA or XPU device"])]
    raise ValueError(
        "method 'loftq' cannot run here: peft quantises with bitsandbytes on a CUDA or XPU device, "
        f"and there is no {', no '.join(lacks)}. Run it on a GPU with `pip install bitsandbytes "
        "scipy`, or use pissa, the same idea without quantisation"
    )


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
