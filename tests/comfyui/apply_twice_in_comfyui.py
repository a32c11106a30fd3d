"""Runs in ComfyUI's environment: *Apply Subject LoRA* twice, one after the other, and a misfit.

    COMFYUI_PATH on PYTHONPATH, then: python apply_twice_in_comfyui.py PACK REPORT.json LORA...

The model has the shape of Stable Diffusion 1.5 and no weights: patches are recorded, not applied.
The report says how many patches each adapted layer of the denoiser got, and what the node said of
a LoRA that fits no layer.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

pack_path, report_path, *lora_paths = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

# The shape of SD 1.5's denoiser as comfy.model_detection finds it in a checkpoint.
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "context_dim": 768,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "num_heads": 8,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "adm_in_channels": None,
    "use_temporal_attention": False, "legacy": False,
}  # fmt: skip


def patcher(model: torch.nn.Module) -> Any:
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def model_and_clip() -> tuple[Any, Any]:
    config = comfy.supported_models.SD15(UNET)
    model = comfy.model_base.BaseModel(config, device="meta")
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = comfy.sd1_clip.SD1ClipModel(device="meta", dtype=torch.float32)
    clip.patcher = patcher(clip.cond_stage_model)
    clip.tokenizer = clip.layer_idx = clip.apply_hooks_to_conds = None
    clip.tokenizer_options, clip.use_clip_schedule = {}, False
    return patcher(model), clip


def apply_node() -> Any:
    spec = importlib.util.spec_from_file_location("the_pack", Path(pack_path) / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["the_pack"] = module
    spec.loader.exec_module(module)

    async def nodes() -> list[Any]:
        return await (await module.comfy_entrypoint()).get_node_list()

    found = {node.GET_SCHEMA().node_id: node for node in asyncio.run(nodes())}
    return found["CNTLoRAApply"]


@torch.inference_mode()
def main() -> None:
    node, (model, clip) = apply_node(), model_and_clip()
    for path in lora_paths:
        strengths = {"strength_model": 1.0, "strength_clip": 1.0}
        model, clip = node.execute(model=model, clip=clip, lora=load_file(path), **strengths).args
    misfit = {name.replace("_blocks_", "_nowhere_"): t for name, t in load_file(path).items()}
    try:
        node.execute(model=model, clip=clip, lora=misfit, **strengths)
        refused = ""
    except ValueError as error:
        refused = str(error)
    report = {
        "unet": {name: len(patches) for name, patches in model.patches.items()},
        "text_encoder": {name: len(patches) for name, patches in clip.patcher.patches.items()},
        "refused": refused,
    }
    Path(report_path).write_text(json.dumps(report))


main()
