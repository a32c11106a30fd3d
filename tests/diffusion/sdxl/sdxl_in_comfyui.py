"""Runs in ComfyUI's environment: what it takes a checkpoint of given shapes and a LoRA for.

    COMFYUI_PATH on PYTHONPATH, then: python sdxl_in_comfyui.py FOLDER

FOLDER holds ``shapes.json``, the shapes of a checkpoint's tensors by name, and
``lora.safetensors``; it gets ``report.json``. No weight is made: all models are on the meta device.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

folder = Path(sys.argv[1])
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402


class Keep(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main() -> None:
    handler = Keep()
    shapes = json.loads((folder / "shapes.json").read_text())
    checkpoint = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    prefix = "model.diffusion_model."
    config = comfy.model_detection.model_config_from_unet(checkpoint, prefix)
    model = config.get_model(checkpoint, prefix, device=torch.device("meta"))
    clip = comfy.sdxl_clip.SDXLClipModel(device=torch.device("meta"), dtype=torch.float32)
    own = {f"diffusion_model.{name.removeprefix(prefix)}" for name in checkpoint if prefix in name}
    missing = own ^ {name for name in model.state_dict() if name.startswith("diffusion_model.")}
    text = set(config.process_clip_state_dict(checkpoint))
    missing |= text - clip.state_dict().keys()

    key_map = comfy.lora.model_lora_keys_unet(model, {})
    key_map = comfy.lora.model_lora_keys_clip(clip, key_map)
    logging.getLogger().addHandler(handler)
    lora = comfy.utils.load_torch_file(str(folder / "lora.safetensors"), safe_load=True)
    patches = comfy.lora.load_lora(lora, key_map)
    weights = {**model.state_dict(), **clip.state_dict()}
    report = {
        "kind": type(config).__name__,
        "missing": sorted(missing),
        "messages": handler.messages,
        "patched": {name: list(weights[name].shape) for name in patches},
    }
    (folder / "report.json").write_text(json.dumps(report))


main()
