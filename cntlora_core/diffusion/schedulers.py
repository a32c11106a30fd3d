"""diffusers' schedulers by name, with a model's own noise schedule and prediction type."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_args

import diffusers
from diffusers import DDPMScheduler

from cntlora_core.diffusion.settings import SchedulerName

_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
_PREDICTIONS = ("epsilon", "v_prediction", "sample")


def sampler(scheduler: SchedulerName | None, config: Mapping[str, Any]) -> Any:
    """A scheduler for sampling.

    Args:
        scheduler: Its name; None for the model's own.
        config: The settings of the model's own.

    Raises:
        ValueError: There is no sampler of that name.
    """
    if scheduler is None:
        return _scheduler(config["_class_name"], config, {})
    if scheduler not in _SCHEDULERS:
        raise ValueError(
            f"scheduler {scheduler!r} is not one of {', '.join(get_args(SchedulerName))}"
        )
    name, settings = _SCHEDULERS[scheduler]
    return _scheduler(name, config, settings)


def noise_scheduler(config: Mapping[str, Any]) -> DDPMScheduler:
    """The schedule for training; the model's own sampler is made too, to see that it can be.

    Raises:
        Exception: what diffusers raises over a setting, and a ValueError for one of no use.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or not name.endswith("Scheduler") or not hasattr(diffusers, name):
        raise ValueError(f"_class_name must be one of diffusers' schedulers, got {name!r}")
    own = _scheduler(name, config, {})
    if not hasattr(own, "alphas_cumprod") or own.config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{name} has no discrete noise schedule here (EDM and flow models have none): models "
            "that predict epsilon or v_prediction under one can be trained"
        )
    own.set_timesteps(1)
    noise = _scheduler("DDPMScheduler", config, {})
    kept = noise.alphas_cumprod
    if not bool(((kept >= 0) & (kept <= 1)).all()):
        raise ValueError("its betas are not all between 0 and 1")
    if (kind := noise.config["prediction_type"]) not in _PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(_PREDICTIONS)}, got {kind!r}")
    if kind == "epsilon" and bool(kept[-1] == 0):
        raise ValueError(
            "rescale_betas_zero_snr leaves no signal at the last timestep, where epsilon tells "
            "nothing of the image: such models predict v_prediction"
        )
    return noise


def _scheduler(name: str, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """Latents are not bounded by 1, so clipping is off unless the model's config asks for it.

    Raises:
        ValueError: The model has a zero terminal SNR, and the scheduler knows none.
    """
    made = getattr(diffusers, name).from_config({"clip_sample": False, **config}, **settings)
    known = inspect.signature(type(made).__init__).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        raise ValueError(
            f"{name} cannot sample from a zero terminal SNR, which the model has: use euler, "
            "euler_a, ddim, ddpm, dpm++ or unipc"
        )
    return made
