"""The photos of the subject, and images of its class."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from PIL import Image, ImageOps
from torch import Tensor

from cntlora_core.data.captions import CAPTION_SUFFIXES
from cntlora_core.data.photos import IMAGE_SUFFIXES, PhotoSet, load_photos, photos_from_images
from cntlora_core.diffusion.settings import PriorSettings, SubjectSettings, torch_dtype
from cntlora_core.figures.sheets import contact_sheet

from .pictures import image_arrays, image_tensor, shown
from .runtime import HostReporter, device_name, run_heavy, tell
from .sockets import ClassImages, ClassImagesSocket, ModelChoice, ModelSocket, SubjectSocket
from .widgets import (
    ADVANCED,
    CATEGORY,
    LARGEST_SEED,
    NO_FOLDER,
    default_of,
    input_folder,
    input_folders,
    lines,
    work_folder,
)

if TYPE_CHECKING:
    from cntlora_core.diffusion.stages import Subject

PREVIEW_SIDE = 512
SHOWN_CLASS_IMAGES = 16
GENERATE_THEM = "draw them with the model"


def folder_digest(folder: Path) -> str:
    """Changes with any picture or caption file in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix.lower() in (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES):
            digest.update(f"{path.name};{path.stat().st_size};".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def given_photos(images: list[Tensor] | None, folder: str, captions: list[str]) -> PhotoSet:
    """Pictures from the socket or from a folder of ComfyUI's input.

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
        return load_photos(input_folder(folder))
    if folder != NO_FOLDER:
        raise ValueError(f"images are connected and a folder is chosen: set folder to {NO_FOLDER}")
    return photos_from_images(image_arrays(images), texts or None)


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
                    "512 for SD1.5.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                SubjectSocket.Output(display_name="subject", tooltip="The subject, checked."),
                io.Image.Output(display_name="pictures", tooltip="The photos as they are cropped."),
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
        images: Any = None,
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
        images: list[Tensor] | None = None,
    ) -> io.NodeOutput:
        from cntlora_core.diffusion.stages import read_subject

        settings = SubjectSettings(
            images="" if images is not None else folder[0],
            token=token[0],
            class_name=class_name[0],
            resolution=resolution[0] or None,
            flip=flip[0],
        )
        subject = read_subject(settings, given_photos(images, folder[0], captions))
        side = settings.resolution or PREVIEW_SIDE
        pictures = [
            ImageOps.fit(photo.image, (side, side), Image.Resampling.LANCZOS)
            for photo in subject.photos.photos
        ]
        text = "\n".join((_summary(subject), *subject.notes))
        tell(text)
        return io.NodeOutput(
            subject,
            image_tensor(pictures),
            subject.prompts.instance_prompt,
            text,
            ui=shown([contact_sheet(pictures, side=192)]),
        )


def _summary(subject: Subject) -> str:
    count = len(subject.photos.photos)
    return (
        f"{count} {'photo' if count == 1 else 'photos'}, “{subject.prompts.instance_prompt}”, "
        f"class “{subject.prompts.class_prompt}”"
    )


class ClassPictures(io.ComfyNode):
    """Images of the class, generated by the model itself or from a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRAClassImages",
            display_name="Class Images",
            category=CATEGORY,
            description="Images of what the model already knows of the class, so that it does "
            "not forget what other dogs look like while it learns yours. They are generated "
            "once and kept.",
            inputs=[
                ModelSocket.Input("model", tooltip="The model that generates them."),
                SubjectSocket.Input("subject", tooltip="The subject; the images show its class."),
                io.Combo.Input(
                    "source",
                    options=[GENERATE_THEM, *input_folders()[1:]],
                    default=GENERATE_THEM,
                    tooltip="Let the model generate the images, or take those of a folder of "
                    "ComfyUI's input directory.",
                ),
                io.Int.Input(
                    "count",
                    default=default_of(PriorSettings, "num_class_images"),
                    min=1,
                    max=10000,
                    tooltip="Number of images. A larger number later generates only what is "
                    "missing.",
                ),
                io.Int.Input(
                    "steps",
                    default=default_of(PriorSettings, "class_steps"),
                    min=1,
                    max=1000,
                    tooltip="Sampling steps of each image.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "guidance",
                    default=default_of(PriorSettings, "class_guidance"),
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="How closely the images follow the class prompt.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "images_seed",
                    display_name="seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=False,
                    tooltip="Seed of the images. Another seed generates another set.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                ClassImagesSocket.Output(
                    display_name="class_images", tooltip="To be connected to the training."
                ),
                io.Image.Output(display_name="pictures", tooltip="Some of the images, on a sheet."),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        source: str,
        count: int,
        steps: int,
        guidance: float,
        images_seed: int,
        model: Any = None,
        subject: Any = None,
    ) -> str:
        """Changes with the content of the folder, not only with its name."""
        return "" if source == GENERATE_THEM else folder_digest(input_folder(source))

    @classmethod
    def execute(
        cls,
        model: ModelChoice,
        subject: Subject,
        source: str,
        count: int,
        steps: int,
        guidance: float,
        images_seed: int,
    ) -> io.NodeOutput:
        from cntlora_core.diffusion.pipeline import load_stable_diffusion
        from cntlora_core.diffusion.prior import class_images
        from cntlora_core.diffusion.stages import training_resolution

        prompt = subject.prompts.class_prompt
        if source != GENERATE_THEM:
            side = subject.settings.resolution or PREVIEW_SIDE
            folder = input_folder(source)
            photos = load_photos(folder, read_captions=False, resolution=side, shrink=True)
        else:
            settings = PriorSettings(
                num_class_images=count,
                class_steps=steps,
                class_guidance=guidance,
                class_seed=images_seed,
                cache=str(work_folder() / "cache"),
            )

            def sample(reporter: HostReporter) -> PhotoSet:
                reporter("loading the model", 0, 1, {})
                dtype = torch_dtype(model.precision)
                parts = load_stable_diffusion(
                    model.path, dtype=dtype, device=device_name(), clip_skip=model.clip_skip
                )
                side = training_resolution(parts, subject.settings)
                return class_images(parts, prompt, settings, resolution=side, reporter=reporter)

            photos = run_heavy(sample)
        tell(f"{len(photos.photos)} photos of “{prompt}”")
        sheet = contact_sheet([p.image for p in photos.photos[:SHOWN_CLASS_IMAGES]])
        return io.NodeOutput(ClassImages(photos, prompt), image_tensor([sheet]), ui=shown([sheet]))


NODES = [SubjectPhotos, ClassPictures]
