"""Initialise a diffusion adapter from data: noised photos through text encoder and denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from cntlora_core.data.captions import encode_prompts
from cntlora_core.data.latents import LatentSet
from cntlora_core.diffusion.adapters import (
    TEXT_ENCODER_TARGETS,
    UNET_TARGETS,
    Plan,
    lava_config,
    text_encoder_lora_config,
    unet_lora_config,
)
from cntlora_core.diffusion.from_lora import layers_to_go_on_from, points_of_layers
from cntlora_core.diffusion.objective import sample_errors, training_target
from cntlora_core.diffusion.settings import AdapterSettings
from cntlora_core.initialization.report import InitializationReport
from cntlora_core.layers.attachment import AttachmentPoint, find_attachment_points
from cntlora_core.methods import InitializationRequest, Limits, get_method
from cntlora_core.runtime.progress import Reporter, silent, stage_progress
from cntlora_core.runtime.seeds import torch_seed


def diffusion_attachment_points(
    unet: nn.Module, text_encoder: nn.Module, settings: AdapterSettings
) -> list[AttachmentPoint]:
    """Points of both models under the prefixes ``unet.`` and ``text_encoder.``."""
    points = find_attachment_points(unet, unet_lora_config(settings), "unet.")
    if settings.train_text_encoder:
        points += find_attachment_points(
            text_encoder, text_encoder_lora_config(settings), "text_encoder."
        )
    return points


@dataclass(frozen=True)
class NoisedBatch:
    """One forward pass: noised latents (n, c, h, w), timesteps (n,) and prompt tokens (n, length);
    ``target`` (n, c, h, w) is what the denoiser is to predict, ``weights`` (n, h, w) what each
    latent counts in the loss, or None."""

    latents: Tensor
    timesteps: Tensor
    tokens: Tensor
    target: Tensor
    weights: Tensor | None = None


class NoisedPhotos:
    """The photos at stratified random timesteps, as an iterable that is the same each time.

    The timesteps of the ``passes * n`` samples fall one into each of as many equal intervals, in
    random order, so that few samples cover the whole range.
    """

    def __init__(
        self,
        latents: LatentSet,
        tokens: Tensor,
        noise_scheduler: Any,
        *,
        passes: int,
        seed: int,
    ) -> None:
        self._latents, self._tokens, self._scheduler = latents, tokens, noise_scheduler
        self._passes, self._seed = passes, seed

    def __len__(self) -> int:
        return self._passes * len(self._tokens)

    def __iter__(self) -> Iterator[NoisedBatch]:
        generator = torch.Generator().manual_seed(torch_seed(self._seed))
        count = len(self)
        strata = (
            torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
        ) / count
        horizon = self._scheduler.config["num_train_timesteps"]
        for i, position in enumerate(strata):
            timestep = (position * horizon).long().clamp(max=horizon - 1)[None]
            photo = i % len(self._tokens)
            latent = self._latents.sample(photo, generator)[None]
            noise = torch.randn(latent.shape, generator=generator)
            noised = self._scheduler.add_noise(latent, noise, timestep)
            target = training_target(self._scheduler, latent, noise, timestep)
            weights = self._latents.weights[photo]
            weights = None if weights is None else weights[None]
            yield NoisedBatch(noised, timestep, self._tokens[photo][None], target, weights)


def plan_adapter(
    unet: nn.Module,
    text_encoder: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    noise_scheduler: Any,
    latents: LatentSet,
    prompts: Sequence[str],
    settings: AdapterSettings,
    *,
    seed: int = 0,
    reporter: Reporter = silent,
) -> tuple[Plan, InitializationReport | None]:
    """Plan the adapter of both models under one rank budget, on the base models as they are.

    Args:
        unet: The denoiser, frozen.
        text_encoder: The text encoder, frozen.
        tokenizer: Its tokenizer.
        noise_scheduler: The training noise schedule.
        latents: The photos, encoded.
        prompts: One for each photo.
        settings: Method, rank and so on.
        seed: Seed of timesteps and noise.

    Returns:
        The plan, and a report (None for the plain initialisation, which reads nothing).
    """
    method = get_method(settings.method)
    tokens = encode_prompts(prompts, tokenizer).input_ids
    batches = NoisedPhotos(latents, tokens, noise_scheduler, passes=settings.init_passes, seed=seed)
    models = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    parameter = next(unet.parameters())

    def forward(_models: nn.Module, batch: NoisedBatch) -> Tensor:
        states = text_encoder(batch.tokens.to(parameter.device))[0]
        return unet(
            batch.latents.to(parameter.device, parameter.dtype),
            batch.timesteps.to(parameter.device),
            encoder_hidden_states=states,
        ).sample

    def loss(models: nn.Module, batch: NoisedBatch) -> Tensor:
        predicted, target = forward(models, batch).float(), batch.target.to(parameter.device)
        if batch.weights is None:
            return nn.functional.mse_loss(predicted, target)
        return sample_errors(predicted, target, batch.weights.to(parameter.device)).mean()

    passes_progress = stage_progress(reporter, f"reading {method.needs}")
    solve_progress = stage_progress(reporter, "solving for the initialisation")
    if settings.adapter == "lava":
        from cntlora_core.diffusion.initialize_lava import lava_modules
        from cntlora_core.lava.initialize import plan_lava

        plan, report = plan_lava(
            models,
            lava_modules(unet, text_encoder, settings, UNET_TARGETS, TEXT_ENCODER_TARGETS),
            None if method.name == "lora" else batches,
            lava_config(settings),
            dataclasses.replace(settings.cntlora, seed=settings.cntlora.seed + seed),
            forward_fn=forward,
            progress=passes_progress,
            solve_progress=solve_progress,
        )
    else:
        assert method.plan is not None
        lora, note = None, ""
        if settings.from_lora is None:
            points = diffusion_attachment_points(unet, text_encoder, settings)
        else:
            layers = layers_to_go_on_from(settings)
            points, lora = points_of_layers(unet, text_encoder, layers, settings.from_lora)
            note = f"goes on from {settings.from_lora}"
            if not any(point.name.startswith("text_encoder.") for point in points):
                note += ", which leaves the text encoder as it is"
        request = InitializationRequest(
            model=models,
            points=points,
            lora=lora,
            rank=settings.rank,
            scaling=settings.scaling,
            batches=batches,
            forward_fn=forward,
            loss_fn=loss,
            cntlora_config=settings.cntlora,
            seed=seed,
            limits=Limits(max_seconds=60 * settings.init_minutes),
            passes_progress=passes_progress,
            solve_progress=solve_progress,
        )
        planned = method.plan(request)
        plan, report = planned.plan, planned.report
        if note:
            report = dataclasses.replace(report, notes=(note,))
    return plan, None if method.name == "lora" else report
