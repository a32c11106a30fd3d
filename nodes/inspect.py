"""What is in a LoRA file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from torch import Tensor

from .host import folder_paths
from .pictures import image_tensor, shown
from .runtime import tell
from .sockets import LoRAModel, LoRASocket
from .widgets import CATEGORY

if TYPE_CHECKING:
    from cntlora_core.lora_file.reading import LoRAFile

CONNECTED = "(the connected one)"
SHOWN_METADATA = {
    "modelspec.title": "title",
    "modelspec.trigger_phrase": "trigger word",
    "ss_sd_model_name": "trained on",
    "cntlora.method": "method",
    "ss_steps": "steps",
    "ss_learning_rate": "learning rate",
    "modelspec.resolution": "resolution",
    "modelspec.date": "date",
}


class InspectLoRA(io.ComfyNode):
    """Trigger word, settings and ranks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRAInspect",
            display_name="Inspect LoRA",
            category=CATEGORY,
            description="What a LoRA for SD1.5 says of itself, and its ranks.",
            is_output_node=True,
            inputs=[
                LoRASocket.Input("lora", optional=True, tooltip="A LoRA that was just trained."),
                io.Combo.Input(
                    "lora_name",
                    options=[CONNECTED, *folder_paths.get_filename_list("loras")],
                    default=CONNECTED,
                    tooltip="Or a file of ComfyUI's loras folder.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="What it says of itself."),
                io.Image.Output(display_name="ranks", tooltip="Ranks by part of the model."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, lora: None = None) -> str:
        """Changes when the file does, also under the same name."""
        if lora_name == CONNECTED:
            return ""
        status = Path(folder_paths.get_full_path_or_raise("loras", lora_name)).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    @classmethod
    def execute(cls, lora_name: str, lora: dict[str, Tensor] | None = None) -> io.NodeOutput:
        from cntlora_core.figures.plots import rank_picture
        from cntlora_core.lora_file.reading import read_lora_tensors

        if lora_name != CONNECTED:
            path = Path(folder_paths.get_full_path_or_raise("loras", lora_name))
            model = LoRAModel.read(path)
        elif lora is not None:
            model = LoRAModel.of(lora)
        else:
            raise ValueError("there is no LoRA: connect one, or choose a file")
        file = read_lora_tensors(model, model.metadata, model.label)
        text = report(file)
        ranks = {name: layer.rank for name, layer in file.layers.items()}
        picture = rank_picture(ranks, model.label)
        tell(text)
        return io.NodeOutput(text, image_tensor([picture]), ui=shown([picture]))


PARTS = {
    "unet.": "UNet",
    "text_encoder.": "text encoder",
    "text_encoder_2.": "second text encoder",
}


def report(file: LoRAFile) -> str:
    """The file in a few lines for a person."""
    lines = [
        f"{name}: {file.metadata[k]}" for k, name in SHOWN_METADATA.items() if k in file.metadata
    ]
    for part, words in PARTS.items():
        layers = [layer for name, layer in file.layers.items() if name.startswith(part)]
        if layers:
            ranks = [layer.rank for layer in layers]
            spread = f"ranks {min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.1f}"
            lines.append(f"{words}: {len(layers)} layers, {spread}")
    if file.unknown_keys:
        lines.append(f"{len(file.unknown_keys)} keys fit no layer of {file.family.title}")
    return "\n".join(lines)


NODES = [InspectLoRA]
