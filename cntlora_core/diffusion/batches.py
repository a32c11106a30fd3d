"""The samples of each training step: photos and class images, their noise and timesteps."""

from __future__ import annotations

import dataclasses
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
    ``time_ids`` (n, 6) where the model reads sizes.

    The first ``instances`` show the subject, the others its class. ``whole`` says how many of
    either there are in the batch of which this is a part, or all.
    """

    shapes: tuple[SameShape, ...]
    timesteps: Tensor
    tokens: Tensor
    instances: int
    whole: tuple[int, int]
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    def part(self, places: Sequence[int]) -> Batch:
        """The samples at some places, in ascending order, with the noise that they have here."""
        if len(places) == len(self):
            return self
        new = {place: number for number, place in enumerate(places)}
        shapes = []
        for shape in self.shapes:
            items = shape.items.tolist()
            rows = [row for row, item in enumerate(items) if item in new]
            if rows:
                shapes.append(
                    SameShape(
                        torch.tensor([new[items[row]] for row in rows]),
                        shape.latents[rows],
                        shape.noise[rows],
                        None if shape.weights is None else shape.weights[rows],
                    )
                )
        chosen = list(places)
        return Batch(
            tuple(shapes),
            self.timesteps[chosen],
            self.tokens[chosen],
            sum(place < self.instances for place in chosen),
            self.whole,
            None if self.time_ids is None else self.time_ids[chosen],
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, but for the tokens; CUDA's stream is not waited for."""
        return dataclasses.replace(
            self,
            shapes=tuple(
                SameShape(
                    moved(shape.items, device),
                    moved(shape.latents, device),
                    moved(shape.noise, device),
                    None if shape.weights is None else moved(shape.weights, device),
                )
                for shape in self.shapes
            ),
            timesteps=moved(self.timesteps, device),
            time_ids=None if self.time_ids is None else moved(self.time_ids, device),
        )


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; CUDA copies it when its turn comes."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def share_of(training: TrainingSettings, micro: int, rank: int, count: int) -> range | None:
    """The photos of a micro-batch that are one process's, by their places; None for none of them.

    The processes share each batch, or else take whole micro-batches in turn.
    """
    size = training.batch_size
    if size % count == 0:
        own = size // count
        return range(rank * own, (rank + 1) * own)
    return range(size) if micro % count == rank else None


def require_shareable(training: TrainingSettings, count: int) -> None:
    """Refuse more processes than a step has work for.

    Raises:
        ValueError: if neither batch_size nor gradient_accumulation is a multiple of the number.
    """
    if training.batch_size % count and training.gradient_accumulation % count:
        raise ValueError(
            f"{count} processes cannot share a step of batch_size={training.batch_size} and "
            f"gradient_accumulation={training.gradient_accumulation}: make one of them a multiple "
            f"of {count}, for example --batch-size {count}, or use fewer processes"
        )


def draw_batch(
    data: TrainingData,
    training: TrainingSettings,
    step: int,
    micro: int,
    *,
    with_class_images: bool,
    horizon: int,
) -> Batch:
    """The samples of one batch, on the CPU: a function of seed, step and micro-batch alone.

    Args:
        data: Photos and class images.
        training: Batch size, gradient accumulation and seed.
        step: Steps done before.
        micro: Number of the batch within the step.
        with_class_images: Whether as many class images go with the photos.
        horizon: Timesteps of the noise schedule.
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
    shapes = _by_shape(latents, weights, generator)
    timesteps = torch.randint(horizon, (len(latents),), generator=generator)
    if scale := training.noise_offset:
        shift = _generator(training.seed, 5, step, micro)
        shapes = tuple(_shifted(shape, scale, shift) for shape in shapes)
    whole = (size, len(latents) - size)
    return Batch(shapes, timesteps, torch.stack(tokens), size, whole, sizes)


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
                torch.tensor(items),
                torch.stack([latents[i] for i in items]),
                torch.randn((len(items), *shape), generator=generator),
                None
                if all(mask is None for mask in masks)
                else torch.stack([even if m is None else m for m in masks]),
            )
        )
    return tuple(shapes)


def _shifted(samples: SameShape, scale: float, generator: torch.Generator) -> SameShape:
    """With a random constant for each channel in the noise, which pixels' own noise lacks: "offset
    noise", as sd-scripts and diffusers have it."""
    constants = torch.randn(*samples.noise.shape[:2], 1, 1, generator=generator)
    return dataclasses.replace(samples, noise=samples.noise + scale * constants)


def _generator(*numbers: int) -> torch.Generator:
    """A generator that is a function of the numbers (splitmix-like mixing into 63 bits)."""
    value = 0
    words = [torch_seed(number) for number in numbers]
    words = [half for word in words for half in ([word] if word < 2**32 else [word, word >> 32])]
    for number in words:
        value = (value ^ (number & 0xFFFFFFFF)) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 29
    return torch.Generator().manual_seed(value >> 1)
