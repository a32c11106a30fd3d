"""*Apply Subject LoRA* on the loader of a real ComfyUI; no checkpoint is needed.

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

from cntlora_core.lora_file.writing import LoRALayer, write_lora_file

ROOT = Path(__file__).parents[2]
COMFYUI_PATH = os.environ.get("COMFYUI_PATH")
LAYERS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 320,
    "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_k": 1280,
    "text_encoder.encoder.layers.3.self_attn.q_proj": 768,
}


@pytest.mark.skipif(not COMFYUI_PATH, reason="COMFYUI_PATH does not name a ComfyUI checkout")
def test_two_loras_are_applied_one_after_the_other_and_a_misfit_is_still_refused(
    tmp_path: Path,
) -> None:
    loras = []
    for i in range(2):
        layers = {
            name: LoRALayer(torch.ones(2, width), torch.ones(width, 2), 2.0)
            for name, width in LAYERS.items()
        }
        loras.append(str(write_lora_file(tmp_path / f"{i}.safetensors", layers)))
    report = tmp_path / "report.json"
    script = Path(__file__).with_name("apply_twice_in_comfyui.py")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run(
        [python, str(script), str(ROOT), str(report), *loras],
        cwd=COMFYUI_PATH,
        env={**os.environ, "PYTHONPATH": str(COMFYUI_PATH)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(report.read_text())
    assert list(found["unet"].values()) == [2, 2]
    assert list(found["text_encoder"].values()) == [2]
    assert "fits no layer" in found["refused"]
