"""How well generated images show the subject, and follow their prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from torch import Tensor

from cntlora_core.data.captions import fill_placeholders
from cntlora_core.data.pictures import picture_from_array

from .pictures import image_arrays, image_tensor, shown
from .runtime import HostReporter, device_name, run_heavy, tell
from .sockets import SubjectSocket
from .widgets import ADVANCED, CATEGORY, encoder_names, encoder_source, lines

if TYPE_CHECKING:
    from PIL import Image

    from cntlora_core.diffusion.stages import Subject
    from cntlora_core.metrics.fidelity import Fidelity


def prompt_of_each(text: str, subject: Subject, pictures: int) -> list[str]:
    """One prompt for each picture: each line stands for as many pictures as the others.

    Raises:
        ValueError: the pictures cannot be shared out among the lines, in words.
    """
    prompts = lines(fill_placeholders(text, subject.prompts))
    if not prompts or pictures % len(prompts):
        raise ValueError(
            f"{pictures} pictures and {len(prompts)} prompts: write one line for each picture, or "
            "one for every so many; Generate Images gives its prompts along with its images"
        )
    return [prompt for prompt in prompts for _ in range(pictures // len(prompts))]


def judge(
    subject: Subject, pictures: list[Image.Image], prompts: list[str], dino: str, clip: str
) -> tuple[Fidelity, Fidelity | None]:
    """Load the encoders and look; what the photos score among themselves comes second."""
    from cntlora_core.metrics.encoders import load_encoders
    from cntlora_core.metrics.fidelity import measure, measure_photos, subject_features

    def look(reporter: HostReporter) -> tuple[Fidelity, Fidelity | None]:
        reporter("loading the encoders", 0, 1, {})
        encoders = load_encoders(dino, clip, device=device_name(), local_files_only=True)
        photos = [photo.image for photo in subject.photos.photos]
        features = subject_features(encoders, photos, reporter)
        token = subject.prompts.token
        found = measure(encoders, features, pictures, prompts, token=token, reporter=reporter)
        return found, measure_photos(features)

    return run_heavy(look)


def encoder_inputs() -> list[Any]:
    """The widgets that choose what measures."""
    return [
        io.Combo.Input(
            "dino",
            options=encoder_names("vision"),
            default=encoder_names("vision")[0],
            extra_dict=ADVANCED,
            tooltip="The encoder that compares the subject. For figures like published "
            "ones put facebook/dino-vits16 into a folder of models/clip_vision.",
        ),
        io.Combo.Input(
            "clip",
            options=encoder_names("clip"),
            default=encoder_names("clip")[0],
            extra_dict=ADVANCED,
            tooltip="The encoder that compares images with prompts. For figures like "
            "published ones put openai/clip-vit-large-patch14 into a folder of "
            "models/clip_vision.",
        ),
    ]


class MeasurePictures(io.ComfyNode):
    """DINO, CLIP-I and CLIP-T by DreamBooth's protocol."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        numbers = {
            "dino": "How alike the subject is in images and photos, by DINO; 100 is the same.",
            "clip_i": "The same by CLIP, which sees the class more than the single object.",
            "clip_t": "How well the images follow their prompts, by CLIP; 25 to 35 is usual.",
        }
        return io.Schema(
            node_id="CNTLoRAEvaluate",
            display_name="Measure Images (evaluate)",
            category=CATEGORY,
            description="Measures how well images show your subject (DINO, CLIP-I) and how well "
            "they follow their prompts (CLIP-T). Compare LoRAs by these scores, with the "
            "same prompts and seeds.",
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "images", tooltip="The images, one batch: from Generate Images or VAE Decode."
                ),
                SubjectSocket.Input("subject", tooltip="Your subject; its photos are compared."),
                io.String.Input(
                    "prompts",
                    default="a photo of {token} {class}",
                    multiline=True,
                    tooltip="The prompts of the images: one line for each image, or fewer "
                    "lines for equal runs of images. {token} and {class} are filled in.",
                ),
                *encoder_inputs(),
            ],
            outputs=[
                *(io.Float.Output(display_name=name, tooltip=tip) for name, tip in numbers.items()),
                io.Image.Output(
                    display_name="sheet", tooltip="Photos and images by prompt, with the scores."
                ),
                io.String.Output(display_name="report", tooltip="All scores, prompt by prompt."),
            ],
        )

    @classmethod
    def execute(
        cls, images: Tensor, subject: Subject, prompts: str, dino: str, clip: str
    ) -> io.NodeOutput:
        from cntlora_core.metrics.view import fidelity_report, fidelity_sheet

        pictures = [
            picture_from_array(array, f"picture {i}").convert("RGB")
            for i, array in enumerate(image_arrays([images]), 1)
        ]
        asked = prompt_of_each(prompts, subject, len(pictures))
        sources = encoder_source(dino, "vision"), encoder_source(clip, "clip")
        found, themselves = judge(subject, pictures, asked, *sources)
        photos = [photo.image for photo in subject.photos.photos]
        sheet = fidelity_sheet(photos, [found], [(pictures, asked)], side=128)
        text = fidelity_report([found, *([themselves] if themselves else [])])
        tell(text)
        scores = [100 * (score or 0.0) for score in (found.dino, found.clip_i, found.clip_t)]
        return io.NodeOutput(*scores, image_tensor([sheet]), text, ui=shown([sheet]))


NODES = [MeasurePictures]
