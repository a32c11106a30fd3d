"""Teach the model the subject."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from PIL import Image

from cntlora_core.data.captions import fill_placeholders
from cntlora_core.diffusion.settings import (
    OptimizerName,
    OutputSettings,
    Schedule,
    TrainingSettings,
)

from .pictures import image_tensor, shown
from .runtime import device_name, spares_memory
from .sockets import (
    ClassImages,
    ClassImagesSocket,
    InitializationSocket,
    LoRAModel,
    LoRASocket,
    LossSocket,
    TrainingInitialization,
)
from .thumbnail import leave_thumbnail
from .training_run import job_settings, train
from .training_widgets import (
    TRAIN_ANEW,
    USUAL_CYCLES,
    USUAL_POWER,
    advanced_inputs,
    lr_course,
    main_inputs,
    rates,
)
from .widgets import CATEGORY, lines, work_folder
from .workflow import workflow_header

MOST_PREVIEWS = 100
"""In one IMAGE: a preview of 512 px takes 3 MB of memory."""


class TrainSubject(io.ComfyNode):
    """The DreamBooth training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRATrain",
            display_name="Teach the Subject (train LoRA)",
            category=CATEGORY,
            description="Trains the LoRA. Cancel whenever you like: queue the same graph again and "
            "it goes on where it stopped. A training that is finished is not repeated; with "
            "lr_schedule constant, more steps are added to it.",
            is_output_node=True,
            inputs=[
                InitializationSocket.Input("start", tooltip="Model, subject and initialisation."),
                ClassImagesSocket.Input(
                    "class_images",
                    optional=True,
                    tooltip="Images of the class, so that the model does not forget it. Without "
                    "them training is faster and forgets more.",
                ),
                *main_inputs(),
                *advanced_inputs(),
            ],
            outputs=[
                LoRASocket.Output(display_name="lora", tooltip="The trained LoRA."),
                LossSocket.Output(display_name="loss", tooltip="The loss of each step."),
                io.String.Output(display_name="path", tooltip="Where the LoRA file is."),
                io.Image.Output(display_name="loss picture", tooltip="The course of the loss."),
                io.Image.Output(
                    display_name="previews",
                    tooltip="The previews of all steps, in their order; nothing goes on from here "
                    "where preview_every is 0.",
                ),
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
        lr_cycles: int = USUAL_CYCLES,
        lr_power: float = USUAL_POWER,
    ) -> io.NodeOutput:
        prompts = lines(fill_placeholders(validation_prompt, start.subject.prompts))
        training = TrainingSettings(
            steps=steps,
            **rates(optimizer, learning_rate, text_encoder_lr),
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            **lr_course(lr_schedule, lr_cycles, lr_power),
            lr_warmup=lr_warmup,
            text_encoder_steps=text_encoder_steps or None,
            caption_dropout=caption_dropout,
            optimizer=optimizer,
            min_snr_gamma=min_snr_gamma or None,
            precision=start.model.precision,
            gradient_checkpointing=gradient_checkpointing or spares_memory(),
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
        anew, header = trained_before == TRAIN_ANEW, workflow_header(cls.hidden)
        trained = train(job, start, class_images, anew, header)
        previews = trained.previews(training.sample_prompts)
        last = previews.get(len(trained.history), [])
        if last:
            leave_thumbnail(trained.lora, last[0])
        course = [picture for pictures in previews.values() for picture in pictures]
        loss_picture = trained.loss_picture()
        return io.NodeOutput(
            LoRAModel.read(trained.lora),
            {"loss": [record["loss"] for record in trained.history]},
            str(trained.lora),
            image_tensor([loss_picture]),
            _batch(course[-MOST_PREVIEWS:]),
            ui=shown([loss_picture, *last]),
        )


def _batch(pictures: list[Image.Image]) -> Any:
    """An IMAGE; where there is none, what keeps ComfyUI from running the nodes behind it."""
    from comfy_execution.graph_utils import (  # pyright: ignore[reportMissingImports]
        ExecutionBlocker,
    )

    return image_tensor(pictures) if pictures else ExecutionBlocker(None)


NODES = [TrainSubject]
