"""The two kinds of adapter that a run can train, behind one face: LoRA and LAVA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from torch import Tensor, nn

from cntlora_core.adapter.inject import AdapterPlan, adapter_layers, adapter_weights, inject_adapter
from cntlora_core.diffusion.family import UNET, Networks
from cntlora_core.diffusion.settings import AdapterSettings
from cntlora_core.runtime.precision import multiply_in

if TYPE_CHECKING:
    from cntlora_core.lava import LavaConfig
    from cntlora_core.lava.factors import LavaPlan

    Plan = AdapterPlan | LavaPlan
else:
    Plan = AdapterPlan


UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def targets(component: str) -> tuple[str, ...]:
    """What names of adapted modules end in: the attention of the denoiser or a text encoder."""
    return UNET_TARGETS if component == UNET else TEXT_ENCODER_TARGETS


def lora_config(component: str, settings: AdapterSettings) -> LoraConfig:
    """peft's configuration for the attention of the denoiser or of a text encoder."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=list(targets(component)),
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


def inject_plan(networks: Networks, settings: AdapterSettings, plan: Plan) -> dict[str, float]:
    """Put a run's plan into its networks.

    Returns:
        By attachment point: what rounding a rewritten base weight lost, relative to its norm.
    """
    rounding: dict[str, float] = {}
    for component, network in networks.items():
        part = plan.for_prefix(f"{component}.")
        if not part.factors:
            continue
        if isinstance(part, AdapterPlan):
            rounding |= inject_adapter(network, lora_config(component, settings), part)[1]
        else:
            from cntlora_core.lava.inject import inject_lava

            rounding |= inject_lava(network, lava_config(settings), part)[1]
    return rounding


def multiply_in_base_precision(networks: Networks) -> None:
    """Compute LoRA's products in the data type of the layer that is adapted, not in float32.

    peft would make a float32 copy of what each adapter reads, which takes as much memory as all
    other activations.
    """
    for network in networks.values():
        for layer in adapter_layers(network).values():
            dtype: Any = layer.get_base_layer().weight.dtype
            layer.cast_input_dtype_enabled = False
            multiply_in(dtype, (*layer.lora_A.values(), *layer.lora_B.values()))


def trained_parameters(networks: Networks, plan: Plan) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained tensors: ``<point>.down`` and ``.up``; with LAVA ``<point>.U``, ``.V``, ...."""
    for component, network in networks.items():
        if isinstance(plan, AdapterPlan):
            for name, layer in adapter_layers(network).items():
                down, up = adapter_weights(layer)
                yield f"{component}.{name}.down", down
                yield f"{component}.{name}.up", up
        else:
            from cntlora_core.lava.inject import lava_layers

            for name, layer in lava_layers(network).items():
                for key, factor in layer.factors("default").items():
                    yield f"{component}.{name}.{key}", factor


def extra_loss(networks: Networks, plan: Plan) -> Callable[[], Tensor] | None:
    """What the adapters themselves add to the loss of a step; None where that is nothing."""
    if isinstance(plan, AdapterPlan):
        return None
    from cntlora_core.lava.orthogonality import OrthogonalityLoss

    term = OrthogonalityLoss(nn.ModuleDict(networks))
    return term if term.factors and term().requires_grad else None
