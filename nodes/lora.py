"""Keep a LoRA, and put it to work in ComfyUI's own graphs."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from torch import Tensor

from cntlora_core.runtime.files import save_safetensors_atomic

from .host import folder_paths
from .runtime import tell
from .sockets import LoRAModel, LoRASocket
from .thumbnail import copy_thumbnail
from .widgets import CATEGORY
from .workflow import shareable_header

SUBFOLDER = "loras"


class SaveLoRA(io.ComfyNode):
    """Writes a LoRA file where ComfyUI's loaders look."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRASave",
            display_name="Save Subject LoRA",
            category=CATEGORY,
            description="Saves the LoRA with all that is known of it (trigger word, settings, "
            "workflow, a picture) into output/loras, where Load LoRA finds it after a refresh (R).",
            is_output_node=True,
            inputs=[
                LoRASocket.Input("lora", tooltip="The LoRA to save."),
                io.String.Input(
                    "filename_prefix",
                    default="my_subject",
                    tooltip="Name of the file; a number is added. Folders are made: dogs/rex.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="lora_name", tooltip="The file as Load LoRA names it."
                ),
                io.String.Output(display_name="path", tooltip="Where the file is."),
            ],
        )

    @classmethod
    def execute(cls, lora: dict[str, Tensor], filename_prefix: str) -> io.NodeOutput:
        lora = LoRAModel.of(lora)
        if not filename_prefix.strip():
            raise ValueError("the file needs a name: fill in filename_prefix")
        root = Path(folder_paths.get_output_directory()) / SUBFOLDER
        root.mkdir(parents=True, exist_ok=True)
        folder, name, counter, *_ = folder_paths.get_save_image_path(filename_prefix, str(root))
        path = Path(folder) / f"{name}_{counter:05}_.safetensors"
        save_safetensors_atomic(lora, path, shareable_header(lora.metadata))
        if lora.path is not None:
            copy_thumbnail(lora.path, path)
        tell(f"saved {path.name}")
        return io.NodeOutput(listed_name(path, root), str(path))


class ApplyLoRA(io.ComfyNode):
    """Patches a MODEL and a CLIP of ComfyUI's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRAApply",
            display_name="Apply Subject LoRA",
            category=CATEGORY,
            description="Puts a LoRA that was just trained into a checkpoint's model and text "
            "encoder, for KSampler, without saving it first.",
            inputs=[
                io.Model.Input("model", tooltip="From Open Model for KSampler."),
                io.Clip.Input(
                    "clip",
                    tooltip="From Open Model for KSampler. The LoRA changes how prompts are read, "
                    "so both are needed.",
                ),
                LoRASocket.Input("lora", tooltip="The LoRA."),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.05,
                    tooltip="How strongly it acts on the image; 1 as trained.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.05,
                    tooltip="How strongly it acts on the reading of prompts; 1 as trained.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="To KSampler."),
                io.Clip.Output(display_name="clip", tooltip="To CLIP Text Encode."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        lora: dict[str, Tensor],
        strength_model: float,
        strength_clip: float,
    ) -> io.NodeOutput:
        import comfy.sd  # pyright: ignore[reportMissingImports]

        if clip is None:
            raise ValueError("there is no clip: use a checkpoint with a text encoder")
        tensors = dict(lora)
        patched = comfy.sd.load_lora_for_models(model, clip, tensors, strength_model, strength_clip)
        if patch_count(patched[0]) == patch_count(model):
            raise ValueError(
                "this LoRA fits no layer of this model: a checkpoint of Stable Diffusion 1.5 is "
                "needed, and the small model's LoRAs work with Generate Images only"
            )
        return io.NodeOutput(*patched)


def listed_name(path: PurePath, root: PurePath) -> str:
    """A file as ComfyUI's lists name it: below its folder, with the system's own separators."""
    return str(path.relative_to(root))


def patch_count(model: Any) -> int:
    """How many patches a MODEL of ComfyUI's carries; a layer may carry several."""
    return sum(len(patches) for patches in model.patches.values())


NODES = [SaveLoRA, ApplyLoRA]
