"""Personalising Stable Diffusion: load, teach, generate.

>>> from cntlora_core.diffusion import JobSettings, personalise, sample
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cntlora_core.diffusion.settings import (
    AdapterSettings,
    JobSettings,
    OutputSettings,
    PriorSettings,
    SamplingSettings,
    SubjectSettings,
    TrainingSettings,
)
from cntlora_core.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from cntlora_core.diffusion.job import JobResult, personalise
    from cntlora_core.diffusion.pipeline import StableDiffusionParts, load_stable_diffusion
    from cntlora_core.diffusion.sampler import (
        LoRAUse,
        generate,
        load_for_sampling,
        sample,
    )
    from cntlora_core.diffusion.snapshots import Snapshot, loras_of_run, pick_snapshot

_MODULES = {
    "JobResult": "diffusion.job",
    "personalise": "diffusion.job",
    "StableDiffusionParts": "diffusion.pipeline",
    "load_stable_diffusion": "diffusion.pipeline",
    "LoRAUse": "diffusion.sampler",
    "generate": "diffusion.sampler",
    "load_for_sampling": "diffusion.sampler",
    "sample": "diffusion.sampler",
    "Snapshot": "diffusion.snapshots",
    "loras_of_run": "diffusion.snapshots",
    "pick_snapshot": "diffusion.snapshots",
}

__all__ = [
    "AdapterSettings",
    "JobResult",
    "JobSettings",
    "LoRAUse",
    "OutputSettings",
    "PriorSettings",
    "SamplingSettings",
    "Snapshot",
    "StableDiffusionParts",
    "SubjectSettings",
    "TrainingSettings",
    "generate",
    "load_for_sampling",
    "load_stable_diffusion",
    "loras_of_run",
    "personalise",
    "pick_snapshot",
    "sample",
]

__getattr__ = lazy_names(__name__, _MODULES)
