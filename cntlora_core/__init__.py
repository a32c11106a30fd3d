"""CNTLoRA: a data-driven start for low-rank adapters, and what it takes to train with it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cntlora_core.config import CNTLoRAConfig

if TYPE_CHECKING:
    from cntlora_core.adapter import match_convolutions
    from cntlora_core.conversion import ConversionReport, save_converted
    from cntlora_core.initialize import (
        InitReport,
        get_cntlora_model,
        initialize_lora_cntlora_weights,
    )

__all__ = [
    "CNTLoRAConfig",
    "ConversionReport",
    "InitReport",
    "get_cntlora_model",
    "initialize_lora_cntlora_weights",
    "match_convolutions",
    "save_converted",
]
__version__ = "0.1.0"

_MODULES = {
    "ConversionReport": "conversion",
    "InitReport": "initialize",
    "get_cntlora_model": "initialize",
    "initialize_lora_cntlora_weights": "initialize",
    "match_convolutions": "adapter",
    "save_converted": "conversion",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for, so that a command's help is quick."""
    module = _MODULES.get(name)
    if module is not None:
        return getattr(import_module(f"cntlora_core.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
