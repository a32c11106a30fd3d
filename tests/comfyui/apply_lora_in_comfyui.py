"""Runs in ComfyUI's environment: applies a LoRA with its loader and reports what became of it.

    COMFYUI_PATH on PYTHONPATH, then: python apply_lora_in_comfyui.py JOB.json

The job names ``checkpoint``, ``lora``, ``inputs`` (safetensors: tokens (n,), latents, timesteps)
and ``outputs`` (safetensors to write: states, noise, and every patched weight under ``weight.<lora
key>``); the report goes to ``report`` (JSON).
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

job = json.loads(Path(sys.argv[1]).read_text())
sys.argv = [sys.argv[0], "--cpu", "--force-fp32", "--fp32-text-enc"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


class Keep(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@torch.inference_mode()
def main() -> None:
    handler = Keep()
    logging.getLogger().addHandler(handler)
    model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(job["checkpoint"], output_vae=False)
    lora = comfy.utils.load_torch_file(job["lora"], safe_load=True)
    handler.messages.clear()
    model, clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)

    inputs = load_file(job["inputs"])
    tokens = {"l": [[(int(token), 1.0) for token in inputs["tokens"]]]}
    states = clip.encode_from_tokens(tokens)
    model.patch_model(device_to=torch.device("cpu"))
    unet = model.model.diffusion_model
    latents = inputs["latents"]
    noise = unet(latents, inputs["timesteps"], context=states.expand(len(latents), -1, -1))

    outputs = {"states": states.contiguous(), "noise": noise.contiguous()}
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
    weights = {**model.model.state_dict(), **clip.cond_stage_model.state_dict()}
    for name in sorted({key.split(".")[0] for key in lora}):
        if name in key_map:
            outputs[f"weight.{name}"] = weights[key_map[name]].clone().contiguous()
    save_file(outputs, job["outputs"])
    report = {
        "messages": handler.messages,
        "model_patches": len(model.patches),
        "clip_patches": len(clip.patcher.patches),
        "dtype": str(next(unet.parameters()).dtype),
    }
    Path(job["report"]).write_text(json.dumps(report))


main()
