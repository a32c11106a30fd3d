"""Every setting of a personalisation run, once: flags and widgets are made from these classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cntlora_core.config import CNTLoRAConfig
from cntlora_core.diffusion.adapter_settings import (
    AdapterKind as AdapterKind,
)
from cntlora_core.diffusion.adapter_settings import (
    AdapterSettings as AdapterSettings,
)
from cntlora_core.diffusion.adapter_settings import (
    Method as Method,
)
from cntlora_core.diffusion.validation import (
    build_settings,
    require_at_least,
    require_between,
    require_choice,
    require_defaults,
    require_finite,
    require_json,
    require_schedule_shape,
    require_side,
    require_step_rules,
    require_unicode,
    store_as_text,
)

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16", "float16"]
TrainingPrecision = Literal["auto", "float32", "bfloat16", "float16"]
Layout = Literal["kohya", "diffusers", "peft"]
SchedulerName = Literal[
    "pndm", "ddim", "ddpm", "dpm++", "dpm++_karras", "euler", "euler_a", "heun", "unipc"
]
Schedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
]
TrackerName = Literal["tensorboard", "wandb"]
OptimizerName = Literal["adamw", "adamw_8bit", "prodigy"]
PredictionType = Literal["epsilon", "v_prediction"]


MOST_SAMPLING_STEPS = 1000
"""Timesteps of Stable Diffusion 1.5's noise schedule."""
LEAST_PRODIGY = 0.1
"""Prodigy multiplies its own estimate by the learning rate: with much less it never leaves that
estimate's first value, 1e-6."""


def torch_dtype(precision: str) -> torch.dtype:
    """The torch data type of a precision's name; torch is not imported before it is asked for."""
    import torch

    return getattr(torch, precision)


@dataclass(frozen=True)
class SubjectSettings:
    """What is taught.

    Attributes:
        images: Folder of 1 or more photos of the subject, ideally 4 to 6; empty where they are
            handed over in memory.
        token: The rare word that will stand for the subject.
        class_name: The class of the subject, such as "dog"; with the token it makes the prompts
            "a photo of sks dog" and "a photo of a dog".
        instance_prompt: A whole prompt in place of token and class name.
        class_prompt: The prompt of the class images, with instance_prompt.
        resolution: Side of the square training images in pixels; default: the model's own. A photo
            of another shape is resized to about the same area.
        flip: Also train on mirrored photos.
        held_out: Folder of further photos of the subject, which are not trained on: the loss on
            them, under their captions, tells learning from learning by heart.
        crop: Crop photos to the square in their middle, in place of keeping their shape.
        unmasked_weight: What the loss outside a photo's mask (dog1.mask.png, or its transparency)
            weighs, from 0 to 1; 1 leaves masks out of account.
    """

    images: str
    token: str | None = None
    class_name: str | None = None
    instance_prompt: str | None = None
    class_prompt: str | None = None
    resolution: int | None = None
    flip: bool = False
    held_out: str | None = None
    crop: bool = False
    unmasked_weight: float = 0.1

    def __post_init__(self) -> None:
        store_as_text(self, "images", "held_out")
        require_side("resolution", self.resolution)
        require_between("unmasked_weight", self.unmasked_weight, 0, 1)
        for name in ("token", "class_name", "instance_prompt", "class_prompt"):
            require_unicode(name, getattr(self, name))


@dataclass(frozen=True)
class PriorSettings:
    """Class images: what the model already knew and should keep (prior preservation).

    Attributes:
        class_images: Folder of images of the class; default: generated, cached and reused.
        num_class_images: How many are generated where no folder is given.
        prior_weight: Weight of the class images' loss; 0 trains without them.
        class_steps: Sampling steps of a generated class image.
        class_guidance: Classifier-free guidance scale of a generated class image.
        class_seed: Seed of the generated class images; runs that differ in their own seed share
            them.
        cache: Folder for generated class images and encoded photos; default: the user's cache.
    """

    class_images: str | None = None
    num_class_images: int = 100
    prior_weight: float = 0.1
    class_steps: int = 30
    class_guidance: float = 7.5
    class_seed: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        store_as_text(self, "class_images", "cache")
        if self.cache is not None and not self.cache.strip():
            raise ValueError("cache is empty: give a folder, or leave it out")
        require_between("num_class_images", self.num_class_images, 1, 100_000)
        require_between("class_steps", self.class_steps, 1, MOST_SAMPLING_STEPS)
        require_finite("prior_weight", self.prior_weight, 0)
        require_finite("class_guidance", self.class_guidance, 0)
        if self.class_images is not None:
            generated = ("num_class_images", "class_steps", "class_guidance", "class_seed")
            require_defaults(self, generated, "on the class images of a folder (class_images)")


@dataclass(frozen=True)
class TrainingSettings:
    """The training loop.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Peak learning rate; with prodigy a factor of its own estimate, usually 1 and
            at least 0.1.
        text_encoder_lr: Peak learning rate of the text encoder; default: half of learning_rate, and
            with prodigy the same.
        text_encoder_steps: After how many steps the text encoder stops learning; default: never.
        optimizer: adamw, adamw_8bit (needs bitsandbytes) or prodigy (needs prodigyopt).
        batch_size: Photos per step; as many class images go with them.
        gradient_accumulation: Batches whose gradients are averaged in one step.
        weight_decay: Decoupled weight decay, towards the adapter's initialisation.
        max_grad_norm: Gradients are clipped to this norm; 0 leaves them.
        lr_schedule: Course of the learning rate.
        lr_warmup: Steps of linear warm-up.
        lr_cycles: Cycles of cosine_with_restarts, which needs more than 1; 3 is usual.
        lr_power: Power of polynomial, which needs another than 1; 2 is usual.
        lr_step_rules: Factors of piecewise_constant with the steps they end at, the last without:
            "1:100,0.1".
        caption_dropout: Share of the photos that are read without their prompt.
        min_snr_gamma: Min-SNR loss weighting (5 is usual); default: off.
        precision: Data type of the frozen base; adapters stay float32. auto is bfloat16 on CUDA,
            float16 on cards without it, and float32 elsewhere.
        gradient_checkpointing: Less memory for a slower step; switched on where memory runs out.
        device: Where to train; default: CUDA, then MPS, then the CPU.
        seed: Seed of everything random in a run.
        save_every: Steps between states from which an interrupted run can go on.
        sample_prompts: Prompts of images generated while training; {token} and {class} are filled
            in.
        sample_every: Steps between those samples; 0 generates them at the end only.
        sample_steps: Sampling steps of such a sample.
        held_out_every: Steps between measurements of the loss on held-out photos.
        log_with: Trackers that are told of every step: tensorboard, wandb.
        noise_offset: Size of a random constant for each channel that is added to the noise; 0.05 to
            0.1 help a model to darker and brighter images.
        dynamics_every: Record gradient norms and updates of every step in dynamics.jsonl, and what
            the adapted layers read each time so many steps are done; 0 records nothing.
    """

    steps: int = 150
    learning_rate: float = 1e-3
    batch_size: int = 1
    gradient_accumulation: int = 1
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    lr_schedule: Schedule = "cosine"
    lr_warmup: int = 0
    min_snr_gamma: float | None = None
    precision: TrainingPrecision = "auto"
    gradient_checkpointing: bool = False
    device: str | None = None
    seed: int = 0
    save_every: int = 50
    sample_prompts: tuple[str, ...] = ()
    sample_every: int = 0
    sample_steps: int = 30
    held_out_every: int = 50
    log_with: tuple[TrackerName, ...] = ()
    text_encoder_lr: float | None = None
    text_encoder_steps: int | None = None
    optimizer: OptimizerName = "adamw"
    lr_cycles: int = 1
    lr_power: float = 1.0
    lr_step_rules: str = ""
    caption_dropout: float = 0.0
    dynamics_every: int = 0
    noise_offset: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "gradient_accumulation",
            "save_every",
            "held_out_every",
        ):
            require_between(name, getattr(self, name), 1, 10**9)
        require_between("sample_steps", self.sample_steps, 1, MOST_SAMPLING_STEPS)
        require_unicode("sample_prompts", *self.sample_prompts)
        if not all(prompt.strip() for prompt in self.sample_prompts):
            raise ValueError("sample_prompts has an empty prompt: write it out or leave it away")
        for name in ("lr_warmup", "sample_every", "dynamics_every"):
            require_at_least(name, getattr(self, name), 0)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "noise_offset"):
            require_finite(name, getattr(self, name), 0)
        require_choice("lr_schedule", self.lr_schedule, Schedule)
        for name in self.log_with:
            require_choice("log_with", name, TrackerName)
        require_choice("optimizer", self.optimizer, OptimizerName)
        require_between("lr_cycles", self.lr_cycles, 1, 10_000)
        require_finite("lr_power", self.lr_power, 0)
        require_schedule_shape(self.lr_schedule, self.lr_cycles, self.lr_power)
        require_step_rules(self.lr_schedule == "piecewise_constant", self.lr_step_rules)
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(
                f"caption_dropout must be at least 0 and less than 1, got {self.caption_dropout}"
            )
        if self.text_encoder_steps is not None:
            require_between("text_encoder_steps", self.text_encoder_steps, 1, 10**9)
        if self.text_encoder_lr is not None:
            require_finite("text_encoder_lr", self.text_encoder_lr, 0)
            if self.optimizer == "prodigy" and self.text_encoder_lr != self.learning_rate:
                raise ValueError(
                    "prodigy has one learning rate for all it trains: leave text_encoder_lr out"
                )
        if self.optimizer == "prodigy" and self.learning_rate < LEAST_PRODIGY:
            raise ValueError(
                f"learning_rate={self.learning_rate:g} holds prodigy at the first value of its own "
                "estimate, and nothing is learnt: use learning_rate=1"
            )
        require_choice("precision", self.precision, TrainingPrecision)
        if self.min_snr_gamma is not None:
            require_finite("min_snr_gamma", self.min_snr_gamma, 0)
            if self.min_snr_gamma == 0:
                raise ValueError("min_snr_gamma=0 makes every loss 0: leave it out, or try 5")
        if self.lr_warmup and self.lr_schedule in ("constant", "piecewise_constant"):
            raise ValueError(
                f"lr_warmup={self.lr_warmup} has no effect with lr_schedule={self.lr_schedule!r}: "
                "use lr_schedule='constant_with_warmup'"
            )
        if self.sample_every and not self.sample_prompts:
            raise ValueError(
                f"sample_every={self.sample_every} needs sample_prompts: give at least one prompt"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen base, once ``precision`` is no longer ``auto``."""
        return torch_dtype(self.precision)

    @property
    def text_learning_rate(self) -> float:
        if self.text_encoder_lr is not None:
            return self.text_encoder_lr
        return self.learning_rate if self.optimizer == "prodigy" else self.learning_rate / 2


@dataclass(frozen=True)
class SamplingSettings:
    """How images are generated.

    Attributes:
        steps: Sampling steps.
        guidance: Classifier-free guidance scale.
        negative_prompt: What the pictures should not show.
        resolution: Side in pixels; default: the model's own.
        scheduler: The sampler; default: the model's own.
        seed: Seed of the first picture (for evaluate: of each prompt's first); the next has
            the next seed.
        batch_size: Images generated at once.
        clip_skip: Which layer of the text encoder is read; as in training.
        width: Of images that are not square, in pixels; default: resolution.
        height: Of images that are not square, in pixels; default: resolution.
        prediction_type: What the model predicts; as in training.
    """

    steps: int = 30
    guidance: float = 7.5
    negative_prompt: str = ""
    resolution: int | None = None
    scheduler: SchedulerName | None = None
    seed: int = 0
    batch_size: int = 4
    clip_skip: int = 1
    width: int | None = None
    height: int | None = None
    prediction_type: PredictionType | None = None

    def __post_init__(self) -> None:
        require_between("clip_skip", self.clip_skip, 1, 100)
        require_between("steps", self.steps, 1, MOST_SAMPLING_STEPS)
        require_between("batch_size", self.batch_size, 1, 10_000)
        require_finite("guidance", self.guidance, 0)
        for name in ("resolution", "width", "height"):
            require_side(name, getattr(self, name))
        require_unicode("negative_prompt", self.negative_prompt)
        if self.scheduler is not None:
            require_choice("scheduler", self.scheduler, SchedulerName)
        if self.prediction_type is not None:
            require_choice("prediction_type", self.prediction_type, PredictionType)


@dataclass(frozen=True)
class OutputSettings:
    """What is left behind.

    Attributes:
        output: Folder for the LoRA file, plots and the record of the run.
        name: File name of the LoRA, without ending; default: made from token and class.
        layout: Key layout of the file: kohya (ComfyUI, WebUIs), diffusers or peft.
        file_precision: Data type of the tensors in the file.
        compress: Truncate the file to the trained rank where this loses at most 1 % of what was
            learnt. Where the base weight was rewritten an exact file has twice that rank.
        keep_state: Keep the training state of a finished run, so that it can be exported again or,
            at a constant learning rate, go on to more steps; its size is 4 times that of the
            adapter in float32.
        save_lora_every: Steps between LoRA files that are kept on the way, in the folder snapshots
            of the output; 0 keeps none. `cntlora compare` and `cntlora pick` choose among them.
    """

    output: str
    name: str | None = None
    layout: Layout = "kohya"
    file_precision: Precision = "float16"
    compress: bool = True
    keep_state: bool = True
    save_lora_every: int = 0

    def __post_init__(self) -> None:
        store_as_text(self, "output")
        if not self.output.strip():
            raise ValueError("output is empty: give the folder to write to")
        require_unicode("name", self.name)
        if self.name is not None and not self.name.strip():
            raise ValueError("name is empty: give a file name without ending, or leave it out")
        require_at_least("save_lora_every", self.save_lora_every, 0)
        require_choice("layout", self.layout, Layout)
        require_choice("file_precision", self.file_precision, Precision)


@dataclass(frozen=True)
class JobSettings:
    """A whole run: a model, a subject, and how to teach it.

    Rank, steps, learning rate and schedule are by default those of the small model's comparison
    (docs/experiments/convergence.md); the paper's are in :mod:`.presets`.

    Attributes:
        model: Stable Diffusion 1.5 or XL as one .safetensors file, a diffusers folder or a hub id.
        clip_skip: Which layer of the text encoder is read: 1 is the one that the model was trained
            with, the last of Stable Diffusion 1.5 and the last but one of XL; 2 is the layer before
            it, as models of drawings often want. Generate with the same.
        prediction_type: What the model predicts, where it says nothing or something wrong; default:
            what a folder's scheduler or the marks of a single file say, else epsilon.
    """

    model: str
    subject: SubjectSettings
    output: OutputSettings
    prior: PriorSettings = field(default_factory=PriorSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    clip_skip: int = 1
    prediction_type: PredictionType | None = None

    def __post_init__(self) -> None:
        store_as_text(self, "model")
        require_between("clip_skip", self.clip_skip, 1, 100)
        if self.prediction_type is not None:
            require_choice("prediction_type", self.prediction_type, PredictionType)
        if not self.adapter.train_text_encoder:
            names = ("text_encoder_lr", "text_encoder_steps")
            require_defaults(self.training, names, "without train_text_encoder")
        require_json(self.to_dict())  # a run is recorded as JSON: refuse now what has no such form

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> JobSettings:
        """Inverse of :meth:`to_dict`; unknown keys are refused.

        Raises:
            ValueError: for an unknown or missing key, or a value that makes no sense.
        """
        return build_settings(cls, values, _NESTED)


_NESTED: dict[str, type] = {
    "subject": SubjectSettings,
    "output": OutputSettings,
    "prior": PriorSettings,
    "adapter": AdapterSettings,
    "training": TrainingSettings,
    "cntlora": CNTLoRAConfig,
}
