"""CNTLoRA: data-driven initialisation of low-rank adapters, and what it takes to train with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cntlora_core.config import CNTLoRAConfig
from cntlora_core.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from cntlora_core.activations.capture import CapturedMoments
    from cntlora_core.activations.collection import collect_moments
    from cntlora_core.adapter.inject import match_convolutions
    from cntlora_core.initialization.plan import AdapterPlan
    from cntlora_core.initialization.report import InitializationReport
    from cntlora_core.layers.attachment import find_attachment_points
    from cntlora_core.methods.peft_model import (
        InitReport,
        get_cntlora_model,
        initialize_lora_cntlora_weights,
    )
    from cntlora_core.saving.conversion import ConversionReport, convert_adapter, save_converted
    from cntlora_core.saving.load_initialized import load_initialized
    from cntlora_core.saving.trainer_callback import ConvertedCheckpoints

__all__ = [
    "AdapterPlan",
    "CNTLoRAConfig",
    "CapturedMoments",
    "ConversionReport",
    "ConvertedCheckpoints",
    "InitReport",
    "InitializationReport",
    "collect_moments",
    "convert_adapter",
    "find_attachment_points",
    "get_cntlora_model",
    "initialize_lora_cntlora_weights",
    "load_initialized",
    "match_convolutions",
    "save_converted",
]
__version__ = "0.1.0"

_MODULES = {
    "AdapterPlan": "initialization.plan",
    "CapturedMoments": "activations.capture",
    "ConversionReport": "saving.conversion",
    "ConvertedCheckpoints": "saving.trainer_callback",
    "InitReport": "methods.peft_model",
    "InitializationReport": "initialization.report",
    "collect_moments": "activations.collection",
    "convert_adapter": "saving.conversion",
    "find_attachment_points": "layers.attachment",
    "get_cntlora_model": "methods.peft_model",
    "initialize_lora_cntlora_weights": "methods.peft_model",
    "load_initialized": "saving.load_initialized",
    "match_convolutions": "adapter.inject",
    "save_converted": "saving.conversion",
}

__getattr__ = lazy_names(__name__, _MODULES)
