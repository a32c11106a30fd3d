"""The photos of the subject."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch import Tensor

from cntlora_core.data.captions import CAPTION_SUFFIXES
from cntlora_core.data.framing import bucket_step, crop_note, enlarged_notes, frame
from cntlora_core.data.latents import bucket_sizes
from cntlora_core.data.masks import FOLDER_NAME as MASKS_FOLDER
from cntlora_core.data.photos import IMAGE_SUFFIXES, PhotoSet, load_photos, photos_from_images
from cntlora_core.diffusion.settings import SubjectSettings
from cntlora_core.figures.sheets import photo_sheet

from .pictures import image_arrays, image_tensor, shown
from .runtime import tell
from .sockets import SubjectSocket
from .widgets import (
    ADVANCED,
    CATEGORY,
    NO_FOLDER,
    default_of,
    input_folder,
    input_folders,
    lines,
)

if TYPE_CHECKING:
    from cntlora_core.diffusion.stages import Subject

PREVIEW_SIDE = 512
PREVIEW_MODEL = (8, 4)
"""Stable Diffusion 1.5's pixels for each latent, and the levels of its UNet."""


def folder_digest(folder: Path) -> str:
    """Changes with any picture, caption file or mask in a folder."""
    digest = hashlib.sha256()
    masks = folder / MASKS_FOLDER
    for path in sorted([*folder.iterdir(), *(masks.iterdir() if masks.is_dir() else ())]):
        if path.is_file() and path.suffix.lower() in (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES):
            digest.update(f"{path.name};{path.stat().st_size};".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def given_photos(
    images: list[Tensor] | None,
    folder: str,
    captions: list[str],
    masks: list[Tensor] | None = None,
) -> PhotoSet:
    """Pictures from the socket or from a folder of ComfyUI's input, with their masks.

    Raises:
        ValueError, OSError: neither or both, or pictures that cannot be used, in words.
    """
    texts = captions if len(captions) > 1 else list(lines(captions[0]))
    if images is None and folder == NO_FOLDER:
        raise ValueError(
            "there are no photos: connect images, or choose a folder of ComfyUI's input directory"
        )
    if images is None:
        if texts:
            raise ValueError(
                "captions are for connected images; for a folder, put a text file of the same "
                "name beside each picture (dog1.txt for dog1.jpg), or leave captions empty"
            )
        if masks is not None:
            raise ValueError(
                "masks are for connected images; for a folder, put a mask beside each picture "
                "(dog1.mask.png for dog1.jpg), and connect none"
            )
        return load_photos(input_folder(folder))
    if folder != NO_FOLDER:
        raise ValueError(f"images are connected and a folder is chosen: set folder to {NO_FOLDER}")
    return photos_from_images(
        image_arrays(images), texts or None, None if masks is None else image_arrays(masks)
    )


class SubjectPhotos(io.ComfyNode):
    """Photos, token and class name, checked."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRASubject",
            display_name="Subject Photos",
            category=CATEGORY,
            description="What is to be learnt: 4 to 6 photos of one subject, a rare word that will "
            "stand for it, and its class. The report names what is wrong with the photos.",
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The photos: one batch, or a list of images of any sizes.",
                ),
                io.Combo.Input(
                    "folder",
                    options=input_folders(),
                    default=NO_FOLDER,
                    tooltip="Or a folder of photos in ComfyUI's input directory, or an example. A "
                    "text file of the same name beside a photo is its caption.",
                ),
                io.String.Input(
                    "token",
                    default="sks",
                    tooltip="A short rare word that will stand for your subject. You write it in "
                    "prompts later on.",
                ),
                io.String.Input(
                    "class_name",
                    default="dog",
                    tooltip="The class of the subject, in one or two words: dog, teapot, backpack.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="One line for each connected image, or empty. {token} and {class} are "
                    "filled in.",
                ),
                io.Boolean.Input(
                    "flip",
                    default=default_of(SubjectSettings, "flip"),
                    tooltip="Learn from mirrored photos too. Not for subjects with a left and a "
                    "right, or with writing.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=2048,
                    step=8,
                    tooltip="Side of the square training images in pixels; 0 is the model's own, "
                    "512 for SD1.5. A photo of another shape is resized to about the same area.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "crop",
                    default=default_of(SubjectSettings, "crop"),
                    label_on="to a square",
                    label_off="as little as possible",
                    tooltip="Photos keep their shape, or are cropped to a square in their middle.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "unmasked_weight",
                    default=default_of(SubjectSettings, "unmasked_weight"),
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the background outside a photo's mask is learnt: 0 is "
                    "nothing, 1 is as much as the subject.",
                    extra_dict=ADVANCED,
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="A mask for each connected image, white where the subject is. Load "
                    "Image gives the opposite for a cut-out: put Invert Mask between.",
                ),
                io.Image.Input(
                    "held_out",
                    optional=True,
                    tooltip="Further photos of the subject that are not trained on. The loss on "
                    "them is shown while training: where it rises, the photos are learnt by heart.",
                ),
            ],
            outputs=[
                SubjectSocket.Output(display_name="subject", tooltip="The subject, checked."),
                io.Image.Output(
                    display_name="pictures",
                    is_output_list=True,
                    tooltip="The photos as they are cropped, each in its own shape.",
                ),
                io.String.Output(
                    display_name="prompt", tooltip="The prompt that calls the subject up."
                ),
                io.String.Output(
                    display_name="report", tooltip="What was noticed about photos and captions."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        folder: list[str],
        token: list[str],
        class_name: list[str],
        captions: list[str],
        flip: list[bool],
        resolution: list[int],
        crop: list[bool],
        unmasked_weight: list[float],
        images: Any = None,
        masks: Any = None,
        held_out: Any = None,
    ) -> str:
        """Changes with the content of the folder, not only with its name."""
        return "" if folder[0] == NO_FOLDER else folder_digest(input_folder(folder[0]))

    @classmethod
    def execute(
        cls,
        folder: list[str],
        token: list[str],
        class_name: list[str],
        captions: list[str],
        flip: list[bool],
        resolution: list[int],
        crop: list[bool],
        unmasked_weight: list[float],
        images: list[Tensor] | None = None,
        masks: list[Tensor] | None = None,
        held_out: list[Tensor] | None = None,
    ) -> io.NodeOutput:
        from cntlora_core.diffusion.stages import read_subject

        settings = SubjectSettings(
            images="" if images is not None else folder[0],
            token=token[0],
            class_name=class_name[0],
            resolution=resolution[0] or None,
            flip=flip[0],
            crop=crop[0],
            unmasked_weight=unmasked_weight[0],
        )
        others = None if held_out is None else photos_from_images(image_arrays(held_out))
        subject = read_subject(settings, given_photos(images, folder[0], captions, masks), others)
        photos, side = subject.photos.photos, settings.resolution or PREVIEW_SIDE
        step = None if settings.crop else bucket_step(side, *PREVIEW_MODEL)
        frames = [
            frame(photo.image.size, size)
            for photo, size in zip(photos, bucket_sizes(photos, side, step))
        ]
        pictures = [
            photo.image.resize(part.size, Image.Resampling.LANCZOS, box=part.box)
            for photo, part in zip(photos, frames)
        ]
        notes = list(subject.notes)
        if settings.resolution:  # that of the model is not known here: the training names them
            notes += enlarged_notes(subject.names, frames)
        if cropped := crop_note(subject.names, frames):
            notes.append(cropped)
        text = "\n".join((_summary(subject), *notes))
        tell(text)
        masked = settings.unmasked_weight < 1
        sheet = photo_sheet(photos, subject.names, frames, masked=masked, side=192)
        return io.NodeOutput(
            subject,
            [image_tensor([picture]) for picture in pictures],
            subject.prompts.instance_prompt,
            text,
            ui=shown([sheet]),
        )


def _summary(subject: Subject) -> str:
    count = len(subject.photos.photos)
    return (
        f"{count} {'photo' if count == 1 else 'photos'}, “{subject.prompts.instance_prompt}”, "
        f"class “{subject.prompts.class_prompt}”"
    )


NODES = [SubjectPhotos]
