"""Named settings of a whole run: the paper's, which are the defaults, and a quick one."""

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

QUICK: Mapping[str, Any] = {
    "adapter": {"method": "cross", "rank": 16, "init_passes": 8},
    "training": {"steps": 150, "learning_rate": 1e-3, "lr_schedule": "cosine"},
}
"""Measured on the small model alone (docs/experiments/convergence.md); the rank fits its widths of
64 to 192.
"""

PRESETS: Mapping[str, Mapping[str, Any]] = {"paper": PAPER, "quick": QUICK}
"""Sections of :class:`JobSettings`, as :meth:`JobSettings.from_dict` takes them."""


def preset(name: object) -> Mapping[str, Any]:
    """The settings of that name.

    Raises:
        ValueError: there are none.
    """
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    raise ValueError(f"there is no preset {name!r}; there are: {', '.join(PRESETS)}")
