"""The DreamBooth loss as pure functions of tensors (arXiv 2208.12242, section 3.2)."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor


def training_target(
    noise_scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """What the denoiser is to predict, (n, c, h, w): the noise, or the velocity.

    Raises:
        ValueError: for a model that predicts anything else.
    """
    kind = noise_scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)  # pyright: ignore
    raise ValueError(
        f"the model's scheduler says prediction_type={kind!r}; "
        "epsilon and v_prediction can be trained"
    )


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights (n,) of each sample's loss (arXiv 2303.09556, equation 8).

    ``min(SNR, gamma) / SNR`` for noise prediction, over ``SNR + 1`` for velocity prediction. An SNR
    of 0 is in order for the latter alone, whose weight there is 0.
    """
    snr = compute_snr(noise_scheduler, timesteps)
    velocity = noise_scheduler.config["prediction_type"] == "v_prediction"
    return snr.clamp(max=gamma) / (snr + 1 if velocity else snr)


def sample_errors(
    prediction: Tensor, target: Tensor, latent_weights: Tensor | None = None
) -> Tensor:
    """Mean squared error of each sample, (n,), float32.

    Args:
        prediction: (n, c, h, w), any floating dtype; compared in float32.
        target: (n, c, h, w).
        latent_weights: (n, h, w) weight of each latent, of mean 1 over a sample, or None.
    """
    errors = (prediction.float() - target.float()).square()
    if latent_weights is not None:
        errors = errors * latent_weights[:, None]
    return errors.flatten(1).mean(1)


def dreambooth_loss(
    errors: Tensor,
    *,
    instances: int,
    prior_weight: float,
    weights: Tensor | None = None,
    whole: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a batch whose first ``instances`` samples are the subject, the rest its class.

    The losses of the parts of a batch add up to that of the whole, and so do their gradients.

    Args:
        errors: (n,) error of each sample, see ``sample_errors``.
        instances: How many of the n samples show the subject.
        prior_weight: Weight of the class samples' mean loss.
        weights: (n,) weight of each sample, or None.
        whole: How many samples of subject and class the whole batch has, where these are a part.

    Returns:
        Total, instance part and prior part (zero where there are no class samples), scalars.
    """
    if weights is not None:
        errors = errors * weights
    subjects, others = whole or (instances, len(errors) - instances)
    instance = errors[:instances].sum() / subjects
    prior = errors[instances:].sum() / others if others else torch.zeros_like(instance)
    return instance + prior_weight * prior, instance, prior
