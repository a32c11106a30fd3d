"""What a run trains on and is measured on: photos, class images and held-out photos, encoded."""

from __future__ import annotations

from dataclasses import dataclass

from cntlora_core.data.photos import PhotoSet
from cntlora_core.diffusion.pipeline import StableDiffusionParts
from cntlora_core.diffusion.prior import cache_folder, class_images
from cntlora_core.diffusion.run_log import RunLog
from cntlora_core.diffusion.settings import JobSettings
from cntlora_core.diffusion.stages import (
    EncodedSubject,
    Subject,
    encode_class_images,
    encode_held_out,
    encode_subject,
    training_resolution,
)


@dataclass(frozen=True, eq=False)
class Material:
    """The photos, the class images and what is encoded of both; None for what a run has none of."""

    encoded: EncodedSubject
    class_photos: PhotoSet | None
    others: EncodedSubject | None
    held_out: EncodedSubject | None


def read_material(
    parts: StableDiffusionParts,
    subject: Subject,
    class_photos: PhotoSet | None,
    settings: JobSettings,
    run: RunLog,
) -> Material:
    """Read it from the cache, or generate and encode it."""
    cache, reporter, others = cache_folder(settings.prior), run.reporter, None
    with run.timed("encoding"):
        encoded = encode_subject(parts, subject, cache=cache, reporter=reporter)
    run.note(*encoded.notes)
    if settings.prior.prior_weight == 0:
        class_photos = None
    else:
        if class_photos is None:
            class_photos = _class_photos(parts, subject, settings, run)
        with run.timed("encoding"):
            others = encode_class_images(
                parts, subject, class_photos, cache=cache, reporter=reporter
            )
        run.note(*others.notes)
    with run.timed("encoding"):
        held_out = encode_held_out(parts, subject, cache=cache, reporter=reporter)
    run.note(*(() if held_out is None else held_out.notes))
    return Material(encoded, class_photos, others, held_out)


def _class_photos(
    parts: StableDiffusionParts, subject: Subject, settings: JobSettings, run: RunLog
) -> PhotoSet:
    with run.timed("class images"):
        return class_images(
            parts,
            subject.prompts.class_prompt,
            settings.prior,
            resolution=training_resolution(parts, settings.subject),
            reporter=run.reporter,
        )
