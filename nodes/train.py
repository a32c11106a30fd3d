"""Teach the model the subject."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from PIL import Image

from cntlora_core.data.captions import fill_placeholders
from cntlora_core.diffusion.settings import (
    JobSettings,
    OptimizerName,
    OutputSettings,
    PriorSettings,
    Schedule,
    TrainingSettings,
)
from cntlora_core.runtime.file_names import safe_name

from .pictures import image_tensor, shown
from .runtime import HostReporter, device_name, run_heavy, tell
from .sockets import (
    ClassImages,
    ClassImagesSocket,
    InitializationSocket,
    LoRAModel,
    LoRASocket,
    LossSocket,
    TrainingInitialization,
)
from .widgets import ADVANCED, CATEGORY, LARGEST_SEED, default_of, lines, work_folder

if TYPE_CHECKING:
    from cntlora_core.diffusion.job import JobResult

USE_IT, TRAIN_ANEW = "use what is there", "train anew"


@dataclass(frozen=True)
class Trained:
    """What a run left in its folder: the LoRA file, and the loss of each step."""

    lora: Path
    history: list[dict[str, float]]

    def pictures(self, prompts: Sequence[str]) -> list[Image.Image]:
        """The course of the loss, and what was generated for these prompts after the last step."""
        from cntlora_core.diffusion.run_folder import sample_names
        from cntlora_core.figures.plots import loss_picture

        folder = self.lora.parent / "samples"
        samples = [folder / name for name in sample_names(len(self.history), prompts)]
        last = [Image.open(path) for path in samples if path.is_file()]
        return [loss_picture(self.history, self.lora.stem), *last]


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
    return JobSettings(
        model=str(initialized.model.path),
        subject=initialized.subject.settings,
        output=output,
        prior=prior,
        adapter=initialized.initialization.adapter,
        training=training,
        clip_skip=initialized.model.clip_skip,
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
) -> Trained:
    """Find the finished run, go on with the one that was begun, or begin."""
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
            reporter=reporter,
        )

    result = run_heavy(teach, job.training.steps)
    tell("\n".join((f"{len(result.history)} steps, {result.lora}", *result.notes)))
    return Trained(result.lora, result.history)


class TrainSubject(io.ComfyNode):
    """The DreamBooth training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRATrain",
            display_name="Teach the Subject (train LoRA)",
            category=CATEGORY,
            description="Trains the LoRA. Cancel whenever you like: queue the same graph again and "
            "it goes on where it stopped. A training that is finished is not repeated; more steps "
            "are added to it.",
            is_output_node=True,
            inputs=[
                InitializationSocket.Input("start", tooltip="Model, subject and initialisation."),
                ClassImagesSocket.Input(
                    "class_images",
                    optional=True,
                    tooltip="Images of the class, so that the model does not forget it. Without "
                    "them training is faster and forgets more.",
                ),
                *_main_inputs(),
                *_advanced_inputs(),
            ],
            outputs=[
                LoRASocket.Output(display_name="lora", tooltip="The trained LoRA."),
                LossSocket.Output(display_name="loss", tooltip="The loss of each step."),
                io.String.Output(display_name="path", tooltip="Where the LoRA file is."),
                io.Image.Output(display_name="loss picture", tooltip="The course of the loss."),
            ],
        )

    @classmethod
    def execute(
        cls,
        start: TrainingInitialization,
        steps: int,
        learning_rate: float,
        prior_weight: float,
        validation_prompt: str,
        preview_every: int,
        training_seed: int,
        name: str,
        trained_before: str,
        batch_size: int,
        gradient_accumulation: int,
        weight_decay: float,
        max_grad_norm: float,
        lr_schedule: Schedule,
        lr_warmup: int,
        text_encoder_lr: float,
        text_encoder_steps: int,
        caption_dropout: float,
        optimizer: OptimizerName,
        min_snr_gamma: float,
        gradient_checkpointing: bool,
        preview_steps: int,
        save_every: int,
        compress: bool,
        save_lora_every: int,
        class_images: ClassImages | None = None,
    ) -> io.NodeOutput:
        prompts = lines(fill_placeholders(validation_prompt, start.subject.prompts))
        training = TrainingSettings(
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            lr_schedule=lr_schedule,
            lr_warmup=lr_warmup,
            text_encoder_lr=text_encoder_lr or None,
            text_encoder_steps=text_encoder_steps or None,
            caption_dropout=caption_dropout,
            optimizer=optimizer,
            min_snr_gamma=min_snr_gamma or None,
            precision=start.model.precision,
            gradient_checkpointing=gradient_checkpointing,
            device=device_name(),
            seed=training_seed,
            save_every=save_every,
            sample_prompts=prompts if preview_every else (),
            sample_every=preview_every if prompts else 0,
            sample_steps=preview_steps,
        )
        output = OutputSettings(
            output=str(work_folder()),
            name=name or None,
            compress=compress,
            save_lora_every=save_lora_every,
        )
        job = job_settings(start, class_images, training, prior_weight, output)
        trained = train(job, start, class_images, trained_before == TRAIN_ANEW)
        pictures = trained.pictures(training.sample_prompts)
        losses = [record["loss"] for record in trained.history]
        return io.NodeOutput(
            LoRAModel.read(trained.lora),
            {"loss": losses},
            str(trained.lora),
            image_tensor(pictures[:1]),
            ui=shown(pictures),
        )


def _main_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "steps",
            default=default_of(TrainingSettings, "steps"),
            min=1,
            max=1_000_000,
            tooltip="Training steps; 1000 are the paper's, for 4 to 6 photos. More than were "
            "trained before are added to those.",
        ),
        io.Float.Input(
            "learning_rate",
            default=default_of(TrainingSettings, "learning_rate"),
            min=0.0,
            max=1.0,
            step=1e-6,
            round=1e-9,
            tooltip="How large the steps are. Lower it if images look burnt, raise it if the "
            "subject does not come through.",
        ),
        io.Float.Input(
            "prior_weight",
            default=default_of(PriorSettings, "prior_weight"),
            min=0.0,
            max=10.0,
            step=0.05,
            tooltip="How much the class images count.",
        ),
        io.String.Input(
            "validation_prompt",
            default="a photo of {token} {class}",
            multiline=True,
            tooltip="Prompts of the previews while training, one image for each line. {token} and "
            "{class} are filled in.",
        ),
        io.Int.Input(
            "preview_every",
            default=200,
            min=0,
            max=1_000_000,
            tooltip="Steps between the previews; 0 generates none.",
        ),
        io.Int.Input(
            "training_seed",
            display_name="seed",
            default=default_of(TrainingSettings, "seed"),
            min=0,
            max=LARGEST_SEED,
            control_after_generate=False,
            tooltip="The same seed trains the same LoRA.",
        ),
        io.String.Input(
            "name",
            default="",
            tooltip="Name of the LoRA file, and of its folder in output/cntlora if that is new; "
            "empty takes token, class and method.",
        ),
    ]


def _advanced_inputs() -> list[io.Input]:
    # New ones at the end: ComfyUI keeps the values of a saved workflow by place.
    return [
        io.Combo.Input(
            "trained_before",
            options=[USE_IT, TRAIN_ANEW],
            default=USE_IT,
            extra_dict=ADVANCED,
            tooltip="If just this training was done before, or begun: use it and go on with it, or "
            "throw it away. Another name, compress, gradient_checkpointing or more steps make no "
            "other training.",
        ),
        io.Int.Input(
            "batch_size",
            default=default_of(TrainingSettings, "batch_size"),
            min=1,
            max=1000,
            extra_dict=ADVANCED,
            tooltip="Photos for each step; as many class images go with them.",
        ),
        io.Int.Input(
            "gradient_accumulation",
            default=default_of(TrainingSettings, "gradient_accumulation"),
            min=1,
            max=1000,
            extra_dict=ADVANCED,
            tooltip="Batches that are averaged for each step: a larger batch without more memory.",
        ),
        io.Float.Input(
            "weight_decay",
            default=default_of(TrainingSettings, "weight_decay"),
            min=0.0,
            max=1.0,
            step=0.001,
            round=1e-6,
            extra_dict=ADVANCED,
            tooltip="Pulls the LoRA's weights back towards their initialisation.",
        ),
        io.Float.Input(
            "max_grad_norm",
            default=default_of(TrainingSettings, "max_grad_norm"),
            min=0.0,
            max=1000.0,
            step=0.1,
            extra_dict=ADVANCED,
            tooltip="Largest norm of the gradient; 0 sets no limit.",
        ),
        io.Combo.Input(
            "lr_schedule",
            options=[name for name in get_args(Schedule) if name != "piecewise_constant"],
            default=default_of(TrainingSettings, "lr_schedule"),
            extra_dict=ADVANCED,
            tooltip="How the learning rate changes over the training.",
        ),
        io.Int.Input(
            "lr_warmup",
            default=default_of(TrainingSettings, "lr_warmup"),
            min=0,
            max=100_000,
            extra_dict=ADVANCED,
            tooltip="Steps over which the learning rate rises at first; not with a constant one.",
        ),
        io.Float.Input(
            "min_snr_gamma",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.5,
            extra_dict=ADVANCED,
            tooltip="Evens out how much noisy and clear images count; 5 is usual, 0 is off.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=default_of(TrainingSettings, "gradient_checkpointing"),
            label_on="yes",
            label_off="no",
            extra_dict=ADVANCED,
            tooltip="Much less memory for slower steps.",
        ),
        io.Int.Input(
            "preview_steps",
            default=20,
            min=1,
            max=1000,
            extra_dict=ADVANCED,
            tooltip="Sampling steps of the preview images.",
        ),
        io.Int.Input(
            "save_every",
            default=default_of(TrainingSettings, "save_every"),
            min=1,
            max=1_000_000,
            extra_dict=ADVANCED,
            tooltip="Steps between states on the disk from which a crashed training goes on. "
            "Cancelling saves one too.",
        ),
        io.Boolean.Input(
            "compress",
            default=default_of(OutputSettings, "compress"),
            label_on="yes",
            label_off="no",
            extra_dict=ADVANCED,
            tooltip="Half the file size where this loses at most 1 %. Initialisations from photos "
            "otherwise give files of twice the rank, which are exact.",
        ),
        io.Float.Input(
            "text_encoder_lr",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=1e-9,
            extra_dict=ADVANCED,
            tooltip="Learning rate of the text encoder; 0 takes half of the other.",
        ),
        io.Int.Input(
            "text_encoder_steps",
            default=0,
            min=0,
            max=1_000_000,
            extra_dict=ADVANCED,
            tooltip="After how many steps the text encoder stops learning; 0 is never.",
        ),
        io.Float.Input(
            "caption_dropout",
            default=default_of(TrainingSettings, "caption_dropout"),
            min=0.0,
            max=0.99,
            step=0.05,
            extra_dict=ADVANCED,
            tooltip="Share of the photos that are read without their prompt.",
        ),
        io.Combo.Input(
            "optimizer",
            options=list(get_args(OptimizerName)),
            default=default_of(TrainingSettings, "optimizer"),
            extra_dict=ADVANCED,
            tooltip="adamw_8bit needs the package bitsandbytes, prodigy the package prodigyopt. "
            "prodigy finds its learning rate: set learning_rate to 1.",
        ),
        io.Int.Input(
            "save_lora_every",
            default=default_of(OutputSettings, "save_lora_every"),
            min=0,
            max=1_000_000,
            extra_dict=ADVANCED,
            tooltip="Steps between LoRAs that are kept on the way, for Compare Steps; 0 keeps "
            "none. A training that is finished already gets none: train it anew.",
        ),
    ]


NODES = [TrainSubject]
