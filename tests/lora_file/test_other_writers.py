"""LoRA files that other tools wrote: their names, and where they keep alphas."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from cntlora_core.lora_file.families import SD15_FILES
from cntlora_core.lora_file.names import canonical_name, kohya_name
from cntlora_core.lora_file.writing import LoRALayer, read_lora_file, write_lora_file

from .conftest import (
    ATTENTION,
    PATH,
    TEXT_ATTENTION,
    TEXT_PATTERNS,
    UNET_PATTERNS,
    adapted,
    assert_same_layers,
    collect,
    without_text_model,
)


def test_kohya_names_come_back_for_every_module(base) -> None:
    """The grammar without a table of names, on every linear and convolution of both models."""
    for model, prefix in zip(base, ("unet", "text_encoder")):
        names = [
            f"{prefix}.{path}"
            for path, module in without_text_model(model.named_modules()).items()
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
        ]
        assert len(names) > 60
        assert [canonical_name(kohya_name(name, SD15_FILES)) for name in names] == names
    te1 = "lora_te1_text_model_encoder_layers_3_mlp_fc1"
    assert canonical_name(te1) == "text_encoder.encoder.layers.3.mlp.fc1"
    assert canonical_name("lora_unet_double_blocks_0_img_attn_qkv") is None
    assert canonical_name("lora_te_layers_0_q_proj") is None
    assert canonical_name("lora_unet_down_blocks_0__attn1") is None


TEXT_PATH = "encoder.layers.0.self_attn"


@pytest.mark.parametrize(
    ("module", "down", "up", "name"),
    [
        (f"unet.{PATH}.processor.to_q_lora", "down", "up", f"unet.{PATH}.to_q"),
        (f"unet.{PATH}.processor.to_out_lora", "down", "up", f"unet.{PATH}.to_out.0"),
        (f"{PATH}.processor.to_out_lora", "down", "up", f"unet.{PATH}.to_out.0"),
        (f"unet.{PATH}.to_out.0.lora", "down", "up", f"unet.{PATH}.to_out.0"),
        (f"unet.{PATH}.to_q", "lora_A", "lora_B", f"unet.{PATH}.to_q"),
        (f"unet.base_model.model.{PATH}.to_q", "lora_A", "lora_B", f"unet.{PATH}.to_q"),
        (
            f"text_encoder.text_model.{TEXT_PATH}.to_out_lora",
            *("down", "up", f"text_encoder.{TEXT_PATH}.out_proj"),
        ),
        (
            f"text_encoder.text_model.{TEXT_PATH}.q_proj.lora_linear_layer",
            *("down", "up", f"text_encoder.{TEXT_PATH}.q_proj"),
        ),
        (
            f"text_encoder.{TEXT_PATH}.q_proj",
            *("lora_A", "lora_B", f"text_encoder.{TEXT_PATH}.q_proj"),
        ),
        (f"lora_te1_text_model_{TEXT_PATH.replace('.', '_')}_q_proj", "lora_down", "lora_up",
         f"text_encoder.{TEXT_PATH}.q_proj"),
    ],
)  # fmt: skip
def test_spellings_of_other_writers(
    tmp_path: Path, module: str, down: str, up: str, name: str
) -> None:
    a, b = torch.randn(2, 3), torch.randn(5, 2)
    path = tmp_path / "other.safetensors"
    save_file({f"{module}.{down}.weight": a, f"{module}.{up}.weight": b}, path)
    found = read_lora_file(path)
    assert list(found.layers) == [name]
    layer = found.layers[name]
    assert torch.equal(layer.down, a)
    assert torch.equal(layer.up, b)
    assert layer.alpha == 2.0  # none given: alpha = rank


def test_reads_what_diffusers_saves(base, tmp_path: Path) -> None:
    """Its own writer keeps alphas in the header, as patterns."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    unet, text_encoder = copy.deepcopy(base)
    for model, targets, patterns in (
        (unet, ATTENTION, UNET_PATTERNS),
        (text_encoder, TEXT_ATTENTION, TEXT_PATTERNS),
    ):
        model.add_adapter(
            LoraConfig(
                r=4, lora_alpha=6, init_lora_weights=False, target_modules=targets, **patterns
            ),
            "default",
        )
    expected = collect((unet, text_encoder))
    unet_layers, text_layers = (
        get_peft_model_state_dict(model, adapter_name="default") for model in (unet, text_encoder)
    )
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=unet_layers,  # pyright: ignore[reportArgumentType]
        text_encoder_lora_layers=text_layers,  # pyright: ignore[reportArgumentType]
        **_collate_lora_metadata({"unet": unet, "text_encoder": text_encoder}),
    )
    found = read_lora_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert found.layout == "diffusers"
    assert_same_layers(found.layers, expected)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_reads_what_peft_saves(base, tmp_path: Path, use_rslora: bool) -> None:
    models = adapted(base, use_rslora=use_rslora)
    expected = collect(models)
    for model, part in zip(models, ("unet", "text_encoder")):
        model.save_pretrained(str(tmp_path / part))
    found = read_lora_file(tmp_path)
    assert found.layout == "peft"
    assert found.layers.keys() == expected.keys()
    for name, layer in expected.items():
        assert found.layers[name].alpha == pytest.approx(layer.alpha, rel=1e-9), name
        assert torch.equal(found.layers[name].up, layer.up)
    single = read_lora_file(tmp_path / "unet" / "adapter_model.safetensors")
    assert single.layers.keys() == {name for name in expected if name.startswith("unet.")}


def test_table_of_module_names_settles_foreign_names(tmp_path: Path) -> None:
    name = "unet.down_blocks.0.my_own_attention.to_q"
    path = tmp_path / "lora.safetensors"
    write_lora_file(path, {name: LoRALayer(torch.ones(2, 3), torch.ones(5, 2), 1.0)})
    assert read_lora_file(path).layers.keys() == {"unet.down_blocks.0.my.own.attention.to_q"}
    assert read_lora_file(path, module_names=[name]).layers.keys() == {name}
