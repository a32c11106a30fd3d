"""Runs in ComfyUI's environment: what its stock loader makes of a LAVA file, weight by weight.

    COMFYUI_PATH on PYTHONPATH, then: python lava_in_comfyui.py LORA.safetensors OUT.safetensors

OUT gets, for each key of the loader's own map that the file has a patch for, what the patch adds to
a weight of zeros. The map is that of Stable Diffusion 1.5's denoiser.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

lora_path, outputs_path, shapes_path = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


@torch.inference_mode()
def main() -> None:
    # The shape of SD 1.5's denoiser as comfy.model_detection finds it in a checkpoint.
    config = {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
    }
    key_map = {
        "lora_unet_" + theirs.removesuffix(".weight").replace(".", "_"): ours
        for theirs, ours in comfy.utils.unet_to_diffusers(config).items()
        if theirs.endswith(".weight")
    }
    stored = comfy.utils.load_torch_file(lora_path, safe_load=True)
    patches = comfy.lora.load_lora(stored, key_map)
    shapes = json.loads(Path(shapes_path).read_text())
    outputs = {}
    for name, shape in shapes.items():
        patch = (1.0, patches[key_map[name]], 1.0, None, None)
        changed = comfy.lora.calculate_weight([patch], torch.zeros(shape), name)
        outputs[name] = changed.contiguous().clone()
    save_file(outputs, outputs_path, {"patches": str(len(patches))})


main()
