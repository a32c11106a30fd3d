"""``cntlora train``: photos in, a LoRA file out."""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cntlora_core.diffusion.settings import (
    AdapterSettings,
    JobSettings,
    OutputSettings,
    PredictionType,
    PriorSettings,
    SubjectSettings,
    TrainingSettings,
)
from cntlora_core.runtime.console import ConsoleReporter


@dataclass(frozen=True)
class Train:
    """Teach a Stable Diffusion 1.5 or XL model a subject: photos in, a LoRA file out.

    --help-all shows all flags. --config FILE takes flags from a TOML file, or those of another run
    from its run.json; --preset paper takes the settings of the published figures: rank 128, 1000
    steps at a constant learning rate of 1e-4. A file wins over a preset, and flags of the command
    line over both.

    Attributes:
        model: Stable Diffusion 1.5 or XL as one .safetensors file, a diffusers folder or a hub id.
        clip_skip: Which layer of the text encoder is read, from the last; 1 is the last.
        prediction_type: What the model predicts, where its file says nothing or something wrong;
            default: what it says.
        resume: Go on with the run in the output folder: an interrupted one to its end, a finished
            one to a LoRA file of another name, layout or precision or, at a constant learning rate,
            to more steps.
        overwrite: Start anew even where the output folder holds a run, which is removed before the
            first step.
        processes: GPUs that train together: each takes its share of every batch, so that the LoRA
            is that of one GPU. It must divide --batch-size or --gradient-accumulation without rest.
    """

    model: str
    subject: Annotated[SubjectSettings, tyro.conf.OmitArgPrefixes]
    output: Annotated[OutputSettings, tyro.conf.OmitArgPrefixes]
    prior: Annotated[PriorSettings, tyro.conf.OmitArgPrefixes] = field(
        default_factory=PriorSettings
    )
    adapter: Annotated[AdapterSettings, tyro.conf.OmitArgPrefixes] = field(
        default_factory=AdapterSettings
    )
    training: Annotated[TrainingSettings, tyro.conf.OmitArgPrefixes] = field(
        default_factory=TrainingSettings
    )
    clip_skip: int = 1
    resume: bool = False
    overwrite: bool = False
    processes: int = 1
    prediction_type: PredictionType | None = None

    def after_cancel(self) -> str:
        """What to do next, for a person who has pressed Ctrl-C."""
        from cntlora_core.diffusion.job import STATE_NAME

        if (Path(self.output.output) / STATE_NAME).exists():
            return "; the run goes on with --resume"
        return " before the first step; class images and encoded photos are kept for next time"

    def run(self, reporter: ConsoleReporter) -> None:
        from cntlora_core.diffusion.job import personalise
        from cntlora_core.runtime.processes import joined

        settings = JobSettings(
            self.model,
            self.subject,
            self.output,
            self.prior,
            self.adapter,
            self.training,
            self.clip_skip,
            self.prediction_type,
        )
        with joined(self.training.device) as processes:
            reporter.console.quiet = not processes.first  # one tells what is done
            result = personalise(
                settings, resume=self.resume, overwrite=self.overwrite, reporter=reporter
            )
            if processes.first:
                print(result.lora)


if __name__ == "__main__":  # as launchers of several processes start it
    sys.argv.insert(1, "train")
    runpy.run_module("cntlora_core.cli", run_name="__main__")
