"""What a training is measured by while it runs: held-out loss, drift, and generated images."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from cntlora_core.benchmark.convergence.grid import Bench, MeasureSettings
from cntlora_core.benchmark.convergence.subjects import BenchSubject
from cntlora_core.data.latents import LatentSet
from cntlora_core.diffusion.family import predict
from cntlora_core.diffusion.fingerprint import fingerprint_files
from cntlora_core.diffusion.initialize import NoisedBatch, NoisedPhotos
from cntlora_core.diffusion.pipeline import StableDiffusionParts
from cntlora_core.diffusion.sampler import generate
from cntlora_core.metrics import Encoders, load_encoders, measure, subject_features
from cntlora_core.metrics.encoders import SMALL
from cntlora_core.mini import encoder_path
from cntlora_core.runtime.modes import evaluating
from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.runtime.reading import user_path

NOISE_SEED = 2026
"""Seed of the noise and timesteps of loss and drift, the same for all runs."""


class Measurements:
    """Measures one subject's training on models that the trainer changes in place.

    Made before the adapter is injected: the drift is that from the models as they are then.

    Args:
        parts: The base model; its modules are the ones that are trained.
        subject: The subject.
        held_out: Latents of its held-out photos; None without any.
        class_images: Latents of its class images.
        bench: What and how to measure.
    """

    def __init__(
        self,
        parts: StableDiffusionParts,
        subject: BenchSubject,
        held_out: LatentSet | None,
        class_images: LatentSet,
        bench: Bench,
    ) -> None:
        self.settings: MeasureSettings = bench.measure
        self._bench, self._subject = bench, subject
        self._networks, self._family, self._unet = parts.networks, parts.family, parts.unet
        self._pipeline = parts.pipeline(self.settings.scheduler)  # pyright: ignore[reportArgumentType]

        def noised(latents: LatentSet, prompts: Sequence[str], passes: int) -> list[NoisedBatch]:
            tokens = parts.tokens(prompts).input_ids
            batches = NoisedPhotos(
                latents, tokens, parts.noise_scheduler, passes=passes, seed=NOISE_SEED
            )
            return _joined(batches, self.settings.batch_size)

        prompts = subject.subject.prompts
        self._held_out: list[NoisedBatch] = []
        if held_out is not None:
            repeated = [prompts.instance_prompt] * len(held_out)
            self._held_out = noised(held_out, repeated, self.settings.loss_passes)
        others = [template.format(prompts.class_name) for template in subject.templates]
        count = min(self.settings.drift_images, len(class_images))
        self._class_batches = noised(
            class_images,
            [others[i % len(others)] for i in range(count)],
            self.settings.drift_passes,
        )
        self._before = [self._predict(batch) for batch in self._class_batches]

    def loss_and_drift(self) -> dict[str, float | None]:
        """``loss``: mean squared error of the prediction on the held-out photos under the subject's
        prompt; None without such photos. ``drift``: mean squared change of the prediction, against
        the base model, on class images under the other prompts, without the token.
        """
        with evaluating(*self._networks.values()):
            loss = _mean([(self._predict(b) - b.target).square() for b in self._held_out])
            pairs = zip(self._class_batches, self._before, strict=True)
            drift = _mean([(self._predict(batch) - before).square() for batch, before in pairs])
        return {"loss": loss, "drift": drift}

    def images(
        self, reporter: Reporter = silent
    ) -> tuple[dict[str, float | None], list[Image.Image]]:
        """DINO, CLIP-I and CLIP-T of generated images, as cosines; the share of right backgrounds
        by the classifier where the model has one; and the images, by prompt.
        """
        settings, subject = self.settings, self._subject
        prompts = [
            template.format(subject.spoken)
            for template in subject.templates
            for _ in range(settings.per_prompt)
        ]
        seeds = list(range(settings.per_prompt)) * len(subject.templates)
        with evaluating(*self._networks.values()):
            images = generate(
                self._pipeline, prompts, settings.sampling(), seeds=seeds, reporter=reporter
            )
        encoders = _encoders(*self._bench.encoders, str(self._unet.device))
        features = subject_features(encoders, [p.image for p in subject.references.photos])
        token = subject.subject.prompts.token
        found = measure(encoders, features, images, prompts, token=token)
        values = {name: getattr(found, name) for name in ("dino", "clip_i", "clip_t")}
        right = None
        if self._bench.small:
            from cntlora_core.mini.making.evaluate import right_backgrounds

            right = right_backgrounds(images, prompts, str(subject.subject.prompts.class_name))
        return values | {"backgrounds": right}, images

    @torch.no_grad()
    def _predict(self, batch: NoisedBatch) -> Tensor:
        device, dtype = self._unet.device, self._unet.dtype
        prediction = predict(
            self._unet,
            batch.latents.to(device, dtype),
            batch.timesteps.to(device),
            self._family.encode(self._networks, batch.tokens),
        )
        return prediction.float().cpu()


def measured_by(bench: Bench) -> list[str]:
    """What tells apart the models that look at images: of those on this machine a hash of their
    weights, of the others the hub id."""
    return _identities(*bench.encoders, bench.small)


@functools.lru_cache(maxsize=1)
def _identities(dino: str, clip: str, small: bool) -> list[str]:
    found = []
    for part, source in (("vision", dino), ("clip", clip)):
        place = encoder_path(part) if source == SMALL else user_path(source)
        weights = sorted(place.glob("*.safetensors"))
        name = place.name if place.is_dir() else source
        found.append(fingerprint_files(weights) if weights else name)
    if small:
        from cntlora_core.mini.making.evaluate import CLASSIFIER

        found.append(fingerprint_files(sorted(CLASSIFIER.glob("*.safetensors"))))
    return found


@functools.lru_cache(maxsize=1)
def _encoders(dino: str, clip: str, device: str) -> Encoders:
    return load_encoders(dino, clip, device=device)


def _joined(batches: NoisedPhotos, size: int) -> list[NoisedBatch]:
    """The single samples, joined to batches."""
    samples = list(batches)
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    return [
        NoisedBatch(
            latents=torch.cat([sample.latents for sample in part]),
            timesteps=torch.cat([sample.timesteps for sample in part]),
            tokens=torch.cat([sample.tokens for sample in part]),
            target=torch.cat([sample.target for sample in part]),
        )
        for part in parts
    ]


def _mean(errors: Sequence[Tensor]) -> float | None:
    if not errors:
        return None
    return float(torch.cat([error.flatten(1).mean(1) for error in errors]).double().mean())
