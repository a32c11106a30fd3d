"""Recipes of the papers' experiments: data, model and metric on transformers' Trainer.

>>> from cntlora_core.tasks import TextSettings, train_text
>>> result = train_text(TextSettings(task="rte", method="cross", output="runs/rte"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cntlora_core.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from cntlora_core.tasks.chat import Conversation, SentenceEncoder
    from cntlora_core.tasks.curves import Curves, plot_curves
    from cntlora_core.tasks.depth import train_depth
    from cntlora_core.tasks.lm import train_lm
    from cntlora_core.tasks.recipes import (
        DepthSettings,
        LmSettings,
        SegmentationSettings,
        TextSettings,
        VisionSettings,
        VlmSettings,
    )
    from cntlora_core.tasks.run import TaskResult, run_task
    from cntlora_core.tasks.segmentation import train_segmentation
    from cntlora_core.tasks.settings import Plan, Preset, TaskSettings, planned
    from cntlora_core.tasks.text import train_text
    from cntlora_core.tasks.trainer import Task
    from cntlora_core.tasks.vision import train_vision
    from cntlora_core.tasks.vlm import train_vlm

_MODULES = {
    "Conversation": "tasks.chat",
    "Curves": "tasks.curves",
    "DepthSettings": "tasks.recipes",
    "LmSettings": "tasks.recipes",
    "Plan": "tasks.settings",
    "Preset": "tasks.settings",
    "SegmentationSettings": "tasks.recipes",
    "SentenceEncoder": "tasks.chat",
    "Task": "tasks.trainer",
    "TaskResult": "tasks.run",
    "TaskSettings": "tasks.settings",
    "TextSettings": "tasks.recipes",
    "VisionSettings": "tasks.recipes",
    "VlmSettings": "tasks.recipes",
    "planned": "tasks.settings",
    "plot_curves": "tasks.curves",
    "run_task": "tasks.run",
    "train_depth": "tasks.depth",
    "train_lm": "tasks.lm",
    "train_segmentation": "tasks.segmentation",
    "train_text": "tasks.text",
    "train_vision": "tasks.vision",
    "train_vlm": "tasks.vlm",
}

__all__ = [
    "Conversation",
    "Curves",
    "DepthSettings",
    "LmSettings",
    "Plan",
    "Preset",
    "SegmentationSettings",
    "SentenceEncoder",
    "Task",
    "TaskResult",
    "TaskSettings",
    "TextSettings",
    "VisionSettings",
    "VlmSettings",
    "planned",
    "plot_curves",
    "run_task",
    "train_depth",
    "train_lm",
    "train_segmentation",
    "train_text",
    "train_vision",
    "train_vlm",
]

__getattr__ = lazy_names(__name__, _MODULES)
