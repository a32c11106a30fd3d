"""The DreamBooth loss of a batch, as the models are now."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from cntlora_core.diffusion.batches import Batch, SameShape, moved
from cntlora_core.diffusion.family import UNET, Conditioning, Family, Networks, predict
from cntlora_core.diffusion.objective import (
    dreambooth_loss,
    min_snr_weights,
    sample_errors,
    training_target,
)


class BatchLoss:
    """Passes batches through text encoders and denoiser.

    Attributes:
        trains_text: Whether the text encoders are differentiated; where they are not, each prompt
            is read once.

    Args:
        networks: Denoiser and text encoders.
        family: Says how they are used.
        noise_scheduler: The training noise schedule.
        prior_weight: Weight of the class images' loss.
        min_snr_gamma: Of the Min-SNR weights; None for none.
        trains_text: See above.
    """

    def __init__(
        self,
        networks: Networks,
        family: Family,
        noise_scheduler: Any,
        *,
        prior_weight: float,
        min_snr_gamma: float | None,
        trains_text: bool,
    ) -> None:
        self.trains_text = trains_text
        self._networks, self._family, self._scheduler = networks, family, noise_scheduler
        self._prior_weight, self._gamma = prior_weight, min_snr_gamma
        weight = next(networks[UNET].parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._fixed: dict[tuple[int, ...], Conditioning] = {}

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Total, instance part and prior part, as :func:`.dreambooth_loss`."""
        conditioning = self.conditioning(batch)
        errors = [self.errors(shape, batch.timesteps, conditioning) for shape in batch.shapes]
        if len(errors) > 1:  # in the batch's order
            order = torch.cat([shape.items for shape in batch.shapes]).argsort()
            errors = [torch.cat(errors)[order]]
        weights = (
            None
            if self._gamma is None
            else min_snr_weights(self._scheduler, batch.timesteps, self._gamma)
        )
        return dreambooth_loss(
            errors[0],
            instances=batch.instances,
            prior_weight=self._prior_weight,
            weights=weights,
            whole=batch.whole,
        )

    def errors(self, shape: SameShape, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """(m,): the errors of the samples of one shape."""
        if len(shape.items) < len(timesteps):
            timesteps, conditioning = timesteps[shape.items], conditioning.rows(shape.items)
        noised = self._scheduler.add_noise(shape.latents, shape.noise, timesteps)
        target = training_target(self._scheduler, shape.latents, shape.noise, timesteps)
        unet = self._networks[UNET]
        prediction = predict(unet, noised.to(self._dtype), timesteps, conditioning)
        return sample_errors(prediction, target, shape.weights)

    def conditioning(self, batch: Batch) -> Conditioning:
        """That of each sample; each different prompt is read once."""
        unique, inverse = batch.tokens.unique(dim=0, return_inverse=True)
        if self.trains_text:
            prompts = self._family.encode(self._networks, moved(unique, self._device))
        else:
            prompts = Conditioning.joined([self._fixed_prompt(row) for row in unique])
        rows = prompts.rows(moved(inverse, self._device))
        return dataclasses.replace(rows, time_ids=batch.time_ids)

    @torch.no_grad()
    def _fixed_prompt(self, row: Tensor) -> Conditioning:
        key = tuple(row.tolist())
        if key not in self._fixed:
            self._fixed[key] = self._family.encode(self._networks, row[None])
        return self._fixed[key]
