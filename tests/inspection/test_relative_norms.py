"""Norms relative to the weights of the base model, wherever those are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cntlora_core.inspection.inspect import inspect_lora
from cntlora_core.lora_file.writing import write_lora_file

from .conftest import bert, layer_of


def test_norms_against_a_transformers_base(tmp_path: Path):
    model = bert(r=2)
    model.save_pretrained(str(tmp_path / "lora"))
    base = model.unload()
    base.bert.save_pretrained(str(tmp_path / "inner"))  # without the outer model's "bert."
    base.save_pretrained(str(tmp_path / "base"))
    expected = base.bert.encoder.layer[0].attention.self.query.weight.norm()
    for folder in ("base", "inner"):
        found = inspect_lora(tmp_path / "lora", model=tmp_path / folder)
        first = found.layers[0]
        assert first.name.endswith("0.attention.self.query")
        assert first.relative_norm == pytest.approx(first.norm / float(expected), rel=1e-5)
        (part,) = found.parts
        squares = sum((layer.norm / (layer.relative_norm or 0)) ** 2 for layer in found.layers)
        assert part.relative_norm == pytest.approx(part.norm / squares**0.5, rel=1e-6)
    other = {"bert.encoder.layer.0.attention.self.query.weight": torch.ones(3, 3)}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"not the base of this LoRA.*\(3, 3\)"):
        inspect_lora(tmp_path / "lora", model=tmp_path / "other.safetensors")
    save_file({"x.weight": torch.ones(3)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="not the base of this LoRA"):
        inspect_lora(tmp_path / "lora", model=tmp_path / "none.safetensors")


def test_norms_against_stable_diffusion_in_both_layouts(tmp_path: Path, tiny_model: Path):
    torch.manual_seed(3)
    names = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
        ),
        "text_encoder.encoder.layers.1.self_attn.q_proj": (
            "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight"
        ),
    }
    layers = {name: layer_of((2, 32), (32, 2)) for name in names}
    write_lora_file(tmp_path / "l.safetensors", layers)
    weights = {name: torch.randn(32, 32) for name in names}
    save_file({names[n]: w for n, w in weights.items()}, tmp_path / "single.safetensors")
    found = inspect_lora(tmp_path / "l.safetensors", model=tmp_path / "single.safetensors")
    for layer in found.layers:
        expected = layer.norm / float(weights[layer.name].norm())
        assert layer.relative_norm == pytest.approx(expected, rel=1e-5)
    found = inspect_lora(tmp_path / "l.safetensors", model=tiny_model)
    for layer in found.layers:
        component, _, path = layer.name.partition(".")
        (file,) = (tiny_model / component).glob("*.safetensors")
        stored = load_file(file)
        weight = next(t for key, t in stored.items() if key.endswith(f"{path}.weight"))
        assert layer.relative_norm == pytest.approx(layer.norm / float(weight.norm()), rel=1e-5)
