"""Personalising Stable Diffusion 1.5: load, teach, generate.

>>> from cntlora_core.diffusion import JobSettings, personalise, sample
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cntlora_core.diffusion.settings import (
    AdapterSettings,
    JobSettings,
    OutputSettings,
    PriorSettings,
    SamplingSettings,
    SubjectSettings,
    TrainingSettings,
)

if TYPE_CHECKING:
    from cntlora_core.diffusion.job import JobResult, personalise
    from cntlora_core.diffusion.pipeline import StableDiffusionParts, load_stable_diffusion
    from cntlora_core.diffusion.sampler import (
        LoRAUse,
        generate,
        load_for_sampling,
        sample,
    )

_HOMES = {
    "JobResult": "job",
    "personalise": "job",
    "StableDiffusionParts": "pipeline",
    "load_stable_diffusion": "pipeline",
    "LoRAUse": "sampler",
    "generate": "sampler",
    "load_for_sampling": "sampler",
    "sample": "sampler",
}

__all__ = [
    "AdapterSettings",
    "JobResult",
    "JobSettings",
    "LoRAUse",
    "OutputSettings",
    "PriorSettings",
    "SamplingSettings",
    "StableDiffusionParts",
    "SubjectSettings",
    "TrainingSettings",
    "generate",
    "load_for_sampling",
    "load_stable_diffusion",
    "personalise",
    "sample",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch and diffusers only when it is asked for."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
