"""The stages of a personalisation, one function each, from finished values to finished values.

``job.personalise`` runs them in one go; a graph runs them one by one and keeps what they give.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cntlora_core.data.captions import (
    SubjectPrompts,
    TrainingPrompts,
    subject_prompts,
    token_note,
    training_prompts,
)
from cntlora_core.data.framing import Frame, bucket_step, crop_note, enlarged_notes, frame, listed
from cntlora_core.data.latents import LatentSet, bucket_sizes, encode_latents
from cntlora_core.data.photos import (
    ONLY_ONE_PHOTO,
    PhotoSet,
    load_photos,
    photo_names,
    pixel_digest,
)
from cntlora_core.diffusion.batches import TrainingData
from cntlora_core.diffusion.from_lora import fingerprint_from_lora, require_family
from cntlora_core.diffusion.initialize import plan_adapter
from cntlora_core.diffusion.pipeline import StableDiffusionParts
from cntlora_core.diffusion.settings import AdapterSettings, SubjectSettings
from cntlora_core.initialization.report import InitializationReport
from cntlora_core.runtime.files import folder_within
from cntlora_core.runtime.memory import freed_memory_kept
from cntlora_core.runtime.progress import Reporter, silent, stage_progress
from cntlora_core.runtime.threads import threads, threads_for

if TYPE_CHECKING:
    from cntlora_core.diffusion.adapters import Plan


@dataclass(frozen=True, eq=False)
class Subject:
    """What is taught, read and checked, before any model is needed.

    Attributes:
        settings: What was asked for.
        photos: The pictures with their own captions.
        prompts: The prompts of the subject and of its class.
        training_prompts: One prompt for each photo, captions filled in.
        held_out: Photos of the same subject that are not trained on; None without any.
    """

    settings: SubjectSettings
    photos: PhotoSet
    prompts: SubjectPrompts
    training_prompts: TrainingPrompts
    held_out: PhotoSet | None = None

    @property
    def of_held_out(self) -> Subject | None:
        """The held-out photos in the place of those trained on, each under its own prompt."""
        if self.held_out is None:
            return None
        texts = _prompts_of(self.held_out, self.prompts)
        return replace(self, photos=self.held_out, training_prompts=texts, held_out=None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of photos and captions."""
        skipped = (f"skipped {s.path.name}: {s.reason}" for s in self.photos.skipped)
        held_out = self.of_held_out
        others = () if held_out is None else held_out.notes
        return (
            *self.photos.warnings,
            *skipped,
            *self.training_prompts.warnings,
            *_of_held_out(note for note in others if note != ONLY_ONE_PHOTO),
        )

    @property
    def names(self) -> list[str]:
        """What messages call the photos."""
        return photo_names(self.photos.photos)

    def identity(self) -> dict[str, Any]:
        """What tells this subject from another, as JSON values."""
        photos = self.photos.photos
        return {
            "photos": [photo.digest for photo in photos],
            "masks": [photo.mask and pixel_digest(photo.mask) for photo in photos],
            "prompts": list(self.training_prompts.prompts),
        }


def _of_held_out(notes: Iterable[str]) -> tuple[str, ...]:
    """Notes that say which photos they are about: names may be those of photos trained on."""
    return tuple(f"held-out photos: {note}" for note in notes)


def read_subject(
    settings: SubjectSettings, photos: PhotoSet | None = None, held_out: PhotoSet | None = None
) -> Subject:
    """Photos and prompts, checked.

    Args:
        settings: Folder, token, class name and so on.
        photos: Pictures handed over in memory, in place of the folder's.
        held_out: Likewise, of the subject but not to train on.

    Raises:
        ValueError, OSError: for photos, captions or prompts that cannot be used, in words.
    """
    prompts = subject_prompts(
        settings.token, settings.class_name, settings.instance_prompt, settings.class_prompt
    )
    photos = photos if photos is not None else load_photos(settings.images)
    if held_out is None and settings.held_out is not None:
        held_out = load_photos(settings.held_out)
    return Subject(settings, photos, prompts, _prompts_of(photos, prompts), held_out)


def _prompts_of(photos: PhotoSet, prompts: SubjectPrompts) -> TrainingPrompts:
    captions = [photo.caption for photo in photos.photos]
    return training_prompts(captions, prompts, photo_names(photos.photos))


def training_resolution(parts: StableDiffusionParts, settings: SubjectSettings) -> int:
    """Side of the square training pictures in pixels."""
    return settings.resolution or parts.default_resolution


def training_bucket_step(parts: StableDiffusionParts, settings: SubjectSettings) -> int | None:
    """What the sides of photos that are not square are multiples of; None: all are cropped."""
    if settings.crop:
        return None
    levels = len(parts.unet.config["block_out_channels"])
    return bucket_step(training_resolution(parts, settings), parts.latent_scale, levels)


@dataclass(frozen=True, eq=False)
class EncodedSubject:
    """A subject as the model reads it.

    Attributes:
        latents: The photos' posteriors.
        tokens: (n, length) prompt tokens, one row for each photo.
        prompts: The same prompts as text.
        notes: What a person should know: cut prompts, odd tokens, small and cropped photos, masks.
        frames: The part of each picture that is trained on.
        empty_tokens: (length,) tokens of the empty prompt.
        time_ids: (n, 6) what the model reads of the photos' sizes, see ``Family.time_ids``.
    """

    latents: LatentSet
    tokens: Tensor
    prompts: tuple[str, ...]
    notes: tuple[str, ...]
    frames: tuple[Frame, ...] = ()
    empty_tokens: Tensor | None = None
    time_ids: Tensor | None = None


def encode_subject(
    parts: StableDiffusionParts, subject: Subject, *, cache: Path, reporter: Reporter = silent
) -> EncodedSubject:
    """Photos to latents, through the cache on disk, and prompts to tokens.

    Raises:
        ValueError: for a resolution that does not fit the model.
    """
    photos, token, settings = subject.photos.photos, subject.prompts.token, subject.settings
    resolution = training_resolution(parts, settings)
    step = training_bucket_step(parts, settings)
    tokens = parts.tokens(subject.training_prompts.prompts)
    odd_token = token_note(token, parts.tokenizer) if token else None
    with threads(threads_for(parts.unet)):
        latents = encode_latents(
            photos,
            parts.vae,
            resolution=resolution,
            bucket_step=step,
            flip=settings.flip,
            unmasked_weight=settings.unmasked_weight,
            cache_dir=folder_within(cache, "latents"),
            vae_fingerprint=parts.fingerprint,
            progress=stage_progress(reporter, "encoding photos"),
        )
    frames = tuple(
        frame(photo.image.size, size)
        for photo, size in zip(photos, bucket_sizes(photos, resolution, step))
    )
    notes = (
        odd_token,
        *tokens.messages,
        *enlarged_notes(subject.names, frames),
        crop_note(subject.names, frames),
        _mask_note(subject),
    )
    return EncodedSubject(
        latents,
        tokens.input_ids,
        subject.training_prompts.prompts,
        tuple(filter(None, notes)),
        frames,
        parts.tokens([""]).input_ids[0],
        parts.family.time_ids(frames),
    )


def _mask_note(subject: Subject) -> str | None:
    weight = subject.settings.unmasked_weight
    masked = [n for n, p in zip(subject.names, subject.photos.photos) if p.mask is not None]
    if not masked or weight == 1:
        return None
    return f"outside the masks of {listed(masked)} the loss weighs {weight:g} of that inside"


def encode_held_out(
    parts: StableDiffusionParts, subject: Subject, *, cache: Path, reporter: Reporter = silent
) -> EncodedSubject | None:
    """The held-out photos under their prompts, as :func:`encode_subject`, if any."""
    others = subject.of_held_out
    if others is None:
        return None
    others = replace(others, prompts=replace(others.prompts, token=None))  # it has had its note
    encoded = encode_subject(parts, others, cache=cache, reporter=reporter)
    return replace(encoded, notes=_of_held_out(encoded.notes))


def encode_class_images(
    parts: StableDiffusionParts,
    subject: Subject,
    photos: PhotoSet,
    *,
    cache: Path,
    reporter: Reporter = silent,
) -> EncodedSubject:
    """Class images to latents, and the class prompt, (1, length), to tokens."""
    tokens = parts.tokens([subject.prompts.class_prompt])
    resolution = training_resolution(parts, subject.settings)
    size = (resolution, resolution)
    with threads(threads_for(parts.unet)):
        latents = encode_latents(
            photos.photos,
            parts.vae,
            resolution=resolution,
            cache_dir=folder_within(cache, "latents"),
            vae_fingerprint=parts.fingerprint,
            progress=stage_progress(reporter, "encoding class images"),
        )
    notes = [f"skipped {s.path.name}: {s.reason}" for s in photos.skipped]
    if small := sum(min(photo.image.size) < resolution for photo in photos.photos):
        notes.append(
            f"{small} of {len(photos.photos)} class images have fewer than {resolution} x "
            f"{resolution} pixels and are enlarged: they teach the blur too"
        )
    return EncodedSubject(
        latents,
        tokens.input_ids,
        (subject.prompts.class_prompt,),
        (*notes, *tokens.messages),
        time_ids=parts.family.time_ids([frame(size, size)]),
    )


def training_data(photos: EncodedSubject, others: EncodedSubject | None) -> TrainingData:
    """What the trainer takes, with class images or without."""
    return TrainingData(
        photos.latents,
        photos.tokens,
        None if others is None else others.latents,
        None if others is None else others.tokens,
        photos.empty_tokens,
        photos.time_ids,
        None if others is None else others.time_ids,
    )


@dataclass(frozen=True, eq=False)
class Initialization:
    """An adapter's initialisation, for the model that it was made on.

    Attributes:
        plan: Ranks and factors of every attachment point.
        adapter: The settings that it was made with.
        seed: Seed of its timesteps, noise and random directions.
        model: Fingerprint of the model.
        report: What the initialisation did; None for the plain one, which reads nothing.
        from_lora: Fingerprint of the LoRA that it goes on from; None where it goes on from none.
    """

    plan: Plan
    adapter: AdapterSettings
    seed: int
    model: str
    report: InitializationReport | None
    from_lora: str | None = None

    def require_model(self, parts: StableDiffusionParts) -> None:
        """Refuse another model than the one that the initialisation was made on.

        Raises:
            ValueError: in words.
        """
        if parts.fingerprint != self.model:
            raise ValueError(
                f"the initialisation was made on another model than {parts.source}: make it anew "
                "on this one"
            )


def plan_initialization(
    parts: StableDiffusionParts,
    encoded: EncodedSubject,
    adapter: AdapterSettings,
    *,
    seed: int = 0,
    reporter: Reporter = silent,
) -> Initialization:
    """Decide ranks and initial factors; the model stays as it is.

    Raises:
        ValueError: for a rank that the model's layers cannot hold, and the like, in words.
    """
    require_family(adapter, parts.family)
    on_cpu = parts.unet.device.type == "cpu"
    count = threads_for(parts.unet)
    with torch.inference_mode(False), freed_memory_kept(on_cpu), threads(count):
        plan, report = plan_adapter(
            parts.networks,
            parts.family,
            parts.noise_scheduler,
            encoded.latents,
            encoded.tokens,
            adapter,
            time_ids=encoded.time_ids,
            seed=seed,
            reporter=reporter,
        )
    fingerprint = fingerprint_from_lora(adapter)
    return Initialization(plan, adapter, seed, parts.fingerprint, report, fingerprint)
