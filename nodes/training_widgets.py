"""The widgets of *Teach the Subject*."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]

from cntlora_core.diffusion.settings import (
    LEAST_PRODIGY,
    OptimizerName,
    OutputSettings,
    PriorSettings,
    Schedule,
    TrainingSettings,
)

from .widgets import ADVANCED, LARGEST_SEED, default_of

USE_IT, TRAIN_ANEW = "use what is there", "train anew"
USUAL_CYCLES, USUAL_POWER = 3, 2.0


def rates(optimizer: OptimizerName, learning_rate: float, text_encoder_lr: float) -> dict[str, Any]:
    """Settings of the learning rates from what the widgets hold, where 0 is none of its own.

    Prodigy has one for all, and a learning rate that is usual for others would hold it still.
    """
    if optimizer == "prodigy":
        return {"learning_rate": learning_rate if learning_rate >= LEAST_PRODIGY else 1.0}
    return {"learning_rate": learning_rate, "text_encoder_lr": text_encoder_lr or None}


def lr_course(lr_schedule: Schedule, lr_cycles: int, lr_power: float) -> dict[str, Any]:
    """Settings of the schedule from what the widgets hold; those of another one do not count."""
    shape = {
        "cosine_with_restarts": {"lr_cycles": lr_cycles},
        "polynomial": {"lr_power": lr_power},
    }
    return {"lr_schedule": lr_schedule, **shape.get(lr_schedule, {})}


def main_inputs() -> list[io.Input]:
    """Those that always show."""
    return [
        io.Int.Input(
            "steps",
            default=default_of(TrainingSettings, "steps"),
            min=1,
            max=1_000_000,
            tooltip="Training steps, for 4 to 6 photos. With lr_schedule (advanced) constant, "
            "more than were trained before are added to those. The paper has 1000, constant, at "
            "rank 128 and learning_rate 0.0001.",
        ),
        io.Float.Input(
            "learning_rate",
            default=default_of(TrainingSettings, "learning_rate"),
            min=0.0,
            max=1.0,
            step=1e-6,
            round=1e-9,
            tooltip="How large the steps are: 0.001 is for 150 steps at rank 16. Lower it if "
            "images look burnt, raise it if the subject does not come through.",
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
            default=50,
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


def advanced_inputs() -> list[io.Input]:
    """Those of *Show Advanced*."""
    # New ones at the end: ComfyUI keeps the values of a saved workflow by place.
    return [
        io.Combo.Input(
            "trained_before",
            options=[USE_IT, TRAIN_ANEW],
            default=USE_IT,
            extra_dict=ADVANCED,
            tooltip="If just this training was done before, or begun: use it and go on with it, or "
            "throw it away. Another name, compress or gradient_checkpointing make no other "
            "training, nor do more steps with lr_schedule constant.",
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
            tooltip="Much less memory for slower steps. It is switched on by itself where memory "
            "runs out, and with ComfyUI's --lowvram.",
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
            "prodigy finds its learning rate for all: learning_rate then multiplies it, where it "
            "is 0.1 or more, and text_encoder_lr does not count.",
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
        io.Int.Input(
            "lr_cycles",
            default=USUAL_CYCLES,
            min=2,
            max=10_000,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Only for cosine_with_restarts: how often the learning rate falls to 0.",
        ),
        io.Float.Input(
            "lr_power",
            default=USUAL_POWER,
            min=0.0,
            max=100.0,
            step=0.1,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Only for polynomial: more lowers the learning rate sooner; 1 would be linear.",
        ),
    ]
