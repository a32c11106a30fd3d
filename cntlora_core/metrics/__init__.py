"""How well generated pictures show a subject, and follow their prompts.

>>> from cntlora_core.metrics import load_encoders, read_pictures, subject_features
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cntlora_core.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from cntlora_core.metrics.encoders import ClipEncoder, Encoders, ImageEncoder, load_encoders
    from cntlora_core.metrics.fidelity import (
        Fidelity,
        PromptFidelity,
        SubjectFeatures,
        measure,
        measure_photos,
        subject_features,
    )
    from cntlora_core.metrics.generation import GenerationSettings
    from cntlora_core.metrics.pictures import PromptedPictures, read_pictures, read_prompts
    from cntlora_core.metrics.steps import StepComparison, compare_steps

_MODULES = {
    **dict.fromkeys(
        ("ClipEncoder", "Encoders", "ImageEncoder", "load_encoders"), "metrics.encoders"
    ),
    **dict.fromkeys(
        (
            "Fidelity",
            "PromptFidelity",
            "SubjectFeatures",
            "measure",
            "measure_photos",
            "subject_features",
        ),
        "metrics.fidelity",
    ),
    **dict.fromkeys(("PromptedPictures", "read_pictures", "read_prompts"), "metrics.pictures"),
    **dict.fromkeys(("StepComparison", "compare_steps"), "metrics.steps"),
    "GenerationSettings": "metrics.generation",
}

__all__ = [
    "ClipEncoder",
    "Encoders",
    "Fidelity",
    "GenerationSettings",
    "ImageEncoder",
    "PromptFidelity",
    "PromptedPictures",
    "StepComparison",
    "SubjectFeatures",
    "compare_steps",
    "load_encoders",
    "measure",
    "measure_photos",
    "read_pictures",
    "read_prompts",
    "subject_features",
]

__getattr__ = lazy_names(__name__, _MODULES)
