"""ComfyUI's stock loader on a file of LAVA's, weight by weight; no checkpoint is needed.

Needs a ComfyUI checkout (COMFYUI_PATH) and an environment that runs it (COMFYUI_PYTHON, else this
one).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cntlora_core.diffusion.family import SD15, UNET
from cntlora_core.diffusion.initialize_lava import lava_modules
from cntlora_core.diffusion.settings import AdapterSettings
from cntlora_core.lava.factors import LavaFactors
from cntlora_core.lava.image_file import lora_layers
from cntlora_core.lava.layer import weight_shape
from cntlora_core.lora_file.families import SD15_FILES
from cntlora_core.lora_file.names import kohya_name
from cntlora_core.lora_file.writing import write_lora_file

COMFYUI_PATH = os.environ.get("COMFYUI_PATH")


@pytest.mark.skipif(not COMFYUI_PATH, reason="COMFYUI_PATH does not name a ComfyUI checkout")
def test_every_key_is_known_and_every_weight_is_changed_as_ours(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=768,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
    settings = AdapterSettings(adapter="lava", train_text_encoder=False)
    modules = lava_modules({UNET: unet}, SD15, settings)
    generator = torch.Generator().manual_seed(0)
    factors, shapes = {}, {}
    for name, module in modules.items():
        shape = weight_shape(module)
        u, v, *spatial = (torch.randn(n, 2, generator=generator) for n in shape)
        factors[name] = LavaFactors(u, v, tuple(spatial), 0.75)
        if list(shape) not in shapes.values():  # the numbers of one module of each shape
            shapes[kohya_name(name, SD15_FILES)] = list(shape)
    path = write_lora_file(tmp_path / "lava.safetensors", lora_layers(factors))
    (tmp_path / "shapes.json").write_text(json.dumps(shapes))
    outputs = tmp_path / "outputs.safetensors"
    script = Path(__file__).with_name("lava_in_comfyui.py")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run(
        [python, str(script), str(path), str(outputs), str(tmp_path / "shapes.json")],
        cwd=COMFYUI_PATH,
        env={**os.environ, "PYTHONPATH": str(COMFYUI_PATH)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with safe_open(outputs, framework="pt") as file:
        assert int(file.metadata()["patches"]) == len(modules) == 128 + 98
    there = load_file(outputs)
    assert there.keys() == shapes.keys()
    assert {len(shape) for shape in shapes.values()} == {2, 4}
    own = {kohya_name(name, SD15_FILES): layer for name, layer in factors.items()}
    for name, changed in there.items():
        wanted = own[name].delta()
        assert (changed - wanted).norm() < 1e-5 * wanted.norm(), name
