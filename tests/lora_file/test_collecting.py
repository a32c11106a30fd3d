"""The factors of a model's adapter, under canonical names."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from cntlora_core.lora_file.writing import collect_adapter

from .conftest import EVERYTHING, adapted, collect, error, without_text_model


def test_collects_every_layer_under_canonical_names(base) -> None:
    layers = collect(adapted(base))
    assert len(layers) == 128 + 48
    first = layers["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"]
    assert (first.rank, first.alpha) == (4, 6.0)
    cross = layers["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert (cross.rank, cross.alpha) == (2, 7.0)
    text = layers["text_encoder.encoder.layers.1.self_attn.q_proj"]
    assert (text.rank, text.alpha) == (3, 5.0)
    assert layers["text_encoder.encoder.layers.11.self_attn.q_proj"].alpha == 2.0
    assert layers["text_encoder.encoder.layers.10.self_attn.q_proj"].alpha == 6.0


def test_collected_deltas_are_those_that_peft_merges(base) -> None:
    unet, text_encoder = adapted(base, EVERYTHING)
    layers = collect((unet, text_encoder))
    for model, before, prefix in (
        (unet, base[0], "unet"),
        (text_encoder, base[1], "text_encoder"),
    ):
        merged = without_text_model(copy.deepcopy(model).merge_and_unload().state_dict().items())
        weights = without_text_model(before.state_dict().items())
        names = [name for name in layers if name.startswith(f"{prefix}.")]
        assert len(names) > 48
        for name in names:
            key = f"{name.removeprefix(f'{prefix}.')}.weight"
            assert error(layers[name].delta(), merged[key] - weights[key]) < 1e-4, name


def test_collected_factors_are_copies(base) -> None:
    unet, _ = adapted(base)
    before = collect_adapter(unet)
    kept = {name: layer.up.clone() for name, layer in before.items()}
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert all(torch.equal(before[name].up, up) and up.any() for name, up in kept.items())


def test_collects_from_an_injected_module_and_reads_rslora_from_the_layer(base) -> None:
    unet = copy.deepcopy(base[0])
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q"])
    inject_adapter_in_model(config, unet, "subject")
    layers = collect_adapter(unet, "subject")
    assert len(layers) == 32
    assert {layer.alpha for layer in layers.values()} == {12.0}  # 6 / sqrt(4) * 4
    with pytest.raises(ValueError, match=r"no adapter named 'default'.*subject"):
        collect_adapter(unet)


def test_collects_text_encoder_with_the_old_prefix(base) -> None:
    """transformers before version 5 kept the encoder one level deeper."""
    holder = nn.Module()
    holder.text_model = getattr(copy.deepcopy(base[1]), "text_model", copy.deepcopy(base[1]))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), holder)
    names = collect_adapter(holder, prefix="text_encoder").keys()
    assert "text_encoder.encoder.layers.0.self_attn.q_proj" in names
    assert len(names) == 12


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True, "target_modules": ["to_out.0"]}, "bias"),
    ],
)
def test_refuses_adapters_that_are_more_than_lora(base, config: dict, says: str) -> None:
    settings = {"r": 2, "target_modules": ["to_q"], **config}
    unet = get_peft_model(copy.deepcopy(base[0]), LoraConfig(**settings))
    with pytest.raises(ValueError, match=rf"transformer_blocks.*{says}"):
        collect_adapter(unet)


def test_refuses_adapted_embedding_and_model_without_adapter(base) -> None:
    text_encoder = get_peft_model(
        copy.deepcopy(base[1]), LoraConfig(r=2, target_modules=["token_embedding"])
    )
    with pytest.raises(ValueError, match="embedding"):
        collect_adapter(text_encoder, prefix="text_encoder")
    with pytest.raises(ValueError, match="no LoRA layer at all"):
        collect_adapter(base[0])
