"""The two kinds of adapter that a run can train, behind one face: LoRA and LAVA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from peft import LoraConfig
from torch import Tensor, nn

from cntlora_core.adapter.inject import AdapterPlan, adapter_layers, adapter_weights, inject_adapter
from cntlora_core.diffusion.settings import AdapterSettings

if TYPE_CHECKING:
    from cntlora_core.lava import LavaConfig
    from cntlora_core.lava.factors import LavaPlan

    Plan = AdapterPlan | LavaPlan
else:
    Plan = AdapterPlan


UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def unet_lora_config(settings: AdapterSettings) -> LoraConfig:
    """peft's configuration for the denoiser's attention."""
    return _lora_config(settings, UNET_TARGETS)


def text_encoder_lora_config(settings: AdapterSettings) -> LoraConfig:
    """peft's configuration for the text encoder's attention."""
    return _lora_config(settings, TEXT_ENCODER_TARGETS)


def _lora_config(settings: AdapterSettings, targets: Sequence[str]) -> LoraConfig:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=list(targets),
    )


def lava_config(settings: AdapterSettings) -> LavaConfig:
    """LAVA's configuration; a plan says which modules it is for, at which ranks."""
    from cntlora_core.lava import LavaConfig

    return LavaConfig(
        r=settings.rank,
        lava_alpha=settings.lora_alpha,
        orthogonality=settings.orthogonality,
        orthogonal_factors=list(settings.orthogonal_factors),
    )


def inject_plan(
    unet: nn.Module, text_encoder: nn.Module, settings: AdapterSettings, plan: Plan
) -> dict[str, float]:
    """Put a run's plan into its models.

    Returns:
        By attachment point: what rounding a rewritten base weight lost, relative to its norm.
    """
    parts = [(unet, "unet."), (text_encoder, "text_encoder.")]
    rounding: dict[str, float] = {}
    for model, prefix in parts:
        part = plan.for_prefix(prefix)
        if not part.factors:
            continue
        if isinstance(part, AdapterPlan):
            config = (unet_lora_config if model is unet else text_encoder_lora_config)(settings)
            rounding |= inject_adapter(model, config, part)[1]
        else:
            from cntlora_core.lava.inject import inject_lava

            rounding |= inject_lava(model, lava_config(settings), part)[1]
    return rounding


def trained_parameters(
    unet: nn.Module, text_encoder: nn.Module, plan: Plan
) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained tensors: ``<point>.down`` and ``.up``; with LAVA ``<point>.U``, ``.V``, ...."""
    for prefix, model in (("unet.", unet), ("text_encoder.", text_encoder)):
        if isinstance(plan, AdapterPlan):
            for name, layer in adapter_layers(model).items():
                down, up = adapter_weights(layer)
                yield f"{prefix}{name}.down", down
                yield f"{prefix}{name}.up", up
        else:
            from cntlora_core.lava.inject import lava_layers

            for name, layer in lava_layers(model).items():
                for key, factor in layer.factors("default").items():
                    yield f"{prefix}{name}.{key}", factor


def extra_loss(unet: nn.Module, text_encoder: nn.Module, plan: Plan) -> Callable[[], Tensor] | None:
    """What the adapters themselves add to the loss of a step; None where that is nothing."""
    if isinstance(plan, AdapterPlan):
        return None
    from cntlora_core.lava.orthogonality import OrthogonalityLoss

    term = OrthogonalityLoss(nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}))
    return term if term.factors and term().requires_grad else None
