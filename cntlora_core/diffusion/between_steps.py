"""What a run does between two training steps, beside training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cntlora_core.diffusion.export import ExportReport
from cntlora_core.diffusion.previews import Previews
from cntlora_core.diffusion.settings import JobSettings
from cntlora_core.diffusion.snapshots import snapshots_in, write_snapshot
from cntlora_core.diffusion.trainer import SubjectTrainer
from cntlora_core.diffusion.watching import HeldOutLoss, Trackers


class BetweenSteps:
    """The loss on held-out photos, trackers, LoRAs that are kept on the way, and previews.

    Args:
        trainer: The training, at its first step or where it goes on.
        settings: What is due when.
        target: Where the run's LoRA will be.
        export: Writes the LoRA as it is now.
        held_out: Measures the loss on held-out photos; None without any.
        previews: Generates previews; None for none.
    """

    def __init__(
        self,
        trainer: SubjectTrainer,
        settings: JobSettings,
        target: Path,
        export: Callable[[Path], ExportReport],
        *,
        held_out: HeldOutLoss | None,
        previews: Previews | None,
    ) -> None:
        self._trainer, self._settings, self._target = trainer, settings, target
        self._export, self._held_out, self._previews = export, held_out, previews
        self._untrained: float | None = None
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
        if self._previews is not None and (due or step == training.steps):
            pictures = self._previews(step, self._target.parent)
            if pictures is not None:
                self._trackers.images(step, self._previews.prompts, pictures)

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
