"""Numbers of LoRA files that other tools wrote, against dense singular values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from cntlora_core.inspection.inspect import LoRAInspection, inspect_lora
from cntlora_core.lora_file.algebra import LoRALayer, singular_values
from cntlora_core.lora_file.writing import collect_adapter, write_lora_file

from .conftest import bert, layer_of, randomise


def check(inspection: LoRAInspection, deltas: dict[str, Tensor]) -> None:
    """Every number of every layer, and the sums, against dense deltas."""
    assert {layer.name for layer in inspection.layers} == set(deltas)
    for layer in inspection.layers:
        dense = deltas[layer.name].detach().double().flatten(1)
        values = torch.linalg.svdvals(dense)[: layer.rank]
        torch.testing.assert_close(
            torch.tensor(layer.singular_values, dtype=torch.float64),
            values[: len(layer.singular_values)],
            rtol=1e-5,
            atol=1e-6 * float(values[0]),
        )
        energies = values.square() / values.square().sum()
        quarter, half = -(-layer.rank // 4), -(-layer.rank // 2)
        assert layer.norm == pytest.approx(float(dense.norm()), rel=1e-5)
        assert layer.stable_rank == pytest.approx(1 / float(energies[0]), rel=1e-4)
        assert layer.energy_quarter == pytest.approx(float(energies[:quarter].sum()), rel=1e-4)
        assert layer.energy_half == pytest.approx(float(energies[:half].sum()), rel=1e-4)
        assert layer.finite
    assert {layer.part for layer in inspection.layers} == {p.part for p in inspection.parts}
    for part in inspection.parts:
        names = [layer.name for layer in inspection.layers if layer.part == part.part]
        joined = torch.cat([deltas[name].detach().flatten() for name in names])
        assert part.points == len(names)
        assert part.norm == pytest.approx(float(joined.double().norm()), rel=1e-5)
        largest = max(float(torch.linalg.svdvals(deltas[n].detach().flatten(1))[0]) for n in names)
        assert part.largest_value[0] == pytest.approx(largest, rel=1e-4)


def peft_deltas(model: Any) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def unet_deltas(unet: Any) -> dict[str, Tensor]:
    return {f"unet.{name}": delta for name, delta in peft_deltas(unet).items()}


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_peft_saved(tmp_path: Path, as_file: bool, use_rslora: bool):
    model = bert(
        r=4, lora_alpha=6, rank_pattern={"query": 2}, alpha_pattern={r"layer\.1\..*value": 9},
        use_rslora=use_rslora, modules_to_save=["classifier"],
    )  # fmt: skip
    model.save_pretrained(str(tmp_path))
    found = inspect_lora(tmp_path / "adapter_model.safetensors" if as_file else tmp_path)
    check(found, peft_deltas(model))
    assert found.layout == "peft"
    assert found.settings["r"] == 4
    assert any("no part of a LoRA" in note and "classifier" in note for note in found.notes)


def test_transposed_weights_and_embeddings_of_peft(tmp_path: Path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    config = LoraConfig(r=2, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    model = randomise(get_peft_model(base, config))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    check(inspect_lora(tmp_path), peft_deltas(model))


def test_what_diffusers_saved(tmp_path: Path, adapted_unet: Any):
    StableDiffusionPipeline.save_lora_weights(
        str(tmp_path),
        unet_lora_layers=get_peft_model_state_dict(adapted_unet),  # pyright: ignore
        unet_lora_adapter_metadata=adapted_unet.peft_config["default"].to_dict(),
    )
    found = inspect_lora(tmp_path)  # a folder with one LoRA
    check(found, unet_deltas(adapted_unet))
    assert found.layout == "diffusers"
    assert [part.part for part in found.parts] == ["UNet"]
    assert {layer.kind for layer in found.layers} == {"linear", "conv 3x3"}


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_what_we_wrote(tmp_path: Path, adapted_unet: Any, layout: Any):
    path = tmp_path / ("lora" if layout == "peft" else "lora.safetensors")
    write_lora_file(path, collect_adapter(adapted_unet), layout=layout)
    found = inspect_lora(path)
    check(found, unet_deltas(adapted_unet))
    assert found.layout == layout


def test_locon_with_a_middle_kernel_and_dora_magnitudes(tmp_path: Path):
    torch.manual_seed(1)
    name, te = "lora_unet_mid_block_resnets_0_conv1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    down, up, mid = torch.randn(2, 5, 1, 1), torch.randn(6, 2, 1, 1), torch.randn(2, 2, 3, 3)
    linear_down, linear_up = torch.randn(3, 4), torch.randn(7, 3)
    save_file(
        {
            f"{name}.lora_down.weight": down.half(),
            f"{name}.lora_up.weight": up.half(),
            f"{name}.lora_mid.weight": mid.half(),
            f"{name}.alpha": torch.tensor(1.0),
            f"{te}.lora_down.weight": linear_down,
            f"{te}.lora_up.weight": linear_up,
            f"{te}.dora_scale": torch.ones(7, 1),
        },
        tmp_path / "l.safetensors",
        {"ss_base_model_version": "sd_v1", "ss_network_module": "lycoris.kohya"},
    )
    found = inspect_lora(tmp_path / "l.safetensors")
    conv = torch.einsum(
        "or,rshw,si->oihw", up.half().float()[..., 0, 0], mid.half().float(),
        down.half().float()[..., 0, 0],
    )  # fmt: skip
    deltas = {
        "unet.mid_block.resnets.0.conv1": 0.5 * conv,
        "text_encoder.encoder.layers.0.mlp.fc1": linear_up @ linear_down,
    }
    check(found, deltas)
    assert any("DoRA" in note and "dora_scale" in note for note in found.notes)
    assert found.base_model == "sd_v1"
    assert found.method == "lycoris.kohya"


def test_a_lora_for_another_model_keeps_its_names(tmp_path: Path):
    torch.manual_seed(2)
    stems = [
        "lora_unet_double_blocks_4_img_attn2_to_k",
        "lora_te3_encoder_block_3_layer_0_SelfAttention_q",
        "transformer.blocks.7.attn.to_v",
    ]
    layers = {stem: layer_of((2, 2048), (8, 2), alpha=2.0) for stem in stems}
    tensors = {}
    for stem, layer in layers.items():
        tensors |= {f"{stem}.lora_down.weight": layer.down, f"{stem}.lora_up.weight": layer.up}
    save_file(tensors, tmp_path / "xl.safetensors")
    found = inspect_lora(tmp_path / "xl.safetensors")
    check(found, {stem: layer.delta() for stem, layer in layers.items()})
    parts = {layer.name: layer.part for layer in found.layers}
    assert [parts[stem] for stem in stems] == ["UNet", "text encoder 3", "transformer.blocks"]
    assert found.base_model is not None
    assert found.base_model.startswith("SDXL")


@settings(max_examples=15, deadline=None)
@given(
    out=st.integers(1, 9), width=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_singular_values_of_any_shape(out: int, width: int, rank: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, width, generator=generator)
    layer = LoRALayer(down, torch.randn(out, rank, generator=generator), -1.5)
    dense = torch.linalg.svdvals(layer.delta().double())
    found = singular_values(layer)
    assert len(found) == min(out, width, rank)
    torch.testing.assert_close(found, dense[: len(found)], rtol=1e-4, atol=1e-5)


def test_a_wide_layer_is_never_made_dense(tmp_path: Path):
    wide = 300_000  # the delta would take 360 GB
    tensors = {
        "base_model.model.head.lora_A.weight": torch.randn(1, wide),
        "base_model.model.head.lora_B.weight": torch.randn(wide, 1),
    }
    save_file(tensors, tmp_path / "wide.safetensors")
    (layer,) = inspect_lora(tmp_path / "wide.safetensors").layers
    assert layer.norm == pytest.approx(float(tensors["base_model.model.head.lora_A.weight"].norm())
        * float(tensors["base_model.model.head.lora_B.weight"].norm()), rel=1e-4)  # fmt: skip
    assert layer.stable_rank == pytest.approx(1.0)
