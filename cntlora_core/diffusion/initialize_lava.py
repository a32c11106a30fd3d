"""Initialise a LAVA adapter of a diffusion model: attention, and the denoiser's convolutions."""

from __future__ import annotations

from torch import nn

from cntlora_core.diffusion.adapters import targets
from cntlora_core.diffusion.family import UNET, Family, Networks
from cntlora_core.diffusion.settings import AdapterSettings
from cntlora_core.lava.layer import check_adaptable


def lava_modules(
    networks: Networks, family: Family, settings: AdapterSettings
) -> dict[str, nn.Module]:
    """What gets an adapter, by component and path."""
    modules = {}
    for component in networks if settings.train_text_encoder else (UNET,):
        endings = tuple(f".{target}" for target in targets(component))
        convolutions = component == UNET and settings.convolutions
        modules |= {
            f"{component}.{name}": module
            for name, module in networks[component].named_modules()
            if name.endswith(endings) or (convolutions and isinstance(module, nn.Conv2d))
        }
    unread = family.unread(networks)
    modules = {name: m for name, m in modules.items() if not name.startswith(unread)}
    for name, module in modules.items():
        check_adaptable(name, module)
    return modules
