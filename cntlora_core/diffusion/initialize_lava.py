"""Initialise a LAVA adapter of a diffusion model: attention, and the denoiser's convolutions."""

from __future__ import annotations

from torch import nn

from cntlora_core.diffusion.settings import AdapterSettings
from cntlora_core.lava.layer import check_adaptable


def lava_modules(
    unet: nn.Module,
    text_encoder: nn.Module,
    settings: AdapterSettings,
    unet_targets: tuple[str, ...],
    text_encoder_targets: tuple[str, ...],
) -> dict[str, nn.Module]:
    """What gets an adapter, under the prefixes ``unet.`` and ``text_encoder.``."""

    def chosen(model: nn.Module, prefix: str, targets: tuple[str, ...], convolutions: bool):
        endings = tuple(f".{target}" for target in targets)
        return {
            prefix + name: module
            for name, module in model.named_modules()
            if name.endswith(endings) or (convolutions and isinstance(module, nn.Conv2d))
        }

    modules = chosen(unet, "unet.", unet_targets, settings.convolutions)
    if settings.train_text_encoder:
        modules |= chosen(text_encoder, "text_encoder.", text_encoder_targets, False)
    for name, module in modules.items():
        check_adaptable(name, module)
    return modules
