"""What a run does between two training steps, beside training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cntlora_core.diffusion.export import ExportReport
from cntlora_core.diffusion.run_folder import SAMPLES_NAME, sample_names
from cntlora_core.diffusion.sampler import generate
from cntlora_core.diffusion.settings import JobSettings, SamplingSettings
from cntlora_core.diffusion.snapshots import snapshots_in, write_snapshot
from cntlora_core.diffusion.trainer import SubjectTrainer
from cntlora_core.diffusion.watching import HeldOutLoss, Trackers
from cntlora_core.figures.sheets import save_image
from cntlora_core.runtime.files import folder_within
from cntlora_core.runtime.modes import evaluating
from cntlora_core.runtime.progress import Reporter

if TYPE_CHECKING:
    from cntlora_core.diffusion.pipeline import Pipeline


class BetweenSteps:
    """The loss on held-out photos, trackers, LoRAs that are kept on the way, and previews.

    Args:
        trainer: The training, at its first step or where it goes on.
        settings: What is due when.
        target: Where the run's LoRA will be.
        export: Writes the LoRA as it is now.
        held_out: Measures the loss on held-out photos; None without any.
        preview: Generates previews; None for none.
        reporter: Told what is generated.
    """

    def __init__(
        self,
        trainer: SubjectTrainer,
        settings: JobSettings,
        target: Path,
        export: Callable[[Path], ExportReport],
        *,
        held_out: HeldOutLoss | None,
        preview: Pipeline | None,
        reporter: Reporter,
    ) -> None:
        self._trainer, self._settings, self._target = trainer, settings, target
        self._export, self._held_out, self._preview = export, held_out, preview
        self._reporter, self._untrained = reporter, None
        self._trackers = Trackers(settings, target.parent, target.stem, trainer.step)

    def begin(self) -> None:
        """What is due before the first step."""
        self._keep(self._trainer.step)  # missing where a run was stopped or ended at that step
        if self._held_out is not None and self._trainer.step == 0:
            self._untrained = self._held_out()

    def __call__(self, step: int) -> None:
        """What is due after a step."""
        training = self._settings.training
        if self._held_out is not None and (
            step % training.held_out_every == 0 or step == training.steps
        ):
            self._trainer.history[-1]["held_out_loss"] = self._held_out()
        self._trackers.follow(self._trainer.history)
        self._keep(step)
        due = training.sample_every and step % training.sample_every == 0
        if self._preview is not None and (due or step == training.steps):
            self._generate(self._preview, step)

    def notes(self) -> list[str]:
        """Where the loss on held-out photos was lowest: a person may ask which step to take."""
        history = self._trainer.history
        found = {i: r["held_out_loss"] for i, r in enumerate(history, 1) if "held_out_loss" in r}
        if not found:
            return []
        best = min(found, key=found.__getitem__)
        before = "" if self._untrained is None else f"{self._untrained:.4f} before training, "
        return [
            f"loss on the held-out photos: {before}lowest at step {best} ({found[best]:.4f}), "
            f"{found[max(found)]:.4f} at the end"
        ]

    def finish(self) -> None:
        """Close the trackers."""
        self._trackers.finish()

    def _keep(self, step: int) -> None:
        """Keep the LoRA of a step that is due, unless it is there already."""
        folder, every = self._target.parent, self._settings.output.save_lora_every
        due = every > 0 and 0 < step < self._settings.training.steps and step % every == 0
        if due and step not in {snapshot.step for snapshot in snapshots_in(folder)}:
            write_snapshot(folder, self._target, step, self._export)

    def _generate(self, pipeline: Pipeline, step: int) -> None:
        training = self._settings.training
        sampling = SamplingSettings(
            steps=training.sample_steps,
            resolution=self._settings.subject.resolution,
            seed=training.seed,
        )
        prompts, reporter = training.sample_prompts, self._reporter
        with evaluating(*self._trainer.networks.values()):
            pictures = generate(
                pipeline, prompts, sampling, reporter=reporter, stage="generating samples"
            )
        samples = folder_within(self._target.parent, SAMPLES_NAME)
        for name, picture in zip(sample_names(step, prompts), pictures, strict=True):
            save_image(picture, samples / name)
        self._trackers.images(step, prompts, pictures)
