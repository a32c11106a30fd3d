"""One registry of methods: CNTLoRA's variants, the baselines that peft has, and comparison runs.

>>> from cntlora_core.methods import METHODS, get_method, initialize_adapter
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cntlora_core.initialization.report import InitializationReport
from cntlora_core.methods.base import InitializationRequest, Limits, Method
from cntlora_core.methods.registry import METHODS, get_method, image_file_methods
from cntlora_core.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from cntlora_core.methods.eva import NotConvergedError
    from cntlora_core.methods.initialize import InitializedAdapter, initialize_adapter

_MODULES = {
    "NotConvergedError": "methods.eva",
    "InitializedAdapter": "methods.initialize",
    "initialize_adapter": "methods.initialize",
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

__getattr__ = lazy_names(__name__, _MODULES)
