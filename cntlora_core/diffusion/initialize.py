"""Initialise a diffusion adapter from data: noised photos through text encoders and denoiser."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cntlora_core.data.latents import LatentSet
from cntlora_core.diffusion.adapters import Plan, lava_config, lora_config
from cntlora_core.diffusion.family import UNET, Family, Networks, predict
from cntlora_core.diffusion.from_lora import layers_to_go_on_from, points_of_layers
from cntlora_core.diffusion.objective import sample_errors, training_target
from cntlora_core.diffusion.settings import AdapterSettings
from cntlora_core.initialization.plan import AdapterPlan
from cntlora_core.initialization.report import InitializationReport
from cntlora_core.initialization.solve import plan_from_first
from cntlora_core.layers.attachment import AttachmentPoint, find_attachment_points
from cntlora_core.methods import InitializationRequest, Limits, Method, get_method
from cntlora_core.runtime.processes import Processes
from cntlora_core.runtime.progress import Reporter, silent, stage_progress
from cntlora_core.runtime.seeds import torch_seed


def diffusion_attachment_points(
    networks: Networks, family: Family, settings: AdapterSettings
) -> list[AttachmentPoint]:
    """Points of the networks, each name beginning with its component's."""
    points = []
    for component in networks if settings.train_text_encoder else (UNET,):
        config = lora_config(component, settings)
        points += find_attachment_points(networks[component], config, f"{component}.")
    unread = family.unread(networks)
    return [point for point in points if not point.name.startswith(unread)]


@dataclass(frozen=True)
class NoisedBatch:
    """One forward pass: noised latents (n, c, h, w), timesteps (n,) and prompt tokens (n, length);
    ``target`` (n, c, h, w) is what the denoiser is to predict, ``weights`` (n, h, w) what each
    latent counts in the loss, or None, ``time_ids`` (n, 6) the sizes that it reads, or None."""

    latents: Tensor
    timesteps: Tensor
    tokens: Tensor
    target: Tensor
    weights: Tensor | None = None
    time_ids: Tensor | None = None


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
        time_ids: Tensor | None = None,
    ) -> None:
        self._latents, self._tokens, self._scheduler = latents, tokens, noise_scheduler
        self._time_ids = time_ids
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
            sizes = None if self._time_ids is None else self._time_ids[photo][None]
            yield NoisedBatch(noised, timestep, self._tokens[photo][None], target, weights, sizes)


class Share:
    """Every so-manieth of some batches: what one process reads of them."""

    def __init__(self, batches: NoisedPhotos, rank: int, count: int) -> None:
        self._batches, self._rank, self._count = batches, rank, count

    def __len__(self) -> int:
        return len(range(self._rank, len(self._batches), self._count))

    def __iter__(self) -> Iterator[NoisedBatch]:
        return itertools.islice(self._batches, self._rank, None, self._count)


def plan_adapter(
    networks: Networks,
    family: Family,
    noise_scheduler: Any,
    latents: LatentSet,
    tokens: Tensor,
    settings: AdapterSettings,
    *,
    time_ids: Tensor | None = None,
    seed: int = 0,
    reporter: Reporter = silent,
) -> tuple[Plan, InitializationReport | None]:
    """Plan the adapter of all networks under one rank budget, on the base models as they are.

    Args:
        networks: Denoiser and text encoders, frozen.
        family: What they are.
        noise_scheduler: The training noise schedule.
        latents: The photos, encoded.
        tokens: (n, length) prompt tokens, one row for each photo.
        settings: Method, rank and so on.
        time_ids: (n, 6) the photos' sizes, where the family reads them.
        seed: Seed of timesteps and noise.

    Under torch.distributed all processes call this with the same photos, and get one plan.

    Returns:
        The plan, and a report (None for the plain initialisation, which reads nothing; it may be
        None on other processes than the first).
    """
    method = get_method(settings.method)
    batches = NoisedPhotos(
        latents,
        tokens,
        noise_scheduler,
        passes=settings.init_passes,
        seed=seed,
        time_ids=time_ids,
    )
    processes = Processes()
    if method.family == "cntlora":  # the others read all of it, on the first process
        batches = Share(batches, processes.rank, processes.count)
    models, unet = nn.ModuleDict(networks), networks[UNET]
    parameter = next(unet.parameters())

    def forward(_models: nn.Module, batch: NoisedBatch) -> Tensor:
        return predict(
            unet,
            batch.latents.to(parameter.device, parameter.dtype),
            batch.timesteps.to(parameter.device),
            family.encode(networks, batch.tokens, batch.time_ids),
        )

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
            lava_modules(networks, family, settings),
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
            points = diffusion_attachment_points(networks, family, settings)
        else:
            layers = layers_to_go_on_from(settings)
            points, lora = points_of_layers(networks, family, layers, settings.from_lora)
            note = f"goes on from {settings.from_lora}"
            if all(point.name.startswith(f"{UNET}.") for point in points):
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
        plan, report = _planned(method, request, processes)
        if note and report is not None:
            report = dataclasses.replace(report, notes=(note,))
    return plan, None if method.name == "lora" else report


def _planned(
    method: Method, request: InitializationRequest, processes: Processes
) -> tuple[AdapterPlan, InitializationReport | None]:
    """The plan on every process, and a report at least on the first."""
    assert method.plan is not None
    if method.family == "cntlora":  # the processes sum up what they read, and agree
        planned = method.plan(request)
        return planned.plan, planned.report
    reports: list[InitializationReport] = []

    def make() -> AdapterPlan:
        assert method.plan is not None
        planned = method.plan(request)
        reports.append(planned.report)
        return planned.plan

    plan = plan_from_first(make, processes)
    return plan, reports[0] if reports else None
