"""One registry of methods: CNTLoRA's variants, the baselines that peft has, and comparison runs.

>>> from cntlora_core.methods import METHODS, get_method, initialize_adapter
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cntlora_core.initialization.report import InitializationReport
from cntlora_core.methods.base import InitializationRequest, Limits, Method
from cntlora_core.methods.registry import METHODS, get_method, image_file_methods

if TYPE_CHECKING:
    from cntlora_core.methods.eva import NotConvergedError
    from cntlora_core.methods.initialize import InitializedAdapter, initialize_adapter

_HOMES = {
    "NotConvergedError": "eva",
    "InitializedAdapter": "initialize",
    "initialize_adapter": "initialize",
}

__all__ = [
    "METHODS",
    "InitializationReport",
    "InitializationRequest",
    "InitializedAdapter",
    "Limits",
    "Method",
    "NotConvergedError",
    "get_method",
    "image_file_methods",
    "initialize_adapter",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch and peft only when it is asked for."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
