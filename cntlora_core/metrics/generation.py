"""Generating what is to be measured: the same prompts and seeds with each LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from cntlora_core.diffusion.compare import BASE_LABEL
from cntlora_core.diffusion.sampler import LoRAUse, apply_lora_files, generate
from cntlora_core.diffusion.settings import SamplingSettings
from cntlora_core.figures.sheets import save_image
from cntlora_core.metrics.pictures import write_prompts
from cntlora_core.runtime.file_names import distinct_names, safe_name
from cntlora_core.runtime.files import require_writable_folder
from cntlora_core.runtime.progress import Reporter, silent

if TYPE_CHECKING:
    from cntlora_core.diffusion.pipeline import Pipeline


@dataclass(frozen=True)
class GenerationSettings:
    """What is generated with each LoRA.

    Attributes:
        prompts: One or more.
        per_prompt: Pictures of each; DreamBooth's protocol takes four.
        with_base: Generate without a LoRA too, to see what it brought.
        sampling: How each image is generated; the seeds count up from its own for every prompt.
    """

    prompts: tuple[str, ...]
    per_prompt: int = 4
    with_base: bool = True
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there are no prompts to generate images for")
        if self.per_prompt < 1:
            raise ValueError(f"per_prompt must be at least 1, got {self.per_prompt}")

    @property
    def all_prompts(self) -> list[str]:
        """The prompt of each picture."""
        return [prompt for prompt in self.prompts for _ in range(self.per_prompt)]

    @property
    def all_seeds(self) -> list[int]:
        """The seed of each picture."""
        first = self.sampling.seed
        return list(range(first, first + self.per_prompt)) * len(self.prompts)


def generate_each(
    pipeline: Pipeline,
    loras: Sequence[LoRAUse],
    settings: GenerationSettings,
    reporter: Reporter = silent,
    labels: Sequence[str] | None = None,
) -> Iterator[tuple[str, list[Image.Image]]]:
    """Generate without a LoRA, if asked for, and with each; yields a label and the pictures.

    Args:
        pipeline: Without adapters; it is left without them.
        loras: Each for itself, with its strength.
        settings: What to generate.
        reporter: Told the number of pictures done.
        labels: Of the LoRAs; default: the names of their files.
    """
    prompts, seeds = settings.all_prompts, settings.all_seeds

    def pictures(label: str) -> tuple[str, list[Image.Image]]:
        stage = f"generating {label}"
        return label, generate(
            pipeline, prompts, settings.sampling, seeds=seeds, reporter=reporter, stage=stage
        )

    if settings.with_base:
        yield pictures(BASE_LABEL)
    for lora, label in zip(loras, labels or _labels(loras), strict=True):
        try:
            apply_lora_files(pipeline, [lora])
            yield pictures(label)
        finally:
            pipeline.unload_lora_weights()


def _labels(loras: Sequence[LoRAUse]) -> list[str]:
    """File names, with strengths where these differ from 1, made different where they are not."""
    labels = [BASE_LABEL]
    for lora in loras:
        label = lora.path.stem if lora.strength == 1 else f"{lora.path.stem} at {lora.strength:g}"
        first, count = label, 1
        while label in labels:
            count += 1
            label = f"{first} ({count})"
        labels.append(label)
    return labels[1:]


def folder_names(loras: Sequence[LoRAUse]) -> dict[str, str]:
    """The name of a folder for each label that :func:`generate_each` yields, no two alike."""
    labels = [BASE_LABEL, *_labels(loras)]
    return dict(zip(labels, distinct_names(labels), strict=True))


def save_generated(
    folder: Path, pictures: Sequence[Image.Image], settings: GenerationSettings
) -> Path:
    """Write pictures and their prompts, so that the folder can be measured again."""
    folder = require_writable_folder(folder)
    prompts = {}
    for number, (prompt, seed, picture) in enumerate(
        zip(settings.all_prompts, settings.all_seeds, pictures, strict=True)
    ):
        name = f"{number // settings.per_prompt:02}-{safe_name(prompt, max_length=60)}-{seed}.png"
        save_image(picture, folder / name)
        prompts[name] = prompt
    write_prompts(folder, prompts)
    return folder
