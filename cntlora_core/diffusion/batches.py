"""The samples of each training step: photos and class images, their noise and timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cntlora_core.data.latents import LatentSet
from cntlora_core.diffusion.settings import TrainingSettings
from cntlora_core.runtime.seeds import torch_seed


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on; photos and class images are encoded already.

    Attributes:
        photos: The subject's latents, n of them.
        photo_tokens: (n, length) prompt tokens, one row for each photo.
        class_images: The class images' latents, or None.
        class_tokens: (1, length) tokens of the class prompt, or None.
        empty_tokens: (length,) tokens of the empty prompt, which caption dropout needs.
        photo_time_ids: (n, 6) the photos' sizes, where the model reads them.
        class_time_ids: (1, 6) those of every class image, likewise.
    """

    photos: LatentSet
    photo_tokens: Tensor
    class_images: LatentSet | None = None
    class_tokens: Tensor | None = None
    empty_tokens: Tensor | None = None
    photo_time_ids: Tensor | None = None
    class_time_ids: Tensor | None = None


@dataclass(frozen=True)
class SameShape:
    """The samples of one shape in a batch, which one pass of the denoiser takes together.

    ``items`` are their places in the batch, ``latents`` and ``noise`` (m, c, h, w), ``weights``
    (m, h, w) those of the loss, or None.
    """

    items: Tensor
    latents: Tensor
    noise: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class Batch:
    """Samples of one shape or of several: ``timesteps`` (n,), ``tokens`` (n, length), and
    ``time_ids`` (n, 6) where the model reads sizes."""

    shapes: tuple[SameShape, ...]
    timesteps: Tensor
    tokens: Tensor
    instances: int
    time_ids: Tensor | None = None


def draw_batch(
    data: TrainingData,
    training: TrainingSettings,
    step: int,
    micro: int,
    *,
    with_class_images: bool,
    horizon: int,
    device: torch.device,
) -> Batch:
    """The samples of one batch: a function of seed, step and micro-batch alone.

    Args:
        data: Photos and class images.
        training: Batch size, gradient accumulation and seed.
        step: Steps done before.
        micro: Number of the batch within the step.
        with_class_images: Whether as many class images go with the photos.
        horizon: Timesteps of the noise schedule.
        device: Where the batch goes.
    """
    size = training.batch_size
    first = (step * training.gradient_accumulation + micro) * size
    generator = _generator(training.seed, 1, step, micro)
    photos = _shuffled_items(len(data.photos), first, size, training.seed, 2)
    latents = [data.photos.sample(i, generator) for i in photos]
    weights = [data.photos.weights[i] for i in photos]
    tokens = [data.photo_tokens[data.photos.photo_index[i]] for i in photos]
    sizes = data.photo_time_ids
    if sizes is not None:
        sizes = sizes[[data.photos.photo_index[i] for i in photos]]
    if share := training.caption_dropout:
        assert data.empty_tokens is not None
        chances = torch.rand(size, generator=_generator(training.seed, 4, step, micro))
        tokens = [
            data.empty_tokens if chance < share else row
            for chance, row in zip(chances.tolist(), tokens, strict=True)
        ]
    if with_class_images:
        assert data.class_images is not None
        assert data.class_tokens is not None
        others = _shuffled_items(len(data.class_images), first, size, training.seed, 3)
        latents += [data.class_images.sample(i, generator) for i in others]
        weights += [None] * size
        tokens += [data.class_tokens[0]] * size
        if sizes is not None:
            assert data.class_time_ids is not None
            sizes = torch.cat([sizes, data.class_time_ids.expand(size, -1)])
    shapes = _by_shape(latents, weights, generator, device)
    timesteps = torch.randint(horizon, (len(latents),), generator=generator)
    return Batch(shapes, timesteps.to(device), torch.stack(tokens), size, sizes)


def _shuffled_items(count: int, start: int, size: int, seed: int, stream: int) -> Sequence[int]:
    """Items ``start`` to ``start + size`` of an endless sequence of shuffled passes over all."""
    items = []
    for position in range(start, start + size):
        epoch, within = divmod(position, count)
        order = torch.randperm(count, generator=_generator(seed, stream, epoch))
        items.append(int(order[within]))
    return items


def _by_shape(
    latents: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    generator: torch.Generator,
    device: torch.device,
) -> tuple[SameShape, ...]:
    """The samples of a batch, those of one shape together, with noise from the generator."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, latent in enumerate(latents):
        places.setdefault(tuple(latent.shape), []).append(place)
    shapes = []
    for shape, items in places.items():
        masks = [weights[i] for i in items]
        even = torch.ones(shape[1:])
        shapes.append(
            SameShape(
                torch.tensor(items, device=device),
                torch.stack([latents[i] for i in items]).to(device),
                torch.randn((len(items), *shape), generator=generator).to(device),
                None
                if all(mask is None for mask in masks)
                else torch.stack([even if m is None else m for m in masks]).to(device),
            )
        )
    return tuple(shapes)


def _generator(*numbers: int) -> torch.Generator:
    """A generator that is a function of the numbers (splitmix-like mixing into 63 bits)."""
    value = 0
    words = [torch_seed(number) for number in numbers]
    words = [half for word in words for half in ([word] if word < 2**32 else [word, word >> 32])]
    for number in words:
        value = (value ^ (number & 0xFFFFFFFF)) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 29
    return torch.Generator().manual_seed(value >> 1)
