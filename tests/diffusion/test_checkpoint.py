"""Whatever file is given, it is named for what it is."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cntlora_core.diffusion.checkpoint import (
    CheckpointError,
    CheckpointKind,
    folder_weights,
    identify,
    read_header,
)
from cntlora_core.diffusion.family import SD15, family_of
from cntlora_core.diffusion.original_layout import original_key
from cntlora_core.diffusion.single_file import to_original_layout

Shapes = dict[str, tuple[int, ...]]

UNET: Shapes = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 768),
}
VAE: Shapes = {"first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3)}
TEXT: Shapes = {
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (9, 768)
}
SD2: Shapes = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 1024),
    "cond_stage_model.model.transformer.resblocks.0.ln_1.weight": (1024,),
    **VAE,
}
FILES: list[tuple[str, CheckpointKind, Shapes]] = [
    ("whole", CheckpointKind.SD15, UNET | VAE | TEXT),
    ("extra keys", CheckpointKind.SD15, UNET | VAE | TEXT | {"alphas_cumprod": (9,)}),
    ("no vae", CheckpointKind.WITHOUT_VAE, UNET | TEXT),
    ("no text encoder", CheckpointKind.WITHOUT_TEXT_ENCODER, UNET | VAE),
    (
        "inpainting",
        CheckpointKind.INPAINTING,
        UNET | VAE | TEXT | {"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)},
    ),
    ("sd2", CheckpointKind.SD2, SD2),
    (
        "sdxl",
        CheckpointKind.SDXL,
        {
            "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": (8, 8),
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (768,),
            "conditioner.embedders.1.model.ln_final.weight": (1280,),
            **VAE,
        },
    ),
    (
        "sdxl without its second text encoder",
        CheckpointKind.WITHOUT_TEXT_ENCODER,
        {
            "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": (8, 8),
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (768,),
            **VAE,
        },
    ),
    (
        "refiner",
        CheckpointKind.SDXL_REFINER,
        {
            "model.diffusion_model.label_emb.0.0.weight": (8, 8),
            "conditioner.embedders.0.model.ln_final.weight": (1280,),
            **VAE,
        },
    ),
    (
        "diffusers sdxl unet",
        CheckpointKind.UNET,
        {"add_embedding.linear_1.weight": (8, 8), "down_blocks.0.resnets.0.conv1.weight": (8, 8)},
    ),
    (
        "sd3",
        CheckpointKind.SD3,
        {"model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.bias": (8,), **VAE},
    ),
    ("flux", CheckpointKind.FLUX, {"double_blocks.0.img_attn.proj.bias": (8,)}),
    (
        "kohya lora",
        CheckpointKind.LORA,
        {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 8)},
    ),
    ("kohya text lora", CheckpointKind.LORA, {"lora_te_text_model_q_proj.alpha": ()}),
    (
        "peft lora",
        CheckpointKind.LORA,
        {"base_model.model.down_blocks.0.attn1.to_q.lora_A.weight": (4, 8)},
    ),
    (
        "diffusers lora",
        CheckpointKind.LORA,
        {"unet.mid_block.attentions.0.to_q.lora.down.weight": (4, 8)},
    ),
    ("sd2 lora", CheckpointKind.LORA, {"text_model.encoder.q_proj.lora_B.weight": (1024, 4)}),
    (
        "controlnet",
        CheckpointKind.CONTROLNET,
        {"controlnet_cond_embedding.conv_in.weight": (8, 3), "down_blocks.0.weight": (8,)},
    ),
    (
        "original controlnet",
        CheckpointKind.CONTROLNET,
        {"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
    ),
    ("unet", CheckpointKind.UNET, UNET),
    (
        "diffusers unet",
        CheckpointKind.UNET,
        {"time_embedding.linear_1.weight": (8, 8), "down_blocks.0.resnets.0.conv1.weight": (8, 8)},
    ),
    ("vae", CheckpointKind.VAE, VAE),
    (
        "diffusers vae",
        CheckpointKind.VAE,
        {"encoder.conv_in.weight": (8, 3, 3, 3), "decoder.conv_in.weight": (8, 4, 3, 3)},
    ),
    ("text encoder", CheckpointKind.TEXT_ENCODER, TEXT),
    (
        "diffusers text encoder",
        CheckpointKind.TEXT_ENCODER,
        {"text_model.encoder.layers.0.mlp.fc1.bias": (8,)},
    ),
    ("embedding", CheckpointKind.EMBEDDING, {"emb_params": (4, 768)}),
    (
        "other",
        CheckpointKind.UNKNOWN,
        {f"layers.{i}.weight": (8, 8) for i in range(5)},
    ),
]


def write(path: Path, shapes: Shapes) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize(("kind", "shapes"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_files_are_told_apart(tmp_path: Path, kind: CheckpointKind, shapes: Shapes) -> None:
    path = write(tmp_path / "a model.safetensors", shapes)
    assert identify(path) is kind
    if kind in (CheckpointKind.SD15, CheckpointKind.SDXL):
        assert family_of(path).kind is kind
    else:
        with pytest.raises(CheckpointError) as caught:
            family_of(path)
        for piece in (str(path), kind.value, "Needed: a Stable Diffusion 1.5 or XL model"):
            assert piece in str(caught.value)


def test_a_convolution_without_a_kernel_is_no_checkpoint(tmp_path: Path) -> None:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({name: torch.zeros(3)}, tmp_path / "flat.safetensors")
    assert identify(tmp_path / "flat.safetensors") is CheckpointKind.UNET


def test_every_kind_of_file_is_tried() -> None:
    assert {kind for _, kind, _ in FILES} == set(CheckpointKind)


def old_pickle() -> bytes:
    return pickle.dumps({"state_dict": {}}, protocol=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"short", "text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git-LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "web page"),
        (b'{"error": "Access to model is restricted and you are not"}', "text file .*Access"),
        (b"Entry not found, sorry. Entry not found, sorry.", "text file .*Entry not found"),
        (b"PK\x03\x04" + bytes(100), r"pickle .*convert it"),
        (old_pickle(), r"pickle .*convert it"),
        (b"GGUF" + bytes(100), "GGUF"),
        (bytes(range(128, 228)), "not a safetensors file"),
        (struct.pack("<Q", 10**12) + b"{" + bytes(90), "not a safetensors file"),
        (struct.pack("<Q", 40) + b"{broken" + b" " * 60, "header is damaged"),
        (struct.pack("<Q", 14) + b'{"a": {"b":1}}', "header is damaged"),
        (struct.pack("<Q", 9) + b'{"a":[1]}', "header is damaged"),
        (struct.pack("<Q", 500) + b"{" + bytes(90), "truncated: .* 508 bytes and has 99"),
    ],
)
def test_what_is_not_safetensors_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"(?s){message}.*Needed: "):
        identify(path)


@pytest.mark.parametrize("lost", [1, 100, 4000])
def test_a_truncated_file_is_named(tmp_path: Path, lost: int) -> None:
    path = write(tmp_path / "model.safetensors", UNET | VAE | TEXT)
    content = path.read_bytes()
    path.write_bytes(content[:-lost])
    pattern = f"truncated: it should have {len(content):,} bytes and has {len(content) - lost:,}"
    with pytest.raises(CheckpointError, match=pattern):
        identify(path)


def test_header_places_are_those_of_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7, dtype=torch.int64)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert set(header) == {"a", "b"}
    assert header["a"].shape == (2, 3)
    assert (header["a"].dtype, header["b"].dtype) == ("F32", "I64")
    a, b = header["a"], header["b"]
    assert struct.unpack("<6f", content[a.start : a.end]) == (0, 1, 2, 3, 4, 5)
    assert struct.unpack("<q", content[b.start : b.end]) == (7,)


@pytest.mark.thorough
def test_the_printed_command_converts_a_pickle(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    torch.save(
        {"state_dict": {"a": shared.T, "b": shared, "step": 3}, "epoch": 1}, tmp_path / "IN.ckpt"
    )
    with pytest.raises(CheckpointError) as caught:
        identify(tmp_path / "IN.ckpt")
    command = next(line for line in str(caught.value).splitlines() if line.startswith("  python"))
    subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=tmp_path, check=True)
    converted = load_file(tmp_path / "OUT.safetensors")
    assert set(converted) == {"a", "b"}
    assert torch.equal(converted["a"], shared.T)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file or folder.*owner/name"):
        identify(tmp_path / "none.safetensors")


def make_folder(folder: Path, kind: str = "StableDiffusionPipeline", **unet: object) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    config = {"in_channels": 4, "cross_attention_dim": 768} | unet
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "unet", "kind"),
    [
        ("StableDiffusionPipeline", {}, CheckpointKind.SD15),
        ("StableDiffusionPipeline", {"cross_attention_dim": 128}, CheckpointKind.SD15),
        ("StableDiffusionImg2ImgPipeline", {}, CheckpointKind.SD15),
        ("StableDiffusionPipeline", {"cross_attention_dim": 1024}, CheckpointKind.SD2),
        ("StableDiffusionInpaintPipeline", {"in_channels": 9}, CheckpointKind.INPAINTING),
        ("StableDiffusionInstructPix2PixPipeline", {"in_channels": 8}, CheckpointKind.UNKNOWN),
        ("StableDiffusionXLPipeline", {"cross_attention_dim": 2048}, CheckpointKind.SDXL),
        ("StableDiffusion3Pipeline", {}, CheckpointKind.SD3),
        ("FluxPipeline", {}, CheckpointKind.FLUX),
        ("KandinskyPipeline", {}, CheckpointKind.UNKNOWN),
    ],
)
def test_folders_are_told_apart(
    tmp_path: Path, name: str, unet: dict[str, object], kind: CheckpointKind
) -> None:
    assert identify(make_folder(tmp_path / "m", name, **unet)) is kind


def test_a_folder_without_index_lists_and_suggests(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it holds nothing"):
        identify(tmp_path)
    write(tmp_path / "v1-5 pruned.safetensors", UNET)
    make_folder(tmp_path / "snapshots" / "abc")
    make_folder(tmp_path / "inner")
    with pytest.raises(CheckpointError) as caught:
        identify(tmp_path)
    message = str(caught.value)
    assert "no model_index.json; it holds inner/, snapshots/, v1-5 pruned.safetensors" in message
    for meant in ("inner", "snapshots/abc", "v1-5 pruned.safetensors"):
        assert f"Did you mean {tmp_path / meant}?" in message


def test_a_peft_folder_is_a_lora(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert identify(tmp_path) is CheckpointKind.LORA


def test_damaged_folders(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        identify(folder)
    (folder / "unet" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="does not hold an object"):
        identify(folder)
    shutil.rmtree(folder / "unet")
    with pytest.raises(CheckpointError, match="no unet/config"):
        identify(folder)


def test_weights_of_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    base = folder / "unet" / "diffusion_pytorch_model"
    with pytest.raises(CheckpointError, match=r"unet/diffusion_pytorch_model.safetensors is miss"):
        folder_weights(folder, "unet")
    base.with_suffix(".bin").touch()
    with pytest.raises(CheckpointError, match=r"(?s)pickle .*save_pretrained.*Needed"):
        folder_weights(folder, "unet")
    for suffix in (".non_ema.safetensors", ".fp16.safetensors", ".safetensors"):
        Path(f"{base}{suffix}").touch()
        assert folder_weights(folder, "unet") == [Path(f"{base}{suffix}")]
    with pytest.raises(CheckpointError, match="no vae/config"):
        folder_weights(folder, "vae")


def test_a_model_of_another_build_has_no_place_in_the_single_file() -> None:
    config = {"layers_per_block": 2, "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    with pytest.raises(ValueError, match=r"'class_embedding.linear_1.weight' has no place"):
        original_key("unet", "class_embedding.linear_1.weight", config, "")
    part = SimpleNamespace(
        state_dict=lambda: {"class_embedding.linear_1.weight": torch.zeros(1)}, config=config
    )
    parts = SimpleNamespace(networks={"unet": part}, vae=part, family=SD15)
    with pytest.raises(ValueError, match="Save it as a diffusers folder instead"):
        to_original_layout(parts)  # type: ignore[arg-type]
