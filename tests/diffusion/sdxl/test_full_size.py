"""The names of SDXL at its full size, without weights, as other tools' own tables have them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils as diffusers_files

from cntlora_core.diffusion.checkpoint import CheckpointKind, TensorEntry, _identify_tensors
from cntlora_core.diffusion.family import SDXL
from cntlora_core.diffusion.initialize import diffusion_attachment_points
from cntlora_core.diffusion.pipeline import StableDiffusionParts, assemble, build_model
from cntlora_core.diffusion.settings import AdapterSettings
from cntlora_core.diffusion.single_file import to_original_layout
from cntlora_core.lora_file.algebra import LoRALayer
from cntlora_core.lora_file.families import SDXL_FILES
from cntlora_core.lora_file.names import TEXT_MODEL
from cntlora_core.lora_file.reading import read_lora_tensors
from cntlora_core.lora_file.writing import (
    LoRALayers,
    diffusers_tensors,
    read_lora_file,
    write_lora_file,
)

COMFYUI_PATH = os.environ.get("COMFYUI_PATH")


@pytest.fixture(scope="module")
def parts() -> StableDiffusionParts:
    with init_empty_weights():
        models = {part: build_model(part, SDXL.configs, SDXL) for part in SDXL.parts}
    return assemble(models, SDXL.configs, SDXL, source="it", fingerprint="it")


@pytest.fixture(scope="module")
def checkpoint(parts: StableDiffusionParts) -> dict[str, torch.Tensor]:
    return to_original_layout(parts)


@pytest.fixture(scope="module")
def layers(parts: StableDiffusionParts) -> LoRALayers:
    """An adapter of rank 1 on all attention."""
    points = diffusion_attachment_points(parts.networks, SDXL, AdapterSettings())
    return {
        point.name.replace(f".{TEXT_MODEL}", "."): LoRALayer(
            torch.zeros(1, point.in_features), torch.zeros(point.out_features, 1), 1.0
        )
        for point in points
    }


def test_a_single_file_has_the_names_that_diffusers_converts(parts, checkpoint):
    assert parts.default_resolution == 1024
    assert [tokenizer.pad_token_id for tokenizer in parts.tokenizers] == [49407, 0]
    assert len(checkpoint) == 1680 + 248 + 196 + 389
    header = {name: TensorEntry("F16", tuple(t.shape), 0, 0) for name, t in checkpoint.items()}
    assert _identify_tensors(header) is CheckpointKind.SDXL
    second = parts.networks["text_encoder_2"]
    converted = {
        "unet": diffusers_files.convert_ldm_unet_checkpoint(dict(checkpoint), parts.unet.config),
        "vae": diffusers_files.convert_ldm_vae_checkpoint(dict(checkpoint), parts.vae.config),
        "text_encoder": diffusers_files.convert_ldm_clip_checkpoint(
            dict(checkpoint), remove_prefix="conditioner.embedders.0.transformer."
        ),
        "text_encoder_2": diffusers_files.convert_open_clip_checkpoint(
            second, dict(checkpoint), prefix="conditioner.embedders.1.model."
        ),
    }
    for part, model in {**parts.networks, "vae": parts.vae}.items():
        found, wanted = (
            {
                name.removeprefix(TEXT_MODEL): tuple(tensor.shape)
                for name, tensor in tensors.items()
                if not name.endswith("position_ids")
            }
            for tensors in (converted[part], model.state_dict())
        )
        assert found == wanted, part


def test_a_lora_has_the_names_that_diffusers_takes_for_sdxl(parts, layers, tmp_path: Path):
    assert len(layers) == 70 * 8 + 11 * 4 + 32 * 4
    tensors = diffusers_tensors(layers, family=SDXL_FILES)
    assert tensors["lora_te2_text_model_encoder_layers_31_self_attn_q_proj.alpha"] == 1
    known = "lora_unet_output_blocks_0_1_transformer_blocks_9_attn2_to_out_0.lora_up.weight"
    assert tensors[known].shape == (1280, 1)
    state, _ = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=parts.unet.config)
    assert read_lora_tensors(state).layers.keys() == layers.keys()
    for layout in ("kohya", "diffusers", "peft"):
        path = tmp_path / (layout if layout == "peft" else f"{layout}.safetensors")
        read = read_lora_file(write_lora_file(path, layers, layout=layout, family=SDXL_FILES))
        assert read.layers.keys() == layers.keys()
        assert read.family == SDXL_FILES


@pytest.mark.skipif(not COMFYUI_PATH, reason="COMFYUI_PATH does not name a ComfyUI checkout")
def test_comfyui_takes_checkpoint_and_lora_for_sdxl(checkpoint, layers, tmp_path: Path):
    write_lora_file(tmp_path / "lora.safetensors", layers, family=SDXL_FILES)
    shapes = {name: list(tensor.shape) for name, tensor in checkpoint.items()}
    (tmp_path / "shapes.json").write_text(json.dumps(shapes))
    script = Path(__file__).with_name("sdxl_in_comfyui.py")
    done = subprocess.run(
        [os.environ.get("COMFYUI_PYTHON", sys.executable), str(script), str(tmp_path)],
        cwd=COMFYUI_PATH,
        env={**os.environ, "PYTHONPATH": str(COMFYUI_PATH)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kind"] == "SDXL"
    assert report["messages"] == report["missing"] == []
    deltas = {tuple(layer.delta().shape) for layer in layers.values()}
    assert {tuple(shape) for shape in report["patched"].values()} == deltas
    assert len(report["patched"]) == len(layers)
