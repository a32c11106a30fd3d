"""LAVA adapters as layers of a LoRA file.

A file for image tools has a name for just this form: ``lora_down`` (1 x 1), ``lora_mid`` (R x R
small kernels, here a diagonal of them) and ``lora_up`` (1 x 1).
"""

from __future__ import annotations

import torch
from torch import nn

from cntlora_core.lava.conversion import brought_back
from cntlora_core.lava.factors import LavaFactors, LavaPlan, difference
from cntlora_core.lava.functional import small_kernel
from cntlora_core.lava.inject import lava_layers, snapshot
from cntlora_core.lora_file.algebra import LoRALayer, LoRALayers, alpha_for
from cntlora_core.lora_file.names import TEXT_MODEL, split_name


def lora_layer(factors: LavaFactors) -> LoRALayer:
    """The same change of weight as a LoRA layer; a convolution's with a diagonal mid.

    Raises:
        ValueError: for a convolution in one dimension, which no such file has a form for.
    """
    u, v, rank = factors.u, factors.v, factors.rank
    alpha = alpha_for(factors.scaling, rank)
    if not factors.spatial:
        return LoRALayer(v.T.contiguous(), u, alpha)
    if len(factors.spatial) != 2:
        raise ValueError("a LoRA file can hold adapters of matrices and 2-D convolutions only")
    kernel = small_kernel(factors.spatial)
    up = u[:, :, None, None]
    if kernel[0].numel() == 1:
        return LoRALayer((v * kernel.flatten()).T[:, :, None, None].contiguous(), up, alpha)
    mid = torch.zeros(rank, rank, *kernel.shape[2:])
    mid[torch.arange(rank), torch.arange(rank)] = kernel[:, 0]
    return LoRALayer(v.T[:, :, None, None].contiguous(), up, alpha, mid)


def collect_lava(
    model: nn.Module, plan: LavaPlan, prefix: str, adapter_name: str = "default"
) -> dict[str, LavaFactors]:
    """What an adapter adds to the stock weights, by canonical name.

    Args:
        model: A module with LAVA layers.
        plan: Their initialisation, which is subtracted where it was taken out of the frozen weight.
        prefix: ``unet``, ``text_encoder`` or ``text_encoder_2``.
        adapter_name: Which adapter.
    """
    found = {}
    for path, layer in lava_layers(model, adapter_name).items():
        factors, initial = snapshot(layer, adapter_name), plan.factors[path]
        if plan.rewrites_base and initial.v.any():
            factors = difference(factors, initial)
        name = f"{prefix}.{path.removeprefix(TEXT_MODEL)}"
        split_name(name)
        found[name] = factors
    return found


def lora_layers(found: dict[str, LavaFactors]) -> LoRALayers:
    """:func:`lora_layer` of each.

    Raises:
        ValueError: naming the layer.
    """
    layers: LoRALayers = {}
    for name, factors in found.items():
        try:
            layers[name] = lora_layer(factors)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return layers


def with_trained_rank(factors: LavaFactors, rank: int) -> LavaFactors:
    """At most ``rank`` terms."""
    return factors if factors.rank <= rank else brought_back(factors, rank)[0]
