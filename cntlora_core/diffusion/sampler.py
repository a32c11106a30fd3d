"""Drawing pictures with a checkpoint and any number of LoRA files, through the stock pipeline."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import safe_open

from cntlora_core.data.captions import encode_prompts
from cntlora_core.diffusion.clip_skip import skip_last_layers
from cntlora_core.diffusion.pipeline import (
    StableDiffusionParts,
    load_stable_diffusion,
    model_family,
)
from cntlora_core.diffusion.settings import (
    PredictionType,
    SamplingSettings,
    TrainingPrecision,
    torch_dtype,
)
from cntlora_core.lora_file.families import SD15_FILES, SDXL_FILES, FileFamily
from cntlora_core.lora_file.find_lora import find_lora
from cntlora_core.lora_file.peft_config import DIFFUSERS_METADATA_KEY
from cntlora_core.lora_file.reading import (
    FOREIGN,
    check_usable,
    load_lora_tensors,
    load_tensors,
    read_lora_file,
    read_lora_tensors,
)
from cntlora_core.lora_file.writing import diffusers_tensors
from cntlora_core.runtime.precision import best_precision
from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.runtime.reading import reason, require_file, user_path
from cntlora_core.runtime.seeds import torch_seed
from cntlora_core.runtime.threads import threads, threads_for

if TYPE_CHECKING:
    from cntlora_core.diffusion.pipeline import Pipeline

MID = ".lora_mid."
LARGEST_STRENGTH = 1000.0


@dataclass(frozen=True)
class LoRAUse:
    """A LoRA file and how strongly it acts.

    Attributes:
        path: The file, in kohya or diffusers layout.
        strength: 1 as trained; less is weaker, 0 is off, negative is the opposite.
        tensors: The content of the file where it is in memory; the path then only names it.
    """

    path: Path
    strength: float = 1.0
    tensors: Mapping[str, torch.Tensor] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not abs(self.strength) <= LARGEST_STRENGTH:
            raise ValueError(
                f"the strength of {self.path} must be a number between -{LARGEST_STRENGTH:g} and "
                f"{LARGEST_STRENGTH:g}, got {self.strength}"
            )

    def check(self, family: FileFamily = SD15_FILES) -> tuple[str, ...]:
        """Reads the file, and refuses what is no LoRA to sample with, before a model is loaded.

        Args:
            family: Of the model.

        Returns:
            What will be left out of it, in words.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: it is damaged, something else, or holds values that are not finite.
        """
        tensors = self.tensors
        if tensors is None:
            require_file(self.path, "a LoRA's .safetensors file")
            tensors, _ = load_tensors(self.path)
        return check_usable(self.path, tensors, family)

    @classmethod
    def parse(cls, text: str) -> LoRAUse:
        """``file.safetensors`` or ``file.safetensors:0.8``, or a folder in the file's place.

        A folder is that of a run, whose LoRA is meant, or one in peft's layout.

        Raises:
            ValueError: if what follows the colon is no number, or no strength to sample with; if a
                folder holds no LoRA.
        """
        if not text.strip():
            raise ValueError("the name of a LoRA is empty: give a .safetensors file after --lora")
        head, colon, tail = text.rpartition(":")
        if not (colon and (head.endswith(".safetensors") or os.path.isdir(user_path(head)))):
            return cls.read(user_path(text))
        try:
            strength = float(tail)
        except ValueError:
            raise ValueError(
                f"{text!r}: the strength after the colon must be a number, got {tail!r}"
            ) from None
        return cls.read(user_path(head), strength)

    @classmethod
    def read(cls, path: Path, strength: float = 1.0) -> LoRAUse:
        """A file, the LoRA of a run's folder, or the content of a folder in peft's layout.

        Raises:
            ValueError: if a folder holds no LoRA.
        """
        if not os.path.isdir(path):
            return cls(path, strength)
        path = find_lora(path)[0]
        if not path.is_dir():
            return cls(path, strength)
        file = read_lora_file(path)
        return cls(path, strength, diffusers_tensors(file.layers, family=file.family))


def default_device() -> torch.device:
    """CUDA, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def checked_device(name: str | torch.device | None) -> torch.device:
    """A device that works here; the default one for None.

    Raises:
        ValueError: for one that does not, or computes nothing (meta), with those that do.
    """
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()  # meta has no values to give
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(
            f"device {str(name)!r} cannot be used here; cpu and {default_device()} can"
        ) from error
    return device


def load_for_sampling(
    model: str | Path,
    loras: Sequence[LoRAUse] = (),
    *,
    precision: TrainingPrecision = "float32",
    device: str | torch.device | None = None,
    scheduler: str | None = None,
    clip_skip: int = 1,
    prediction_type: PredictionType | None = None,
    reporter: Reporter = silent,
) -> Pipeline:
    """A stock diffusers pipeline with LoRA files loaded and weighted.

    The precision ``auto`` is bfloat16 or float16 on CUDA and float32 elsewhere, as in training.
    Notes to ``reporter`` say what of a LoRA is left out.

    Raises:
        FileNotFoundError: for a LoRA file that is not there.
        ValueError: for one that does not fit the model, with the keys that did not.
    """
    place = checked_device(device)
    files = model_family(model).files if loras else SD15_FILES
    for lora in loras:
        for note in lora.check(files):
            reporter("loading the model", 0, 0, {"note": note})
    dtype = torch_dtype(best_precision(place) if precision == "auto" else precision)
    parts = load_stable_diffusion(model, dtype=dtype, device=place, prediction_type=prediction_type)
    pipeline = parts.pipeline(scheduler)  # pyright: ignore[reportArgumentType]
    _load_lora_files(pipeline, loras)
    skip_last_layers(parts.networks, clip_skip)
    return pipeline


def apply_lora_files(pipeline: Pipeline, loras: Sequence[LoRAUse]) -> None:
    """Load LoRA files into a pipeline side by side, each with its strength.

    Raises:
        ValueError: one does not fit the model, or holds values that are not finite.
    """
    second = getattr(pipeline, "text_encoder_2", None) is not None
    for lora in loras:
        lora.check(SDXL_FILES if second else SD15_FILES)
    _load_lora_files(pipeline, loras)


def _load_lora_files(pipeline: Pipeline, loras: Sequence[LoRAUse]) -> None:
    """As :func:`apply_lora_files`, of files that were checked already."""
    names = [f"lora_{i}" for i in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        try:
            tensors = _respelled(lora)
            if tensors is None:
                pipeline.load_lora_weights(
                    str(lora.path.parent), weight_name=lora.path.name, adapter_name=name
                )
            else:
                # Copies, since those of inference mode could not become parameters outside of it.
                copies = {key: tensor.clone() for key, tensor in tensors.items()}
                pipeline.load_lora_weights(copies, adapter_name=name)
        except (RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
            if str(lora.path) in str(error):
                raise
            raise ValueError(
                f"{lora.path} does not fit this model: a LoRA of just such a model (SD1.5, SDXL "
                f"or the small one) is needed. {reason(error)}"
            ) from error
    if loras:
        pipeline.set_adapters(names, [lora.strength for lora in loras])


def _respelled(lora: LoRAUse) -> Mapping[str, torch.Tensor] | None:
    """The tensors to load, None for the file as it is: diffusers knows no ``lora_mid``.

    Before 0.40 it also scales layers of differing ranks by that of the first, where neither
    alphas nor its own header say what they are.
    """
    scaled = False
    if lora.tensors is None:
        with safe_open(lora.path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            scaled = DIFFUSERS_METADATA_KEY in (file.metadata() or {})
    else:
        shapes = {key: tensor.shape for key, tensor in lora.tensors.items()}
    if not any(MID in key for key in shapes) and (scaled or not _ranks_without_alphas(shapes)):
        return lora.tensors
    tensors, header = lora.tensors, None
    if tensors is None:
        tensors, header = load_lora_tensors(lora.path)
    file = read_lora_tensors(tensors, header, str(lora.path))
    return diffusers_tensors(file.layers, family=file.family)


def _ranks_without_alphas(shapes: Mapping[str, Sequence[int]]) -> bool:
    if any(key.endswith((".alpha", *FOREIGN["DoRA"])) for key in shapes):
        return False
    ranks = {shape[0] for key, shape in shapes.items() if ".lora_A." in key or ".down." in key}
    return len(ranks) > 1


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    settings: SamplingSettings | None = None,
    *,
    seeds: Sequence[int] | None = None,
    reporter: Reporter = silent,
    stage: str = "generating",
) -> list[Image.Image]:
    """Generate one image for each prompt.

    Each picture has a seed of its own, so that it does not depend on the others of its batch.

    Args:
        pipeline: From :func:`load_for_sampling`, or any Stable Diffusion pipeline.
        prompts: One for each picture.
        settings: How to sample.
        seeds: One for each picture; default: counting up from the settings' seed.
        reporter: Told the number of pictures done; notes say what was cut off a long prompt.
    """
    settings = settings or SamplingSettings()
    if settings.steps > (most := len(pipeline.scheduler.alphas_cumprod)):
        raise ValueError(
            f"steps={settings.steps} are more than the {most} timesteps of the model: lower steps"
        )
    seeds = list(range(settings.seed, settings.seed + len(prompts))) if seeds is None else seeds
    for message in encode_prompts(prompts, pipeline.tokenizer).messages:
        reporter(stage, 0, len(prompts), {"note": message})
    pictures: list[Image.Image] = []
    total, negative = len(prompts), settings.negative_prompt or None  # None: as the model wants it
    for start in range(0, total, settings.batch_size):
        chosen = slice(start, start + settings.batch_size)
        fraction_before = len(pictures)

        def on_step(
            _pipe: object,
            step: int,
            _timestep: Any,
            values: dict[str, Any],
            done: int = fraction_before,
            pending: int = len(prompts[chosen]),
        ) -> dict[str, Any]:
            # How many more pictures the steps so far amount to: a bar need not stand still.
            within = pending * min(1.0, (step + 1) / settings.steps)
            reporter(stage, done, total, {"sampling_step": step + 1, "within": within})
            return values

        generators = [torch.Generator().manual_seed(torch_seed(seed)) for seed in seeds[chosen]]
        rows = len(prompts[chosen]) * (2 if settings.guidance > 1 else 1)
        with threads(threads_for(pipeline.unet, rows)):
            pictures += pipeline(
                prompt=list(prompts[chosen]),
                negative_prompt=negative and [negative] * len(prompts[chosen]),
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                height=settings.height or settings.resolution,
                width=settings.width or settings.resolution,
                generator=generators,
                callback_on_step_end=on_step,  # pyright: ignore[reportArgumentType]
            ).images  # pyright: ignore[reportAttributeAccessIssue]
        reporter(stage, len(pictures), total, {"image": pictures[-1]})
    return pictures


def sample(
    model: str | Path | StableDiffusionParts,
    prompts: Sequence[str],
    loras: Sequence[LoRAUse | str | Path] = (),
    settings: SamplingSettings | None = None,
    **loading: Any,
) -> list[Image.Image]:
    """Load, apply LoRA files and generate, in one call; see :func:`load_for_sampling` and
    :func:`generate`."""
    settings = settings or SamplingSettings()
    uses = [use if isinstance(use, LoRAUse) else LoRAUse.parse(str(use)) for use in loras]
    if not isinstance(model, StableDiffusionParts):
        pipeline = load_for_sampling(
            model,
            uses,
            scheduler=settings.scheduler,
            clip_skip=settings.clip_skip,
            prediction_type=settings.prediction_type,
            **loading,
        )
        return generate(pipeline, prompts, settings)
    pipeline = model.pipeline(settings.scheduler)  # pyright: ignore[reportArgumentType]
    try:
        apply_lora_files(pipeline, uses)
        return generate(pipeline, prompts, settings)
    finally:
        pipeline.unload_lora_weights()  # the parts are the caller's, without adapters
