"""Previews: images that a run generates while it trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from PIL import Image

from cntlora_core.data.captions import SubjectPrompts
from cntlora_core.data.prompts import filled_prompt
from cntlora_core.diffusion.memory_use import give_memory_back, with_less_memory
from cntlora_core.diffusion.pipeline import StableDiffusionParts
from cntlora_core.diffusion.prior import images_at_once
from cntlora_core.diffusion.run_folder import SAMPLES_NAME, sample_names
from cntlora_core.diffusion.run_log import RunLog
from cntlora_core.diffusion.sampler import generate
from cntlora_core.diffusion.settings import JobSettings, SamplingSettings
from cntlora_core.diffusion.stages import training_resolution
from cntlora_core.figures.sheets import save_image
from cntlora_core.runtime.files import folder_within
from cntlora_core.runtime.modes import evaluating
from cntlora_core.runtime.reading import lacks_memory


def preview_prompts(settings: JobSettings, prompts: SubjectPrompts) -> tuple[str, ...]:
    """The prompts of a run's previews, filled in.

    Raises:
        ValueError: for a placeholder where the subject was given by full prompts.
    """
    return tuple(filled_prompt(text, prompts) for text in settings.training.sample_prompts)


class Previews:
    """Generates the previews, as many at once as class images.

    Where memory runs out they are generated one by one, and where that is too much they are left
    out: a training does not end because of its previews.

    Attributes:
        prompts: One for each image.

    Args:
        parts: The model; its UNet and text encoders are those that are trained.
        prompts: See :func:`preview_prompts`; at least one.
        settings: Of the run.
        run: Told what is generated, and of memory that ran out.
    """

    def __init__(
        self,
        parts: StableDiffusionParts,
        prompts: tuple[str, ...],
        settings: JobSettings,
        run: RunLog,
    ) -> None:
        self.prompts, self._run = prompts, run
        self._pipeline, self._networks = parts.pipeline(), parts.networks
        self._sampling = SamplingSettings(
            steps=settings.training.sample_steps,
            resolution=settings.subject.resolution,
            seed=settings.training.seed,
            batch_size=images_at_once(parts, training_resolution(parts, settings.subject)),
        )

    def __call__(self, step: int, folder: Path) -> list[Image.Image] | None:
        """Generate those of a step into the run's folder; None where memory lacked."""
        try:
            pictures = with_less_memory(self._generate, self._one_by_one)
        except Exception as error:
            if not lacks_memory(error):
                raise
            pictures = None
        if pictures is None:  # only now: the error held what is in memory
            give_memory_back()
            self._run.note(f"memory ran out: the previews after step {step} were left out")
            return None
        samples = folder_within(folder, SAMPLES_NAME)
        for name, picture in zip(sample_names(step, self.prompts), pictures, strict=True):
            save_image(picture, samples / name)
        return pictures

    def _generate(self) -> list[Image.Image]:
        with evaluating(*self._networks.values()):
            return generate(
                self._pipeline,
                self.prompts,
                self._sampling,
                reporter=self._run.reporter,
                stage="generating samples",
            )

    def _one_by_one(self) -> bool:
        """Use less memory from now on; False where that is done already."""
        if min(self._sampling.batch_size, len(self.prompts)) == 1:
            return False
        self._sampling = dataclasses.replace(self._sampling, batch_size=1)
        self._run.note("memory ran out: previews are generated one by one")
        return True
