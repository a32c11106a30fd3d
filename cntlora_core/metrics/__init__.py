"""How well generated pictures show a subject, and follow their prompts.

>>> from cntlora_core.metrics import load_encoders, read_pictures, subject_features
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    from cntlora_core.metrics.pictures import PromptedPictures, read_pictures, read_prompts

_HOMES = {
    **dict.fromkeys(("ClipEncoder", "Encoders", "ImageEncoder", "load_encoders"), "encoders"),
    **dict.fromkeys(
        (
            "Fidelity",
            "PromptFidelity",
            "SubjectFeatures",
            "measure",
            "measure_photos",
            "subject_features",
        ),
        "fidelity",
    ),
    **dict.fromkeys(("PromptedPictures", "read_pictures", "read_prompts"), "pictures"),
}

__all__ = [
    "ClipEncoder",
    "Encoders",
    "Fidelity",
    "ImageEncoder",
    "PromptFidelity",
    "PromptedPictures",
    "SubjectFeatures",
    "load_encoders",
    "measure",
    "measure_photos",
    "read_pictures",
    "read_prompts",
    "subject_features",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch and transformers only when it is asked for."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
