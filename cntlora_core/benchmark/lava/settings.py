"""What ``cntlora bench lava`` is asked for; imports nothing slow, for the command's help."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

ExperimentName = Literal[
    "structure", "factors", "variance", "robustness", "spectrum", "starts", "cost"
]
ModelName = Literal["resnet18", "resnet34", "vgg11", "alexnet", "googlenet", "convnext"]
TaskName = ModelName | Literal["minilm"]
TargetName = Literal["shapes", "emoji", "photos"]
EXPERIMENTS: tuple[ExperimentName, ...] = get_args(ExperimentName)
MODELS: tuple[ModelName, ...] = get_args(ModelName)


@dataclass(frozen=True)
class LavaBenchmark:
    """LAVA against LoRA and others on convolutional networks that are pre-trained here.

    Every result is kept as it comes; the same command goes on where it was interrupted.

    Attributes:
        output: Folder for the results: a JSON file and a plot for each experiment.
        experiments: structure: accuracy and parameters against LoRA; factors: which factor the
            orthogonality term acts on; variance: of the gradient, with the term and without;
            robustness: over the term's strength and the rank; spectrum: of the trained update;
            starts: plain ones against closed forms; cost: time of a step.
        models: Layouts of networks, in reduced widths; the structure experiment takes all, the
            others the first three.
        target: What is fine-tuned on. shapes: sketches, after flat shapes; emoji: 3-D renderings,
            after flat drawings; photos: crops of photographs, after flat drawings where sprites
            are given, else after flat shapes.
        text: Take the text encoder and the definitions of docs/text.md into factors, variance,
            robustness, spectrum and starts, where its attention gets adapters.
        sprites: The node_modules folder that `python -m cntlora_core.mini.making.fetch` filled, for
            drawings and renderings.
        photos: A folder with one folder of photographs for each class, for photos.
        seeds: How many runs of each kind.
        rates: Learning rates; each method's best one is reported.
        rank: Rank of LoRA and LAVA.
        orthogonality: The term's strength, lambda, where it is not what is varied.
        steps: Steps of fine-tuning.
        pretraining_steps: Steps of pre-training, once for each network.
        batch: Pictures a step.
        pictures: How many there are to be fine-tuned on.
        size: Side of a picture in pixels.
        width: Channels, as a part of the published layout's.
        quick: The smallest of everything, to see that it runs.
    """

    output: Path = Path("bench_lava")
    experiments: tuple[ExperimentName, ...] = EXPERIMENTS
    models: tuple[ModelName, ...] = MODELS
    target: TargetName = "shapes"
    text: bool = False
    sprites: Path | None = None
    photos: Path | None = None
    seeds: int = 3
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    rank: int = 4
    orthogonality: float = 0.1
    steps: int = 300
    pretraining_steps: int = 1500
    batch: int = 64
    pictures: int = 600
    size: int = 64
    width: float = 0.25
    quick: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "rank", "steps", "pretraining_steps", "batch", "pictures", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("experiments", "models", "rates"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one")
        for name, value in (("width", self.width), *(("rates", rate) for rate in self.rates)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.size < 32:
            raise ValueError(f"size must be at least 32 pixels, got {self.size}")
        if self.target == "emoji" and self.sprites is None:
            raise ValueError(
                "target='emoji' needs sprites: the node_modules folder that "
                "`python -m cntlora_core.mini.making.fetch --cache FOLDER` fills"
            )
        if self.target == "photos" and self.photos is None:
            raise ValueError(
                "target='photos' needs photos: a folder with one folder of photographs a class"
            )

    def effective(self) -> LavaBenchmark:
        """What is run: these settings, or with ``quick`` the smallest ones."""
        if not self.quick:
            return self
        return dataclasses.replace(
            self,
            models=self.models[:1],
            seeds=1,
            rates=self.rates[:1],
            steps=4,
            pretraining_steps=4,
            batch=8,
            pictures=16,
            size=32,
            width=min(self.width, 0.125),
        )

    @property
    def source(self) -> Literal["shapes", "emoji"]:
        """What is pre-trained on."""
        return "shapes" if self.target == "shapes" or self.sprites is None else "emoji"

    def identity(self) -> dict[str, Any]:
        """What results depend on: those of other values are not to be mixed with these."""
        names = ("target", "orthogonality", "rank", "steps", "pretraining_steps", "batch")
        names += ("pictures", "size", "width", "quick")
        values = {name: getattr(self, name) for name in names}
        if self.target == "photos" and self.photos is not None:
            values |= {"photos": self.photos.name, "source": self.source}
        return values
