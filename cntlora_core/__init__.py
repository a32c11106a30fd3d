"""CNTLoRA: a data-driven start for low-rank adapters, and what it takes to train with it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cntlora_core.config import CNTLoRAConfig

if TYPE_CHECKING:
    from cntlora_core.initialize import (
        InitReport,
        get_cntlora_model,
        initialize_lora_cntlora_weights,
    )

__all__ = [
    "CNTLoRAConfig",
    "InitReport",
    "get_cntlora_model",
    "initialize_lora_cntlora_weights",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for, so that a command's help is quick."""
    if name in __all__:
        return getattr(import_module("cntlora_core.initialize"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
