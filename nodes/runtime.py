"""Work within ComfyUI: its memory, its progress bar and its cancel button, and autograd allowed."""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from PIL import Image

from cntlora_core.diffusion.settings import Precision
from cntlora_core.figures.sheets import loss_thumbnail
from cntlora_core.runtime.memory import give_back_freed_memory
from cntlora_core.runtime.precision import best_precision
from cntlora_core.runtime.reading import lacks_memory

from .host import ProgressBar, model_management

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_TEXTS = 0.5
SECONDS_BETWEEN_PICTURES = 3.0
LARGEST_PREVIEW = 768
ROOM_FOR_TRAINING = 14 * 10**9
"""Bytes that a training of Stable Diffusion 1.5 takes at 768 px in float32."""
MEMORY_ADVICE = (
    "there is not enough memory: lower the resolution, the batch size or the rank, or choose the "
    "precision bfloat16"
)


class HostReporter:
    """Shows the core's reports on the node that is running; raises when the user cancels.

    Args:
        steps: Of the training that will be reported, for the axis of the loss picture.
    """

    def __init__(self, steps: int = 0) -> None:
        self.notes: list[str] = []
        self._bar = ProgressBar(1)
        self._steps = steps
        self._losses: list[float] = []
        self._sample: Image.Image | None = None
        self._started: dict[str, tuple[float, int]] = {}
        self._last_text = self._last_picture = -SECONDS_BETWEEN_PICTURES

    def __call__(self, stage: str, done: int, total: int, values: dict[str, Any]) -> None:
        model_management.throw_exception_if_processing_interrupted()
        if "note" in values:
            self.notes.append(values["note"])
        if total <= 0:
            return
        if "loss" in values:
            self._losses.append(float(values["loss"]))
        self._say(stage, done, total, values)
        self._bar.update_absolute(done + values.get("within", 0.0), total, self._preview(values))

    def _say(self, stage: str, done: int, total: int, values: dict[str, Any]) -> None:
        now = time.monotonic()
        if stage not in self._started:
            logger.info("CNTLoRA: %s", stage)
        started, before = self._started.setdefault(stage, (now, done))
        if now - self._last_text < SECONDS_BETWEEN_TEXTS and done < total:
            return
        self._last_text = now
        text = f"{stage}: {done} of {total}"
        if "loss" in values:
            recent = self._losses[-50:]
            text += f", loss {sum(recent) / len(recent):.4f}"
        if done > before and done < total:
            text += f", {_duration((now - started) / (done - before) * (total - done))} left"
        tell(text)

    def _preview(self, values: dict[str, Any]) -> tuple[str, Image.Image, int] | None:
        """The newest picture; in training the course of the loss, with the newest sample."""
        fresh = values.get("image")
        if fresh is not None:
            self._sample = fresh
        now = time.monotonic()
        if fresh is None and (
            "loss" not in values or now - self._last_picture < SECONDS_BETWEEN_PICTURES
        ):
            return None
        self._last_picture = now
        picture = self._sample
        if self._losses:
            picture = loss_thumbnail(self._losses, max(self._steps, len(self._losses)))
            if self._sample is not None:
                picture = _beside(picture, self._sample)
        return None if picture is None else ("JPEG", picture, LARGEST_PREVIEW)


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    right = right.convert("RGB").resize((left.height, left.height))
    both = Image.new("RGB", (left.width + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def tell(text: str) -> None:
    """Show a text on the node that is running, where ComfyUI can do that."""
    try:
        from comfy_execution.utils import (  # pyright: ignore[reportMissingImports]
            get_executing_context,
        )
        from server import PromptServer  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    context, server = get_executing_context(), PromptServer.instance
    if context is not None and server is not None:
        server.send_progress_text(text, context.node_id)


def device_name() -> str:
    """The device that ComfyUI works on, as torch names it."""
    return str(model_management.get_torch_device())


def device_precision() -> Precision:
    """The number format of frozen weights on ComfyUI's device.

    On CUDA it is asked for: it knows cards whose float16 is of no use, and ``--force-fp32``.
    """
    device = model_management.get_torch_device()
    if device.type != "cuda":
        return best_precision(device)
    if model_management.should_use_bf16(device):
        return "bfloat16"
    return "float16" if model_management.should_use_fp16(device) else "float32"


def spares_memory() -> bool:
    """Whether ComfyUI was told to, with ``--lowvram`` or ``--novram``."""
    return model_management.vram_state.name in ("LOW_VRAM", "NO_VRAM")


def _make_room() -> None:
    """Unload ComfyUI's models; with ``--highvram`` no more of them than the work needs."""
    if model_management.vram_state.name == "HIGH_VRAM":
        device = model_management.get_torch_device()
        model_management.free_memory(ROOM_FOR_TRAINING, device)
    else:
        model_management.unload_all_models()
    model_management.soft_empty_cache()


def run_heavy(work: Callable[[HostReporter], Result], steps: int = 0) -> Result:
    """For heavy work: ComfyUI's models make room first, and all that was used is given back.

    ComfyUI runs nodes in torch's inference mode, whose tensors no training can use: it is left
    during the work.

    Args:
        work: Loads its models into variables of its own: these have gone when caches are emptied.
        steps: Of the training that will be reported.
    """
    _make_room()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return work(HostReporter(steps))
    except BaseException as error:
        # The frames of the work hold the models; ComfyUI keeps the error for its report.
        traceback.clear_frames(error.__traceback__)
        if lacks_memory(error):
            raise _same_kind(error)(f"{MEMORY_ADVICE} ({error})") from error
        raise
    finally:
        gc.collect()
        model_management.soft_empty_cache()
        give_back_freed_memory()


def _same_kind(error: BaseException) -> type[BaseException]:
    """ComfyUI frees its models where a GPU lacks memory, which it knows by the error's class."""
    return torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else MemoryError
