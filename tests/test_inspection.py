"""Numbers of LoRA files that other tools wrote, against dense singular values; errors in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from cntlora_core.cli import main
from cntlora_core.inspection import LoRAInspection, inspect_lora
from cntlora_core.lora_algebra import LoRALayer, singular_values
from cntlora_core.lora_file import collect_adapter, write_lora_file
from cntlora_core.plots import lines_by_depth


def layer_of(down: tuple[int, ...], up: tuple[int, ...], alpha: float = 3.0) -> LoRALayer:
    return LoRALayer(torch.randn(down), torch.randn(up), alpha)


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


def randomise(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def bert(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    base = BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=8,
        )
    )
    targets = config.pop("target_modules", ["query", "value", "intermediate.dense"])
    return randomise(get_peft_model(base, LoraConfig(target_modules=targets, **config)))


def peft_deltas(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.fixture(scope="module")
def adapted_unet() -> Any:
    """A small UNet of SD1.5's make with an adapter on attention and convolutions."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["to_q", "to_k", "to_out.0", "conv1"],
        rank_pattern={r".*attn2\.to_k": 2},
        alpha_pattern={r".*attn2\.to_k": 7},
    )
    unet.add_adapter(config)
    return randomise(unet)


def unet_deltas(unet: nn.Module) -> dict[str, Tensor]:
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
        unet_lora_layers=get_peft_model_state_dict(adapted_unet),
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
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "lora_te2_text_model_encoder_layers_3_self_attn_q_proj",
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
    assert [parts[stem] for stem in stems] == ["UNet", "text encoder 2", "transformer.blocks"]
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


def lycoris(kind: str) -> dict[str, Tensor]:
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    keys = {
        "LoHa": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
        "LoKr": ["lokr_w1", "lokr_w2"],
    }[kind]
    return {f"{stem}.alpha": torch.tensor(1.0)} | {f"{stem}.{k}": torch.ones(2, 2) for k in keys}


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_other_methods_are_named(tmp_path: Path, kind: str):
    save_file(lycoris(kind), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"not a LoRA but {kind}"):
        inspect_lora(tmp_path / "x.safetensors")


def test_wrong_files_are_refused_in_words(tmp_path: Path, adapted_unet: Any):
    def refused(path: Path, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            inspect_lora(path)

    with pytest.raises(FileNotFoundError, match="no LoRA and no run"):
        inspect_lora(tmp_path / "absent.safetensors")
    torch.save({"x": torch.ones(2)}, tmp_path / "pickle.safetensors")
    refused(tmp_path / "pickle.safetensors", "is a pickle")
    whole = write_lora_file(tmp_path / "whole.safetensors", collect_adapter(adapted_unet))
    content = whole.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "cut.safetensors", "cut off or damaged")
    save_file({"conv_in.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "not a LoRA: none of its tensors")
    (tmp_path / "vera").mkdir()
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 2),
        "base_model.model.x.lora_B.weight": torch.ones(2, 1)},
        tmp_path / "vera" / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "vera" / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA"}))
    refused(tmp_path / "vera", "type VERA")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.safetensors").write_bytes(b"")
    refused(tmp_path / "run", "not finished.*--resume")
    shutil.copy(whole, tmp_path / "run" / "a.safetensors")
    (tmp_path / "run" / "state.safetensors").unlink()
    shutil.copy(whole, tmp_path / "run" / "b.safetensors")
    refused(tmp_path / "run", "several files")


def test_half_a_layer_and_values_that_are_not_finite_are_noted(tmp_path: Path):
    stem = "base_model.model.layers.{}.q_proj.lora_{}.weight"
    save_file(
        {
            stem.format(0, "A"): torch.ones(1, 3),
            stem.format(0, "B"): torch.full((4, 1), float("nan")),
            stem.format(1, "A"): torch.ones(1, 3),
            stem.format(2, "A"): torch.ones(1, 3),
            stem.format(2, "B"): torch.zeros(4, 1),
        },
        tmp_path / "x.safetensors",
    )
    found = inspect_lora(tmp_path / "x.safetensors")
    said = " ".join(found.notes)
    assert "layers.1.q_proj has no up factor" in said
    assert "not finite, as layers.0.q_proj" in said
    assert "adapter_config.json" in said
    assert [layer.finite for layer in found.layers] == [False, True]
    assert found.layers[1].norm == 0.0
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_command_prints_draws_and_leaves_other_files_alone(
    tmp_path: Path, adapted_unet: Any, capsys: pytest.CaptureFixture[str]
):
    file = write_lora_file(tmp_path / "my dog.safetensors", collect_adapter(adapted_unet))
    (tmp_path / "ranks.png").write_text("mine")
    assert main(["inspect", str(file)]) == 0
    printed = capsys.readouterr().out
    for text in ("kohya", "down_blocks.0.attentions.0", "stable rank", "attachment points"):
        assert text in printed
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == [
        "my dog.inspect-ranks.png",
        "my dog.inspect-spectra.png",
        "ranks.png",
    ]
    assert (tmp_path / "ranks.png").read_text() == "mine"
    assert main(["inspect", str(file), "--json", "--output", str(tmp_path / "new folder")]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["layout"] == "kohya"
    assert described["layers"][0]["singular_values"]
    assert all(Path(p).parent.name == "new folder" and Path(p).stat().st_size > 1000
        for p in described["pictures"])  # fmt: skip
    assert main(["inspect", str(tmp_path / "ranks.png")]) == 1
    assert "no safetensors file" in capsys.readouterr().err


def test_a_run_of_train(tiny_model: Path, photo_folder: Path, tmp_path: Path, capsys: Any):
    from cntlora_core.diffusion import (
        AdapterSettings,
        JobSettings,
        OutputSettings,
        PriorSettings,
        SubjectSettings,
        TrainingSettings,
        personalise,
    )

    result = personalise(
        JobSettings(
            model=str(tiny_model),
            subject=SubjectSettings(images=str(photo_folder), token="sks", class_name="dog"),
            output=OutputSettings(output=str(tmp_path / "run")),
            prior=PriorSettings(prior_weight=0.0, cache=str(tmp_path / "cache")),
            adapter=AdapterSettings(rank=4, alpha=8),
            training=TrainingSettings(steps=1, device="cpu"),
        )
    )
    before = (tmp_path / "run" / "ranks.png").read_bytes()
    found = inspect_lora(tmp_path / "run")
    assert found.path == result.lora
    assert found.ranks == result.export.trained_ranks
    assert {layer.name: layer.rank for layer in found.layers} == result.export.ranks
    assert found.method == "cross"
    assert found.run is not None
    assert found.run["steps"] == 1
    assert inspect_lora(result.lora).run == found.run
    assert main(["inspect", str(tmp_path / "run"), "--model", str(tiny_model)]) == 0
    assert "trained ranks" in capsys.readouterr().out
    assert (tmp_path / "run" / "ranks.png").read_bytes() == before
    assert len(list((tmp_path / "run").glob("*.inspect-*.png"))) == 2


def test_lines_of_the_rank_picture():
    names = [
        "lora_te2_text_model_encoder_layers_10_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_2_self_attn_q_proj",
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "unet.down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k",
        "model.layers.1.mlp.up_proj",
    ]
    assert lines_by_depth({name: i for i, name in enumerate(names)}) == {
        "te2.text_model_encoder_layers.self_attn": {"q": [1, 0]},
        "UNet self-attention": {"out": [3, 2]},
        "UNet cross-attention": {"k": [4]},
        "model.layers.mlp": {"up_proj": [5]},
    }
