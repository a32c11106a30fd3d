"""Choosing the model that is taught."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from .conftest import Pack


def test_a_replaced_checkpoint_changes_the_fingerprint(
    pack: Pack, comfy: Path, tiny_model: Path
) -> None:
    copy = comfy / "models" / "diffusers" / "copy"
    shutil.copytree(tiny_model, copy)
    fingerprint = pack.nodes["CNTLoRALoadModel"].fingerprint_inputs
    tiny = fingerprint("diffusers/tiny", "float32")
    assert fingerprint("diffusers/copy", "float32") == tiny
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text("utf-8") + "\n", "utf-8")
    assert fingerprint("diffusers/copy", "float32") != tiny
    assert fingerprint("diffusers/tiny", "bfloat16") != tiny


def test_the_small_model_is_among_the_checkpoints(pack: Pack) -> None:
    widgets = pack.module("widgets")
    assert widgets.SMALL_MODEL in widgets.model_names()
    assert pack.nodes["CNTLoRALoadModel"].validate_inputs(widgets.SMALL_MODEL) is True


def test_the_small_model_is_refused_for_ksampler_in_words(pack: Pack) -> None:
    small = pack.module("widgets").SMALL_MODEL
    model = pack.run("CNTLoRALoadModel", checkpoint=small).args[0]
    with pytest.raises(ValueError, match=r"generate images with Generate Images"):
        pack.run("CNTLoRAOpenModel", model=model)


def test_a_folder_s_text_encoder_has_the_names_that_comfyui_looks_for(
    pack: Pack, comfy: Path, tmp_path: Path
) -> None:
    """ComfyUI leaves a text encoder of other names at random weights, with a line in the log."""
    found = pack.module("load")._text_weights(comfy / "models/diffusers/tiny", "text_encoder")
    assert "text_model.final_layer_norm.weight" in found
    part = tmp_path / "text_encoder_2"
    part.mkdir()
    (part / "config.json").write_text("{}")
    save_file(
        {"text_projection.weight": torch.ones(2), "text_model.x": torch.zeros(2)},
        part / "model.safetensors",
    )
    names = pack.module("load")._text_weights(tmp_path, part.name).keys()
    assert names == {"text_projection.weight", "text_model.x"}


def test_a_wrong_checkpoint_is_said_when_it_is_queued(pack: Pack, comfy: Path) -> None:
    path = comfy / "models" / "checkpoints" / "sd2.safetensors"
    save_file({"cond_stage_model.model.x": torch.zeros(1)}, path)
    validate = pack.nodes["CNTLoRALoadModel"].validate_inputs
    assert "Stable Diffusion 2.x" in validate("sd2.safetensors")
    assert "no checkpoint" in validate("../../etc/passwd")
