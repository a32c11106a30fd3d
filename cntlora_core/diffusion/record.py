"""What a run says of itself: in the LoRA file's metadata and in the record beside it."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cntlora_core import __version__
from cntlora_core.data.captions import SubjectPrompts
from cntlora_core.data.photos import PhotoSet
from cntlora_core.diffusion.family import FAMILIES
from cntlora_core.diffusion.pipeline import StableDiffusionParts
from cntlora_core.diffusion.settings import JobSettings
from cntlora_core.diffusion.snapshots import Snapshot, records_of
from cntlora_core.diffusion.trainer import SubjectTrainer
from cntlora_core.lora_file.writing import modelspec_metadata

if TYPE_CHECKING:
    from cntlora_core.diffusion.export import ExportReport


@dataclass(frozen=True)
class JobResult:
    """What a run left behind.

    Attributes:
        lora: The LoRA file (a folder in peft's layout).
        folder: The folder with everything.
        export: What the file holds.
        initialization: Report of the initialisation; None for a plain one.
        history: One record per step.
        seconds: Time spent by stage.
        notes: What a person should know: skipped files, cut prompts and the like.
        snapshots: The LoRAs that were kept on the way, by step.
    """

    lora: Path
    folder: Path
    export: ExportReport
    initialization: dict[str, Any] | None
    history: list[dict[str, float]]
    seconds: dict[str, float]
    notes: tuple[str, ...]
    snapshots: tuple[Snapshot, ...] = ()


@dataclass(frozen=True)
class ModelFacts:
    """What is noted of the model: where it came from, its fingerprint, its resolution in pixels,
    what it predicts (epsilon, v_prediction), and its family.
    """

    source: str
    fingerprint: str
    resolution: int
    prediction_type: str
    family: str

    @classmethod
    def of(cls, parts: StableDiffusionParts) -> ModelFacts:
        predicts = parts.noise_scheduler.config["prediction_type"]
        return cls(
            parts.source,
            parts.fingerprint,
            parts.default_resolution,
            predicts,
            parts.family.name,
        )


def file_metadata(
    title: str,
    settings: JobSettings,
    prompts: SubjectPrompts,
    photos: PhotoSet,
    model: ModelFacts,
    trainer: SubjectTrainer,
) -> dict[str, str]:
    """What the LoRA file says of itself: modelspec and ss_* keys, and our settings."""
    training = settings.training
    classes = trainer.data.class_images
    adapts_text = settings.adapter.train_text_encoder
    return modelspec_metadata(
        title=title,
        resolution=settings.subject.resolution or model.resolution,
        method=settings.adapter.method,
        settings=_shareable(settings),
        training={
            "learning_rate": training.learning_rate,
            "unet_lr": training.learning_rate,
            "text_encoder_lr": training.text_learning_rate if adapts_text else 0.0,
            "clip_skip": settings.clip_skip,
            "caption_dropout_rate": training.caption_dropout,
            "noise_offset": training.noise_offset,
            "num_train_images": len(photos.photos),
            "num_reg_images": 0 if classes is None else len(classes.digests),
            "max_train_steps": training.steps,
            "steps": trainer.step,
            "seed": training.seed,
            "output_name": title,
            "sd_model_name": Path(model.source).name,
            "prior_loss_weight": settings.prior.prior_weight,
            "min_snr_gamma": training.min_snr_gamma,
            "optimizer": f"{type(trainer.optimizer).__module__}.{type(trainer.optimizer).__name__}",
            "lr_scheduler": training.lr_schedule,
            "gradient_accumulation_steps": training.gradient_accumulation,
            "gradient_checkpointing": training.gradient_checkpointing,
        },
        trigger_phrase=prompts.token or prompts.instance_prompt,
        prediction_type=model.prediction_type,
        family=FAMILIES[model.family].files,
    )


def _shareable(settings: JobSettings) -> dict[str, Any]:
    """The settings without the folders of whoever trained: files travel."""
    values = settings.to_dict()
    values["model"] = Path(settings.model).name
    values["subject"].pop("images")
    values["subject"].pop("held_out")
    values["output"].pop("output")
    if settings.adapter.from_lora is not None:
        values["adapter"]["from_lora"] = Path(settings.adapter.from_lora).name
    values["prior"].pop("cache")
    if settings.prior.class_images is not None:
        values["prior"]["class_images"] = Path(settings.prior.class_images).name
    values["training"].pop("device")
    return values


def run_record(
    result: JobResult,
    settings: JobSettings,
    prompts: SubjectPrompts,
    model: ModelFacts,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """The record of a run: every setting, version, seed and timing, as JSON values."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")
    return {
        "settings": settings.to_dict(),
        "prompts": dataclasses.asdict(prompts),
        "model": dataclasses.asdict(model),
        "identity": identity,
        "seconds": result.seconds,
        "initialization": result.initialization,
        "export": {
            "file": result.lora.name,
            "step": len(result.history),
            "ranks": result.export.ranks,
            "trained_ranks": result.export.trained_ranks,
            "relative_error": result.export.relative_error,
            "truncation_error": result.export.truncation_error,
        },
        "snapshots": records_of(result.folder),
        "notes": list(result.notes),
        "versions": {
            "python": platform.python_version(),
            "cntlora": __version__,
            **{package: version(package) for package in packages},
        },
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "history": result.history,
    }
