"""Diffusers folders: variants, shards, older names, models of another make, missing files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from cntlora_core.diffusion.checkpoint import CheckpointError
from cntlora_core.diffusion.family import SD15, default_resolution
from cntlora_core.diffusion.pipeline import (
    StableDiffusionParts,
    load_stable_diffusion,
)
from cntlora_core.diffusion.random_checkpoint import random_parts, write_random_checkpoint

from .conftest import NARROW, assert_same, change_json, make_configs


def test_folder_is_what_diffusers_loads(made: StableDiffusionParts, folder: Path) -> None:
    loaded = load_stable_diffusion(folder)
    assert_same(made, loaded)
    assert_same(loaded, StableDiffusionPipeline.from_pretrained(folder, local_files_only=True))
    assert loaded.source == str(folder)
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1
    assert (loaded.latent_scale, loaded.default_resolution) == (8, 64)
    assert default_resolution(folder) == 64


@pytest.mark.thorough
def test_folder_saved_by_diffusers_in_fp16_variant(
    made: StableDiffusionParts, folder: Path, tmp_path: Path
) -> None:
    half = load_stable_diffusion(folder, dtype=torch.float16)
    half.pipeline().save_pretrained(tmp_path / "half", variant="fp16")
    files = {path.name for path in (tmp_path / "half").rglob("*.safetensors")}
    assert files == {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    loaded = load_stable_diffusion(tmp_path / "half", dtype=torch.float16)
    half.vae.half().float()  # as the files have it
    assert_same(half, loaded)
    prompt = "a photo of an ümläut"
    assert loaded.tokenizer(prompt).input_ids == made.tokenizer(prompt).input_ids
    assert torch.equal(loaded.unet.conv_in.weight, made.unet.conv_in.weight.half())


def test_folder_with_shards(made: StableDiffusionParts, folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    made.unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    assert_same(made, load_stable_diffusion(folder))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is missing"):
        load_stable_diffusion(folder)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_folder_with_names_of_other_versions(
    made: StableDiffusionParts, folder: Path, prefix: str
) -> None:
    """transformers before and after 5.6; the VAE's attention before diffusers 0.17."""
    text = folder / "text_encoder" / "model.safetensors"
    save_file({prefix + k.removeprefix("text_model."): v for k, v in load_file(text).items()}, text)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(vae)
    for new_name, old_name in old.items():
        tensors = {k.replace(f".{new_name}.", f".{old_name}."): v for k, v in tensors.items()}
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, vae)
    assert_same(made, load_stable_diffusion(folder))


def test_small_model_of_another_make(tmp_path: Path) -> None:
    """64 px, three VAE levels (factor 4), text width 128, a vocabulary of its own."""
    configs = make_configs(
        tmp_path / "configs",
        {
            "unet": {**NARROW["unet"], "sample_size": 16, "cross_attention_dim": 128},
            "vae": {
                "block_out_channels": [8, 16, 16],
                "down_block_types": ["DownEncoderBlock2D"] * 3,
                "up_block_types": ["UpDecoderBlock2D"] * 3,
                "norm_num_groups": 8,
                "sample_size": 64,
                "scaling_factor": 1.5,
            },
            "text_encoder": {
                **NARROW["text_encoder"],
                "hidden_size": 128,
                "vocab_size": 516,
                "eos_token_id": 515,
                "bos_token_id": 514,
            },
        },
    )
    names = list(json.loads((SD15.configs / "tokenizer" / "vocab.json").read_text("utf-8")))[:512]
    names += ["ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    (configs / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "#version: 0.2\nc a\nca t</w>\n"
    (configs / "tokenizer" / "merges.txt").write_text(merges, encoding="utf-8")
    write_random_checkpoint(tmp_path / "small", layout="diffusers", configs=configs)

    parts = load_stable_diffusion(tmp_path / "small")
    assert (parts.latent_scale, parts.default_resolution) == (4, 64)
    assert parts.tokenizer("cat").input_ids == [514, 513, 515]
    pipeline = parts.pipeline()
    generator = torch.Generator().manual_seed(0)
    result = pipeline("cat", num_inference_steps=2, output_type="np", generator=generator)
    image = cast(Any, result).images
    assert image.shape == (1, 64, 64, 3)
    assert 0 < image.std() < 1


@pytest.mark.thorough
def test_folder_fingerprint_sees_one_changed_tensor(folder: Path) -> None:
    first = load_stable_diffusion(folder).fingerprint
    assert load_stable_diffusion(folder, dtype=torch.float16).fingerprint == first
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    assert load_stable_diffusion(folder).fingerprint != first


def test_parts_that_do_not_fit_together(
    made: StableDiffusionParts, narrow: Path, tmp_path: Path
) -> None:
    wide = make_configs(tmp_path / "wide", NARROW)
    change_json(wide / "unet" / "config.json", cross_attention_dim=64)
    with pytest.raises(CheckpointError, match="text states of width 64, the text encoder makes 32"):
        random_parts(wide)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.source = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("unet/config.json", "no unet/config.json"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors is"),
        ("text_encoder/model.safetensors", "text_encoder/model.safetensors is missing"),
        ("scheduler/scheduler_config.json", "this file is missing"),
        ("tokenizer/vocab.json", "tokenizer/ has neither vocab.json and merges.txt nor tokenizer"),
    ],
)
def test_a_folder_with_a_file_missing(folder: Path, lost: str, message: str) -> None:
    (folder / lost).unlink()
    with pytest.raises(CheckpointError, match=message):
        load_stable_diffusion(folder)
