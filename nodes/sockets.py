"""What travels between the nodes: choices, and finished values; never a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from torch import Tensor

from cntlora_core.config import CNTLoRAConfig
from cntlora_core.data.photos import PhotoSet
from cntlora_core.diffusion.settings import Precision, PredictionType

if TYPE_CHECKING:
    from cntlora_core.diffusion.stages import Initialization, Subject

ModelSocket = io.Custom("CNTLORA_MODEL")
SubjectSocket = io.Custom("CNTLORA_SUBJECT")
ClassImagesSocket = io.Custom("CNTLORA_CLASS_IMAGES")
InitializationSocket = io.Custom("CNTLORA_START")
InitializationOptionsSocket = io.Custom("CNTLORA_INITIALIZATION_OPTIONS")
LoRASocket = io.Custom("LORA_MODEL")  # ComfyUI's own: its Save LoRA Weights takes it too
LossSocket = io.Custom("LOSS_MAP")  # likewise, its Plot Loss Graph


@dataclass(frozen=True)
class ModelChoice:
    """The model to be taught or to generate with; each node that needs it loads and frees it.

    Attributes:
        name: For people.
        path: A checkpoint file or a diffusers folder.
        precision: Data type of its weights while it is in use.
        clip_skip: Which layer of its text encoder is read, from the last.
        prediction_type: What it predicts; None for what it says.
    """

    name: str
    path: Path
    precision: Precision
    clip_skip: int = 1
    prediction_type: PredictionType | None = None


@dataclass(frozen=True, eq=False)
class ClassImages:
    """Pictures of the class, and the prompt that they go with."""

    photos: PhotoSet
    prompt: str


@dataclass(frozen=True)
class InitializationOptions:
    """What few people change in an initialisation.

    Attributes:
        cntlora: Settings of the closed form.
        convolutions: Whether LAVA adapts convolutions too.
        orthogonality: Weight of LAVA's penalty.
    """

    cntlora: CNTLoRAConfig
    convolutions: bool
    orthogonality: float


@dataclass(frozen=True, eq=False)
class TrainingInitialization:
    """An initialisation, with the model and the subject that it was made from."""

    model: ModelChoice
    subject: Subject
    initialization: Initialization


class LoRAModel(dict[str, Tensor]):
    """The tensors of a LoRA file by their keys, as ComfyUI's own nodes take them, and its header.

    Attributes:
        metadata: The header of the file.
        label: For people: the file's name or the method and the steps.
        path: Where its file was when it was read; None where it was in no file.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
        label: str = "LoRA",
        path: Path | None = None,
    ) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata or {})
        self.label = label
        self.path = path

    @classmethod
    def read(cls, path: Path) -> LoRAModel:
        """The content of a file, in memory: the file may be replaced afterwards.

        Raises:
            OSError, ValueError: it cannot be read, in words.
        """
        from cntlora_core.lora_file.reading import load_lora_tensors

        tensors, metadata = load_lora_tensors(path)
        method, steps = metadata.get("cntlora.method"), metadata.get("ss_steps")
        label = f"{method}, {steps} steps" if method and steps else path.stem
        return cls(tensors, metadata, label, path)

    @classmethod
    def of(cls, lora: Mapping[str, Tensor]) -> LoRAModel:
        """Whatever comes through a LORA_MODEL socket, from this pack or from another node."""
        return lora if isinstance(lora, cls) else cls(lora)
