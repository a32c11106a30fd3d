"""LoRA files, read back by our own reader: every layout, precision, alpha and kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cntlora_core.lora_file.families import SD15_FILES
from cntlora_core.lora_file.names import kohya_name
from cntlora_core.lora_file.writing import (
    Layout,
    LoRALayer,
    read_lora_file,
    relative_error,
    write_lora_file,
)

from .conftest import EVERYTHING, adapted, assert_same_layers, collect


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_round_trip(base, tmp_path: Path, layout: Layout) -> None:
    layers = collect(adapted(base, EVERYTHING))
    metadata = {"modelspec.title": "a dog", "cntlora.method": "cntlora-cross"}
    path = tmp_path / ("adapter" if layout == "peft" else "a dog.safetensors")
    written = write_lora_file(path, layers, layout=layout, metadata=metadata)
    found = read_lora_file(written)
    assert found.layout == layout
    assert found.unknown_keys == ()
    assert metadata.items() <= found.metadata.items()
    # kohya and diffusers files hold one alpha (or none): a rounding is left in the up factor.
    assert_same_layers(found.layers, layers, 0.0 if layout == "peft" else 1e-6)
    again = write_lora_file(
        tmp_path / f"again{path.suffix}", found.layers, layout=layout, metadata=found.metadata
    )
    twice = read_lora_file(again)
    assert_same_layers(twice.layers, found.layers)
    assert twice.metadata == found.metadata


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_round_trip_is_exact_where_alphas_agree(base, tmp_path: Path, layout: Layout) -> None:
    models = adapted(base, rank_pattern={}, alpha_pattern={}, lora_alpha=8)
    layers = collect(models)
    path = write_lora_file(tmp_path / "lora", layers, layout=layout)
    assert_same_layers(read_lora_file(path).layers, layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(base, tmp_path: Path, dtype: torch.dtype) -> None:
    layers = collect(adapted(base))
    path = write_lora_file(tmp_path / "lora.safetensors", layers, dtype=dtype)
    stored = load_file(path)
    assert {t.dtype for k, t in stored.items() if not k.endswith("alpha")} == {dtype}
    assert_same_layers(read_lora_file(path).layers, layers, 1e-2)


def test_kohya_file_has_one_alpha_for_every_layer(base, tmp_path: Path) -> None:
    """diffusers up to 0.42 mis-scales kohya files whose alphas differ, without an error."""
    layers = collect(adapted(base))
    assert len({layer.alpha for layer in layers.values()}) > 2
    tensors = load_file(write_lora_file(tmp_path / "lora.safetensors", layers))
    names = {key.split(".")[0] for key in tensors}
    assert names == {kohya_name(name, SD15_FILES) for name in layers}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0" in names
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in names
    alphas = [tensors[f"{name}.alpha"] for name in names]
    assert {(alpha.ndim, float(alpha)) for alpha in alphas} == {(0, 6.0)}
    downs = [tensors[f"{name}.lora_down.weight"] for name in names]
    assert {down.shape[0] for down in downs} == {2, 3, 4, 5}


def test_layer_switched_off_by_alpha_zero_stays_off(tmp_path: Path) -> None:
    """kohya's readers take alpha 0 for alpha = rank."""
    names = "unet.conv_in", "unet.conv_out"
    off, on = (LoRALayer(torch.ones(2, 3), torch.ones(5, 2), alpha) for alpha in (0.0, 4.0))
    for layout in ("kohya", "diffusers"):
        path = write_lora_file(
            tmp_path / "lora.safetensors", dict(zip(names, (off, on))), layout=layout
        )
        tensors = load_file(path)
        assert all(float(t) == 4.0 for key, t in tensors.items() if key.endswith(".alpha"))
        layers = read_lora_file(path).layers
        assert not layers[names[0]].delta().any()
        assert torch.equal(layers[names[1]].delta(), on.delta())


def test_middle_kernel_in_each_layout(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = LoRALayer(
        torch.randn(2, 3, 1, 1, generator=generator),
        torch.randn(4, 2, 1, 1, generator=generator),
        5.0,
        torch.randn(2, 2, 3, 3, generator=generator),
    )
    layers = {"unet.mid_block.resnets.0.conv1": layer}
    kohya = read_lora_file(write_lora_file(tmp_path / "lora.safetensors", layers)).layers
    assert_same_layers(kohya, layers)
    for layout in ("diffusers", "peft"):
        found = read_lora_file(write_lora_file(tmp_path / layout, layers, layout=layout)).layers
        (other,) = found.values()
        assert other.mid is None
        assert other.down.shape == (2, 3, 3, 3)
        assert relative_error(other, layer) < 1e-6
