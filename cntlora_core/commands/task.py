"""``cntlora task``: fine-tune a model on a task of the papers, and measure it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated

import tyro

from cntlora_core.runtime.console import ConsoleReporter
from cntlora_core.tasks.recipes import (
    DepthSettings,
    LmSettings,
    SegmentationSettings,
    TextSettings,
    VisionSettings,
    VlmSettings,
)
from cntlora_core.tasks.settings import TaskSettings

RECIPES: dict[type[TaskSettings], str] = {
    TextSettings: "text",
    VisionSettings: "vision",
    LmSettings: "lm",
    VlmSettings: "vlm",
    SegmentationSettings: "segmentation",
    DepthSettings: "depth",
}
"""By settings, the recipe's module in ``cntlora_core.tasks`` and the end of its function's name."""


@dataclass(frozen=True)
class Task:
    """Fine-tune a model on a task of the papers, by any method, and measure it.

    A recipe takes hub ids or local folders, and writes the adapter, its metrics and its training
    curves into the output folder. Several processes: `accelerate launch -m cntlora_core.cli task
    ...`.

    Attributes:
        what: text: GLUE. vision: VTAB-1K, or folders of classes. lm: the commonsense sets. vlm:
            image descriptions and instructions. segmentation: masks of one kind of object. depth:
            distances.
    """

    what: Annotated[
        Annotated[TextSettings, tyro.conf.subcommand("text")]
        | Annotated[VisionSettings, tyro.conf.subcommand("vision")]
        | Annotated[LmSettings, tyro.conf.subcommand("lm")]
        | Annotated[VlmSettings, tyro.conf.subcommand("vlm")]
        | Annotated[SegmentationSettings, tyro.conf.subcommand("segmentation")]
        | Annotated[DepthSettings, tyro.conf.subcommand("depth")],
        tyro.conf.arg(name=""),
        tyro.conf.OmitArgPrefixes,
    ]

    def after_cancel(self) -> str:
        return "; the run goes on from its last checkpoint with --resume"

    def run(self, reporter: ConsoleReporter) -> None:
        from transformers.utils import logging

        name = RECIPES[type(self.what)]
        # The reporter tells of long work; what is loaded from files takes seconds.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        logging.disable_progress_bar()
        train = getattr(import_module(f"cntlora_core.tasks.{name}"), f"train_{name}")
        first = os.environ.get("RANK", "0") == "0"
        reporter.console.quiet = not first  # one process tells what is done
        result = train(self.what, reporter)
        if not first:
            return
        for split, metrics in result.metrics.items():
            values = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
            print(f"{split}: {values}")
        print(result.folder)
