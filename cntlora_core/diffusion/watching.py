"""Watching a training: the loss on photos it does not see, trackers, and its dynamics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from cntlora_core.diffusion.family import UNET, Conditioning, predict
from cntlora_core.diffusion.initialize import NoisedPhotos
from cntlora_core.diffusion.objective import sample_errors
from cntlora_core.diffusion.pipeline import StableDiffusionParts
from cntlora_core.diffusion.run_folder import DYNAMICS_NAME, DYNAMICS_PLOT, LOGS_NAME
from cntlora_core.diffusion.settings import JobSettings
from cntlora_core.diffusion.stages import EncodedSubject
from cntlora_core.diffusion.trainer import SubjectTrainer
from cntlora_core.dynamics import DynamicsRecorder, plot_dynamics, read_dynamics
from cntlora_core.runtime.modes import evaluating

_PASSES = 4
_SEED = 2026  # of noise and timesteps: not the run's, so that runs of any seed can be compared


class HeldOutLoss:
    """The denoising loss on photos that are not trained on, at fixed noise and timesteps.

    Args:
        parts: The model; its UNet and text encoders are those that are trained.
        photos: The held-out photos; each is read at four timesteps, under its own prompt.
    """

    def __init__(self, parts: StableDiffusionParts, photos: EncodedSubject) -> None:
        self._networks, self._family = parts.networks, parts.family
        self._batches = list(
            NoisedPhotos(
                photos.latents,
                photos.tokens,
                parts.noise_scheduler,
                passes=_PASSES,
                seed=_SEED,
                time_ids=photos.time_ids,
            )
        )

    @torch.no_grad()
    def __call__(self) -> float:
        """The mean squared error of the prediction, as the models are now."""
        unet = self._networks[UNET]
        device, dtype = unet.device, unet.dtype
        errors = []
        with evaluating(*self._networks.values()):
            prompts: dict[tuple[int, ...], Conditioning] = {}  # most photos have the same one
            for batch in self._batches:
                words = tuple(batch.tokens[0].tolist())
                if words not in prompts:
                    prompts[words] = self._family.encode(self._networks, batch.tokens)
                prediction = predict(
                    unet,
                    batch.latents.to(device, dtype),
                    batch.timesteps.to(device),
                    dataclasses.replace(prompts[words], time_ids=batch.time_ids),
                )
                weights = None if batch.weights is None else batch.weights.to(device)
                errors.append(sample_errors(prediction, batch.target.to(device), weights))
        return float(torch.cat(errors).mean())


class Trackers:
    """Trackers of accelerate's make, told of every step and preview; none is no error.

    Args:
        settings: Which ones (``training.log_with``), and what they note of the run.
        folder: Where those that write files put them.
        name: Of the run.
        told: How many steps of it were logged before.

    Raises:
        ImportError: The package of a tracker is not installed; see ``require_packages``.
    """

    def __init__(self, settings: JobSettings, folder: Path, name: str, told: int = 0) -> None:
        self._told = told
        self._trackers: list[Any] = []  # accelerate's GeneralTracker, which declares little
        names = settings.training.log_with
        if names:
            PartialState(cpu=settings.training.device == "cpu")  # which process writes
        for kind in names:
            made: Any = LOGGER_TYPE_TO_CLASS[kind]
            where = (str(folder / LOGS_NAME),) if made.requires_logging_directory else ()
            tracker = made(name, *where)
            getattr(tracker, "start", lambda: None)()  # not in every version
            tracker.store_init_configuration(dict(_flat(settings.to_dict())))
            self._trackers.append(tracker)

    def follow(self, history: Sequence[Mapping[str, float]]) -> None:
        """Log the numbers of the steps that have become known, see :class:`.History`."""
        for step, record in enumerate(history[self._told :], self._told + 1):
            if "loss" not in record:
                break
            self._told = step
            for tracker in self._trackers:
                tracker.log(dict(record), step=step)

    def images(self, step: int, prompts: Sequence[str], images: Sequence[Image.Image]) -> None:
        """Log generated images, each under its prompt."""
        for tracker in self._trackers:
            shown = [np.asarray(image.convert("RGB")) for image in images]
            if tracker.name == "tensorboard":  # its images are arrays (n, height, width, channels)
                values: dict[str, Any] = {
                    prompt: image[None] for prompt, image in zip(prompts, shown, strict=True)
                }
                tracker.log_images(values, step=step, dataformats="NHWC")
            else:
                values = {prompt: [image] for prompt, image in zip(prompts, shown, strict=True)}
                tracker.log_images(values, step=step)

    def finish(self) -> None:
        """Write what is left."""
        for tracker in self._trackers:
            tracker.finish()


def dynamics_recorder(trainer: SubjectTrainer, folder: Path) -> DynamicsRecorder | None:
    """What records the dynamics of a training that begins or goes on; None if nothing does."""
    every = trainer.training.dynamics_every
    if not every:
        return None
    return DynamicsRecorder(
        trainer.networks, folder / DYNAMICS_NAME, every=every, step=trainer.step
    )


def plot_recorded(folder: Path, name: str) -> None:
    """Plot the dynamics of a run, if they were recorded."""
    if (folder / DYNAMICS_NAME).is_file():
        plot_dynamics({name: read_dynamics(folder / DYNAMICS_NAME)}, folder / DYNAMICS_PLOT)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            simple = isinstance(value, (bool, int, float, str))
            rows.append((f"{prefix}{key}", value if simple else str(value)))
    return rows
