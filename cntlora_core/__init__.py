"""CNTLoRA: a data-driven start for low-rank adapters, and what it takes to train with it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cntlora_core.config import CNTLoRAConfig

if TYPE_CHECKING:
    from cntlora_core.adapter import match_convolutions
    from cntlora_core.conversion import ConversionReport, convert_adapter, save_converted
    from cntlora_core.initialize import (
        InitReport,
        get_cntlora_model,
        initialize_lora_cntlora_weights,
    )
    from cntlora_core.resume import load_initialized
    from cntlora_core.trainer_callback import ConvertedCheckpoints

__all__ = [
    "CNTLoRAConfig",
    "ConversionReport",
    "ConvertedCheckpoints",
    "InitReport",
    "convert_adapter",
    "get_cntlora_model",
    "initialize_lora_cntlora_weights",
    "load_initialized",
    "match_convolutions",
    "save_converted",
]
__version__ = "0.1.0"

_MODULES = {
    "ConversionReport": "conversion",
    "ConvertedCheckpoints": "trainer_callback",
    "InitReport": "initialize",
    "convert_adapter": "conversion",
    "get_cntlora_model": "initialize",
    "initialize_lora_cntlora_weights": "initialize",
    "load_initialized": "resume",
    "match_convolutions": "adapter",
    "save_converted": "conversion",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for, so that a command's help is quick."""
    module = _MODULES.get(name)
    if module is not None:
        return getattr(import_module(f"cntlora_core.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
