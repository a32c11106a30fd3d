"""Single files: the same model as in diffusers, whatever a file carries or lacks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from cntlora_core.diffusion.checkpoint import CheckpointError
from cntlora_core.diffusion.family import SD15
from cntlora_core.diffusion.pipeline import StableDiffusionParts, load_stable_diffusion
from cntlora_core.diffusion.single_file import save_single_file, to_original_layout

from .conftest import assert_same, load_narrow


def test_single_file_loads_in_diffusers_bit_for_bit(
    made: StableDiffusionParts, single: Path, narrow: Path
) -> None:
    """The oracle: diffusers' own converter reads what our key map wrote."""
    stock = StableDiffusionPipeline.from_single_file(
        str(single), config=str(narrow), local_files_only=True, safety_checker=None
    )
    assert_same(made, stock)


def test_single_file_round_trip(made: StableDiffusionParts, single: Path, narrow: Path) -> None:
    loaded = load_narrow(single, narrow)
    assert_same(made, loaded)
    for part in SD15.parts:
        model = getattr(loaded, part)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_single_file_has_the_names_and_shapes_of_sd15(made: StableDiffusionParts) -> None:
    tensors = to_original_layout(made)
    assert len(tensors) == 686 + 248 + len(made.text_encoder.state_dict())
    assert tensors["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
    for name in (
        "model.diffusion_model.time_embed.2.bias",
        "model.diffusion_model.input_blocks.11.0.out_layers.3.weight",
        "model.diffusion_model.input_blocks.9.0.op.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.8.2.conv.weight",
        "model.diffusion_model.output_blocks.11.1.proj_out.weight",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.decoder.norm_out.weight",
        "first_stage_model.post_quant_conv.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.k_proj.bias",
    ):
        assert name in tensors


def test_single_file_with_what_real_ones_carry(
    made: StableDiffusionParts, single: Path, narrow: Path, tmp_path: Path
) -> None:
    tensors = load_file(single)
    for name in [name for name in tensors if name.startswith("model.diffusion_model.out.")]:
        tensors["model_ema." + name[len("model.") :].replace(".", "")] = tensors[name] + 1
    tensors["alphas_cumprod"] = torch.rand(1000)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[
        None
    ]
    save_file(tensors, tmp_path / "extra.safetensors")
    assert_same(made, load_narrow(tmp_path / "extra.safetensors", narrow))


def test_single_file_without_the_text_model_level_and_with_vae_matrices(
    made: StableDiffusionParts, single: Path, narrow: Path, tmp_path: Path
) -> None:
    tensors = {
        name.replace(".transformer.text_model.", ".transformer."): (
            tensor.flatten(1) if "attn_1" in name and tensor.ndim == 4 else tensor
        )
        for name, tensor in load_file(single).items()
    }
    save_file(tensors, tmp_path / "other.safetensors")
    assert_same(made, load_narrow(tmp_path / "other.safetensors", narrow))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_is_cast_on_load(
    single: Path, narrow: Path, tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in load_file(single).items()}
    save_file(tensors, tmp_path / "cast.safetensors")
    loaded = load_narrow(tmp_path / "cast.safetensors", narrow, dtype=wanted)
    for part in SD15.parts:
        expected = torch.float32 if part == "vae" else wanted
        assert {p.dtype for p in getattr(loaded, part).parameters()} == {expected}
    assert {m.dtype for m in loaded.pipeline().components.values() if hasattr(m, "dtype")} == {
        wanted
    }
    weight = tensors["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(loaded.unet.conv_in.weight, weight.to(wanted))


def test_weights_do_not_change_with_the_file(
    made: StableDiffusionParts, single: Path, narrow: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    shutil.copy(single, copy)
    loaded = load_narrow(copy, narrow)
    with copy.open("r+b") as stream:
        stream.seek(copy.stat().st_size // 2)
        stream.write(bytes(copy.stat().st_size // 2))
    assert_same(made, loaded)


def test_a_missing_weight_is_named(single: Path, narrow: Path, tmp_path: Path) -> None:
    tensors = load_file(single)
    del tensors["model.diffusion_model.out.2.weight"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 of 686 weights are missing, as .*\.out\.2\.weight"
    ):
        load_narrow(tmp_path / "less.safetensors", narrow)


def test_another_width_than_sd15s_is_refused(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has shape .* expected .* built differently"):
        load_stable_diffusion(single)


def test_saving_honours_the_umask_and_leaves_nothing_behind(
    made: StableDiffusionParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "model.safetensors"
    save_single_file(made, path)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cntlora_core.diffusion.single_file.save_file", full_disk)
    with pytest.raises(OSError, match="the disk is full"):
        save_single_file(made, path)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_planted_under_a_guessed_temporary_name_is_not_written_through(
    single: Path, narrow: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    path = tmp_path / "shared" / "model.safetensors"
    path.parent.mkdir()
    for guess in (f".model.safetensors.{os.getpid()}.part", "model.safetensors"):
        (path.parent / guess).symlink_to(precious)
    save_single_file(load_narrow(single, narrow), path)
    assert precious.read_text() == "mine"
    assert not path.is_symlink()
    assert path.stat().st_size > 1000


@pytest.mark.thorough
def test_fingerprint_follows_the_weights_not_the_place(
    single: Path, narrow: Path, tmp_path: Path
) -> None:
    first = load_narrow(single, narrow).fingerprint
    assert len(first) == 16
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copyfile(single, moved)
    assert load_narrow(moved, narrow).fingerprint == first
    tensors = load_file(single)
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, moved, {"format": "pt", "modelspec.title": "narrow"})
    assert load_narrow(moved, narrow).fingerprint != first
