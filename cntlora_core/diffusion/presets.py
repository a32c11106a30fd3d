"""Named settings of a whole run, beside the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PAPER: Mapping[str, Any] = {
    "adapter": {"method": "cross", "rank": 128},
    "prior": {"prior_weight": 0.1},
    "training": {
        "steps": 1000,
        "learning_rate": 1e-4,
        "lr_schedule": "constant",
        "optimizer": "adamw",
        "batch_size": 1,
    },
}
"""Of arXiv 2507.08044, for Stable Diffusion 1.5 and DreamBooth; alpha is twice the rank."""

PRESETS: Mapping[str, Mapping[str, Any]] = {"paper": PAPER}
"""Sections of :class:`JobSettings`, as :meth:`JobSettings.from_dict` takes them."""


def preset(name: object) -> Mapping[str, Any]:
    """The settings of that name.

    Raises:
        ValueError: there are none.
    """
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    raise ValueError(f"there is no preset {name!r}; there are: {', '.join(PRESETS)}")
