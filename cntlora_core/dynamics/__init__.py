"""Training dynamics: what gradients, updates and activations do while an adapter trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cntlora_core.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from cntlora_core.dynamics.callback import DynamicsCallback
    from cntlora_core.dynamics.groups import group_of
    from cntlora_core.dynamics.log import read_dynamics
    from cntlora_core.dynamics.plots import plot_dynamics
    from cntlora_core.dynamics.recorder import DynamicsRecorder

__all__ = [
    "DynamicsCallback",
    "DynamicsRecorder",
    "group_of",
    "plot_dynamics",
    "read_dynamics",
]

_MODULES = {
    "DynamicsCallback": "dynamics.callback",
    "DynamicsRecorder": "dynamics.recorder",
    "group_of": "dynamics.groups",
    "plot_dynamics": "dynamics.plots",
    "read_dynamics": "dynamics.log",
}

__getattr__ = lazy_names(__name__, _MODULES)
