"""One training from the node's settings: found where it was done before, gone on with, or begun."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from cntlora_core.diffusion.settings import (
    JobSettings,
    OutputSettings,
    PriorSettings,
    TrainingSettings,
)
from cntlora_core.runtime.file_names import safe_name

from .pictures import read_picture
from .runtime import HostReporter, run_heavy, tell
from .sockets import ClassImages, TrainingInitialization
from .widgets import work_folder

if TYPE_CHECKING:
    from cntlora_core.diffusion.job import JobResult


@dataclass(frozen=True)
class Trained:
    """What a run left in its folder: the LoRA file, and the loss of each step."""

    lora: Path
    history: list[dict[str, float]]

    def loss_picture(self) -> Image.Image:
        """The course of the loss; drawn anew where the run's own plot is missing."""
        from cntlora_core.diffusion.run_folder import LOSS_NAME
        from cntlora_core.figures.plots import loss_picture

        try:
            return read_picture(self.lora.parent / LOSS_NAME)
        except OSError:
            return loss_picture(self.history, self.lora.stem)

    def previews(self, prompts: Sequence[str]) -> dict[int, list[Image.Image]]:
        """What was generated for these prompts, by the step after which it was, in their order."""
        from cntlora_core.diffusion.run_folder import SAMPLES_NAME, sample_names

        folder = self.lora.parent / SAMPLES_NAME
        numbers = {path.name.partition("-")[0] for path in folder.glob("*-*.png")}
        steps = sorted(int(number) for number in numbers if number.isdecimal())
        found = {}
        for step in (step for step in steps if step <= len(self.history)):
            paths = [folder / name for name in sample_names(step, prompts)]
            if pictures := [read_picture(path) for path in paths if path.is_file()]:
                found[step] = pictures
        return found


def job_settings(
    initialized: TrainingInitialization,
    class_images: ClassImages | None,
    training: TrainingSettings,
    prior_weight: float,
    output: OutputSettings,
) -> JobSettings:
    """A run's settings: those of initialisation and training; the folder is still open."""
    prior = PriorSettings(
        prior_weight=0.0 if class_images is None else prior_weight,
        num_class_images=1 if class_images is None else len(class_images.photos.photos),
        cache=str(work_folder() / "cache"),
    )
    adapter = initialized.initialization.adapter
    if not adapter.train_text_encoder:  # what the widgets hold for it does not matter
        training = dataclasses.replace(training, text_encoder_lr=None, text_encoder_steps=None)
    return JobSettings(
        model=str(initialized.model.path),
        subject=initialized.subject.settings,
        output=output,
        prior=prior,
        adapter=adapter,
        training=training,
        clip_skip=initialized.model.clip_skip,
        prediction_type=initialized.model.prediction_type,
    )


def run_folder(name: str, key: str, steps: int) -> Path:
    """The folder of a run: one that there is already, whatever its name, or a new one.

    Steps are added to a run where it is. A run of fewer steps than one has done gets a folder of
    its own, so that the longer one stays.
    """
    from cntlora_core.diffusion.run_identity import finished_run, steps_in

    def folder(digits: str) -> Path:
        there = sorted(work_folder().glob(f"*-{digits}"))
        return there[0] if there else work_folder() / f"{safe_name(name)}-{digits}"

    longest = folder(key)
    found = finished_run(longest)
    as_asked = found is not None and len(found.history) == steps
    return longest if as_asked or steps_in(longest) <= steps else folder(f"{key}-{steps}")


def train(
    job: JobSettings,
    initialized: TrainingInitialization,
    class_images: ClassImages | None,
    anew: bool,
    header: Mapping[str, str],
) -> Trained:
    """Find the finished run, go on with the one that was begun, or begin.

    Args:
        job: All settings; the folder of the output is still open.
        initialized: The model, the subject and the initialisation.
        class_images: Images of the class, if any.
        anew: Train even where a run is found.
        header: For the header of the LoRA file, beside what the core writes there.
    """
    from cntlora_core.diffusion.job import personalise
    from cntlora_core.diffusion.run_identity import STATE_NAME, finished_run, run_identity, run_key

    photos = None  # class images that do not count make no other run
    if class_images is not None and job.prior.prior_weight > 0:
        photos = class_images.photos
    start, subject = initialized.initialization, initialized.subject
    key = run_key(job, run_identity(start.model, subject, photos, start.seed, start.from_lora))
    words = (subject.prompts.token, subject.prompts.class_name, job.adapter.method)
    name = job.output.name or "-".join(word for word in words if word)
    folder = run_folder(name, key[:8], job.training.steps)
    found = None if anew else finished_run(folder)
    if found is not None and found.is_what(job.training.steps, job.output):
        tell(f"trained before, taken from {folder}")
        return Trained(found.lora, found.history)
    output = dataclasses.replace(job.output, output=str(folder))

    def teach(reporter: HostReporter) -> JobResult:
        return personalise(
            dataclasses.replace(job, output=output),
            subject=subject,
            class_photos=photos,
            initialization=start,
            resume=not anew and (folder / STATE_NAME).is_file(),
            overwrite=True,
            header=header,
            reporter=reporter,
        )

    result = run_heavy(teach, job.training.steps)
    tell("\n".join((f"{len(result.history)} steps, {result.lora}", *result.notes)))
    return Trained(result.lora, result.history)
