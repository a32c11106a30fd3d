"""Packages that only some settings of a training need."""

from __future__ import annotations

from importlib.util import find_spec

from cntlora_core.diffusion.settings import TrainingSettings

_NEEDED = {
    "adamw_8bit": ("bitsandbytes",),
    "prodigy": ("prodigyopt",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
}
"""By optimiser or tracker; one of them is enough."""


def require_packages(training: TrainingSettings) -> None:
    """Refuse an optimiser or a tracker whose package is missing, before any work.

    Raises:
        ValueError: saying what to install.
    """
    for setting, names in (("optimizer", (training.optimizer,)), ("log_with", training.log_with)):
        for name in names:
            packages = _NEEDED.get(name)
            if packages is not None and not any(find_spec(package) for package in packages):
                raise ValueError(f"{setting}={name} needs a package: pip install {packages[0]}")
