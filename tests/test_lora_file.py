"""LoRA files, read back by the tools they are for: diffusers, peft, and our own reader."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from cntlora_core.lora_file import (
    LoRALayer,
    LoRALayers,
    collect_adapter,
    compress_layers,
    modelspec_metadata,
    read_lora_file,
    relative_error,
    subtract_initial_layers,
    total_relative_error,
    write_lora_file,
)
from cntlora_core.lora_names import canonical_name, kohya_name

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [
    *ATTENTION,
    *["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut"],
    *["time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out"],
    *["time_embedding.linear_1", "time_embedding.linear_2"],
]
TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
# Scaling alpha / r differs between layers, and so do alpha and r each on their own.
UNET_PATTERNS = {
    "rank_pattern": {r".*attn2\.to_k": 2, r".*attn1\.to_q": 5},
    "alpha_pattern": {r".*attn2\.to_k": 7, r".*up_blocks\.1\..*to_v": 1},
}
TEXT_PATTERNS = {
    "rank_pattern": {r".*layers\.1\.self_attn\.q_proj": 3},
    "alpha_pattern": {
        r".*layers\.1\.self_attn\.q_proj": 5,
        r".*layers\.11\.self_attn\.q_proj": 2,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base() -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """SD 1.5's module tree at a fraction of its width, so that every name is the real one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32, 64, 64),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=12,
                num_attention_heads=4,
                max_position_embeddings=16,
                bos_token_id=62,
                eos_token_id=63,
            )
        )
    return unet.eval(), text_encoder.eval()


def adapted(
    base: tuple[nn.Module, nn.Module], targets: list[str] = ATTENTION, **config: object
) -> tuple[PeftModel, PeftModel]:
    """Copies of both models with a random adapter (up is not zero)."""
    text_targets = [*TEXT_ATTENTION, "fc1", "fc2"] if "conv1" in targets else TEXT_ATTENTION
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet, text_encoder = (
            get_peft_model(
                copy.deepcopy(model),
                LoraConfig(
                    target_modules=names,
                    **{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **patterns, **config},
                ),
            )
            for model, names, patterns in (
                (base[0], targets, UNET_PATTERNS),
                (base[1], text_targets, TEXT_PATTERNS),
            )
        )
    return unet.eval(), text_encoder.eval()


def collect(models: tuple[nn.Module, nn.Module]) -> LoRALayers:
    return collect_adapter(models[0]) | collect_adapter(models[1], prefix="text_encoder")


@torch.no_grad()
def outputs(unet: nn.Module, text_encoder: nn.Module) -> tuple[Tensor, Tensor]:
    """The denoiser's output for a prompt, and that prompt's embedding."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 60, (2, 16), generator=generator)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    states = text_encoder(tokens)[0]
    return unet(latents, torch.tensor([10, 700]), states).sample, states


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).double().norm() / expected.double().norm())


def stock_pipeline(base: tuple[nn.Module, nn.Module]) -> StableDiffusionPipeline:
    unet, text_encoder = copy.deepcopy(base)
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder,
        tokenizer=None,
        unet=unet,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def loader_messages(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What diffusers and peft complain about while loading: a pattern or a key without a module."""
    from diffusers.utils import logging as diffusers_logging

    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep(logging.WARNING)
    diffusers_logging.add_handler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
        messages += [str(w.message) for w in caught if "pattern" in str(w.message)]
    diffusers_logging.remove_handler(handler)
    left_over = [m for m in messages if "key" in m.lower() or "pattern" in m]
    assert not left_over


def assert_same_layers(actual: LoRALayers, expected: LoRALayers, tolerance: float = 0.0) -> None:
    assert actual.keys() == expected.keys()
    for name, layer in expected.items():
        if tolerance:
            assert relative_error(actual[name], layer) < tolerance, name
            assert actual[name].rank == layer.rank
            continue
        assert torch.equal(actual[name].down, layer.down), name
        assert torch.equal(actual[name].up, layer.up), name
        assert actual[name].alpha == layer.alpha, name
        if layer.mid is not None:
            assert torch.equal(actual[name].mid, layer.mid), name


# ------------------------------------------------------------------------------------ collecting


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
        merged = copy.deepcopy(model).merge_and_unload().state_dict()
        weights = before.state_dict()
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
    holder.text_model = copy.deepcopy(base[1])
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


# --------------------------------------------------------------- loaded by the tools they are for


@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_stock_pipeline_gives_the_trained_output(
    base, tmp_path: Path, loader_messages: list[str], layout: str, targets: list[str]
) -> None:
    models = adapted(base, targets)
    expected, plain = outputs(*models), outputs(*base)
    assert error(plain[0], expected[0]) > 0.05
    assert error(plain[1], expected[1]) > 0.05
    file = write_lora_file(tmp_path / "lora.safetensors", collect(models), layout=layout)
    pipeline = stock_pipeline(base)
    pipeline.load_lora_weights(str(file))
    actual = outputs(pipeline.unet, pipeline.text_encoder)
    assert error(actual[1], expected[1]) < 1e-5
    assert error(actual[0], expected[0]) < 1e-5


def test_diffusers_layout_is_right_without_its_header_and_with_it(base, tmp_path: Path) -> None:
    """Readers that know no header take scale 1; those that do, take ranks and alphas from it."""
    models = adapted(base)
    layers = collect(models)
    path = write_lora_file(tmp_path / "lora.safetensors", layers, layout="diffusers")
    header = json.loads(read_lora_file(path).metadata["lora_adapter_metadata"])
    tensors = load_file(path)
    bare = tmp_path / "bare.safetensors"
    save_file(tensors, bare)
    assert_same_layers(read_lora_file(bare).layers, layers, 1e-6)
    pipeline = stock_pipeline(base)
    pipeline.load_lora_weights(str(bare))
    expected = outputs(*models)
    assert error(outputs(pipeline.unet, pipeline.text_encoder)[0], expected[0]) < 1e-5

    for model, part in zip(base, ("unet", "text_encoder")):
        fields = {k.removeprefix(f"{part}."): v for k, v in header.items() if k.startswith(part)}
        built = get_peft_model(copy.deepcopy(model), LoraConfig(**fields))
        from_header = collect_adapter(built, prefix=part)
        assert from_header.keys() == {name for name in layers if name.startswith(f"{part}.")}
        for name, layer in from_header.items():
            assert (layer.rank, layer.scaling) == (layers[name].rank, 1.0), name


def test_peft_loads_the_peft_layout(base, tmp_path: Path, loader_messages: list[str]) -> None:
    models = adapted(base)
    layers = collect(models)
    folder = write_lora_file(tmp_path / "adapter", layers, layout="peft")
    unet = PeftModel.from_pretrained(copy.deepcopy(base[0]), str(folder / "unet"))
    text_encoder = PeftModel.from_pretrained(copy.deepcopy(base[1]), str(folder / "text_encoder"))
    assert_same_layers(collect((unet, text_encoder)), layers)
    expected, actual = outputs(*models), outputs(unet, text_encoder)
    assert error(actual[0], expected[0]) < 1e-5
    assert error(actual[1], expected[1]) < 1e-5


def rewrite_base(models: tuple[nn.Module, nn.Module], layers: LoRALayers) -> None:
    """W <- W - s B0 A0, as a data-driven start that keeps the output does."""
    for model, prefix in zip(models, ("unet", "text_encoder")):
        modules = dict(model.base_model.model.named_modules())
        for name, layer in layers.items():
            if name.startswith(f"{prefix}."):
                modules[name.removeprefix(f"{prefix}.")].base_layer.weight.data -= layer.delta()


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_rewritten_base_is_undone_in_the_file(base, tmp_path: Path, layout: str) -> None:
    models = adapted(base)
    initial = collect(models)
    rewrite_base(models, initial)
    before = outputs(*base)
    assert error(outputs(*models)[0], before[0]) < 1e-4  # step 0 is the base model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for model in models:
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data += 0.1 * torch.randn_like(parameter)
    trained = collect(models)
    expected = outputs(*models)
    assert error(before[0], expected[0]) > 0.01
    exact = subtract_initial_layers(trained, initial)
    assert all(exact[name].rank == 2 * layer.rank for name, layer in trained.items())

    def loaded(layers: LoRALayers, name: str) -> tuple[Tensor, Tensor]:
        pipeline = stock_pipeline(base)
        pipeline.load_lora_weights(
            str(write_lora_file(tmp_path / f"{name}.safetensors", layers, layout=layout))
        )
        return outputs(pipeline.unet, pipeline.text_encoder)

    actual = loaded(exact, "exact")
    assert error(actual[0], expected[0]) < 1e-5
    assert error(actual[1], expected[1]) < 1e-5

    ranks = {name: layer.rank for name, layer in trained.items()}
    small, errors = compress_layers(exact, ranks)
    assert {name: layer.rank for name, layer in small.items()} == ranks
    assert all(0 < value < 1 for value in errors.values())
    assert total_relative_error(small, exact) <= max(errors.values())
    # Truncation costs something, but less than leaving the adapter out.
    cost = error(loaded(small, "small")[0], expected[0])
    assert 1e-5 < cost < 0.9 * error(before[0], expected[0])


# ------------------------------------------------------------------------------- reading it back


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_round_trip(base, tmp_path: Path, layout: str) -> None:
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
def test_round_trip_is_exact_where_alphas_agree(base, tmp_path: Path, layout: str) -> None:
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
    assert names == {kohya_name(name) for name in layers}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0" in names
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in names
    alphas = [tensors[f"{name}.alpha"] for name in names]
    assert {(alpha.ndim, float(alpha)) for alpha in alphas} == {(0, 6.0)}
    assert {tensors[f"{kohya_name(n)}.lora_down.weight"].shape[0] for n in layers} == {2, 3, 4, 5}


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


# ----------------------------------------------------------------------------- other tools' files


def test_kohya_names_come_back_for_every_module(base) -> None:
    """The grammar without a table of names, on every linear and convolution of both models."""
    for model, prefix in zip(base, ("unet", "text_encoder")):
        names = [
            f"{prefix}.{path}"
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
        ]
        assert len(names) > 60
        assert [canonical_name(kohya_name(name)) for name in names] == names
    te1 = "lora_te1_text_model_encoder_layers_3_mlp_fc1"
    assert canonical_name(te1) == "text_encoder.encoder.layers.3.mlp.fc1"
    assert canonical_name("lora_unet_double_blocks_0_img_attn_qkv") is None
    assert canonical_name("lora_te_layers_0_q_proj") is None
    assert canonical_name("lora_unet_down_blocks_0__attn1") is None


PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
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
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name="default"),
        text_encoder_lora_layers=get_peft_model_state_dict(text_encoder, adapter_name="default"),
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
        model.save_pretrained(tmp_path / part)
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


# ---------------------------------------------------------------------------------------- errors

GOOD = f"lora_unet_{PATH.replace('.', '_')}_to_q"
FACTORS = {f"{GOOD}.lora_down.weight": torch.ones(2, 3), f"{GOOD}.lora_up.weight": torch.ones(5, 2)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"model.diffusion_model.out.2.weight": torch.ones(2)}, "full Stable Diffusion checkpoint"),
        ({"encoder.weight": torch.ones(2)}, "no LoRA.*encoder.weight"),
        ({}, "no tensors"),
        ({**FACTORS, f"{GOOD}.dora_scale": torch.ones(5, 1)}, "DoRA"),
        ({f"{GOOD}.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        ({f"{GOOD}.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        ({**FACTORS, f"{GOOD}.diff_b": torch.ones(5)}, "full difference"),
        ({**FACTORS, "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)}, "SDXL"),
        (
            {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(2, 3)},
            "input_blocks.*down_blocks",
        ),
        ({f"{GOOD}.lora_down.weight": torch.ones(2, 3)}, "no up factor"),
        ({**FACTORS, f"{GOOD}.lora_up.weight": torch.ones(5, 3)}, f"{GOOD}.*must agree"),
        ({**FACTORS, "what.is.this": torch.ones(1)}, r"1 keys that fit no layer.*what\.is\.this"),
        ({**FACTORS, "lora_unet_conv_in.alpha": torch.ones(())}, r"conv_in \(alpha\)"),
        (
            {"lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": torch.ones(2, 3)},
            "another model",
        ),
        (
            {
                **FACTORS,
                f"unet.{PATH}.to_q.lora_A.weight": torch.ones(2, 3),
                f"unet.{PATH}.to_q.lora_B.weight": torch.ones(5, 2),
            },
            "two LoRA layers for",
        ),
    ],
)
def test_says_what_a_file_is_instead(tmp_path: Path, tensors: dict[str, Tensor], says: str) -> None:
    path = tmp_path / "thing.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=says) as caught:
        read_lora_file(path)
    assert str(path) in str(caught.value)


def test_unknown_keys_are_listed_when_allowed(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({**FACTORS, "what.is.this": torch.ones(1)}, path)
    with pytest.warns(UserWarning, match=r"what\.is\.this"):
        found = read_lora_file(path, strict=False)
    assert found.unknown_keys == ("what.is.this",)
    assert list(found.layers) == [f"unet.{PATH}.to_q"]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        read_lora_file(tmp_path / "absent.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    torch.save({"a": torch.ones(1)}, tmp_path / "b.ckpt", _use_new_zipfile_serialization=False)
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(ValueError, match="is a pickle"):
            read_lora_file(tmp_path / name)
    (tmp_path / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("text", "empty"):
        with pytest.raises(ValueError, match="is no safetensors file"):
            read_lora_file(tmp_path / f"{name}.safetensors")
    save_file(FACTORS, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    for length in (40, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut off or damaged"):
            read_lora_file(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="no peft folder"):
        read_lora_file(tmp_path)


def test_peft_file_without_its_config_or_of_another_method(base, tmp_path: Path) -> None:
    folder = write_lora_file(tmp_path / "a", collect_adapter(adapted(base)[0]), layout="peft")
    config = folder / "unet" / "adapter_config.json"
    settings = json.loads(config.read_text())
    for change, says in (({"peft_type": "LOHA"}, "type LOHA"), ({"use_dora": True}, "DoRA")):
        config.write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=says):
            read_lora_file(folder)
    config.unlink()
    with pytest.raises(ValueError, match=r"scale stands in adapter_config\.json"):
        read_lora_file(folder)


def test_writer_refuses(base, tmp_path: Path) -> None:
    layer = LoRALayer(torch.ones(2, 3), torch.ones(5, 2), 1.0)
    path = tmp_path / "lora.safetensors"
    good = {"unet.conv_in": layer}
    large = {"unet.conv_in": LoRALayer(torch.full((2, 3), 1e6), torch.ones(5, 2), 1.0)}
    odd = {"unet.conv_in": LoRALayer(torch.full((2, 3), float("nan")), torch.ones(5, 2), 1.0)}
    for layers, options, says in (
        ({}, {}, "no LoRA layers"),
        ({"down_blocks.0": layer}, {}, "no name of an adapted module"),
        ({"text_encoder.text_model.encoder": layer}, {}, "without text_model"),
        (good, {"layout": "a1111"}, "kohya, diffusers or peft"),
        (good, {"dtype": torch.float64}, "float32, float16 or bfloat16"),
        (large, {"dtype": torch.float16}, "too large for torch.float16"),
        (odd, {}, "unet.conv_in: a value of lora_down is not finite"),
        (good, {"layout": "peft"}, "peft layout is a folder"),
    ):
        with pytest.raises(ValueError, match=says):
            write_lora_file(path, layers, **options)
        assert not path.exists()
    with pytest.raises(ValueError, match="is a folder"):
        write_lora_file(tmp_path, good)
    write_lora_file(tmp_path / "peft", {"text_encoder.encoder.x": layer}, layout="peft")
    with pytest.raises(ValueError, match="already holds an adapter for text_encoder"):
        write_lora_file(tmp_path / "peft", good, layout="peft")


# -------------------------------------------------------------------------------------- metadata


def test_metadata(base, tmp_path: Path) -> None:
    import hashlib

    layers = collect(adapted(base))
    metadata = modelspec_metadata(
        title="my dog",
        resolution=512,
        method="cntlora-cross",
        settings={"damping": 0.01, "constraint": "cross"},
        training={"learning_rate": 1e-4, "seed": 3, "num_train_images": 5, "unet_lr": None},
        tag_frequency={"5_sks dog": {"a photo of sks dog": 5}},
        trigger_phrase="sks dog",
        clip_skip=1,
    )
    path = write_lora_file(tmp_path / "lora.safetensors", layers, metadata=metadata)
    found = read_lora_file(path).metadata
    assert metadata.items() <= found.items()
    assert found["modelspec.sai_model_spec"] == "1.0.0"
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["modelspec.resolution"] == "512x512"
    assert found["ss_base_model_version"] == "sd_v1"
    assert found["ss_network_module"] == "networks.lora"
    assert found["ss_network_dim"] == "Dynamic"
    assert found["ss_network_alpha"] == "6"
    assert found["ss_learning_rate"] == "0.0001"
    assert found["ss_unet_lr"] == "None"
    assert json.loads(found["ss_tag_frequency"])["5_sks dog"] == {"a photo of sks dog": 5}
    assert json.loads(found["cntlora.settings"])["damping"] == 0.01
    assert json.loads(found["cntlora.versions"])["torch"] == torch.__version__
    content = path.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert found["modelspec.hash_sha256"] == f"0x{digest}"
    assert found["sshs_model_hash"] == digest

    # What describes the tensors is made anew when a file is written under another one's metadata.
    small, _ = compress_layers(layers, 1)
    other = write_lora_file(tmp_path / "small.safetensors", small, metadata=found)
    changed = read_lora_file(other).metadata
    assert changed["ss_network_dim"] == "1"
    assert changed["sshs_model_hash"] != digest
    with pytest.raises(ValueError, match="settings cannot be stored"):
        modelspec_metadata(title="", resolution=1, method="", settings={"x": float("nan")})


def test_kohya_file_written_from_a_diffusers_file_loads(base, tmp_path: Path) -> None:
    """diffusers refuses a file with alphas and its own header at once."""
    layers = collect(adapted(base))
    first = read_lora_file(write_lora_file(tmp_path / "d", layers, layout="diffusers"))
    assert "lora_adapter_metadata" in first.metadata
    path = write_lora_file(tmp_path / "k.safetensors", first.layers, metadata=first.metadata)
    pipeline = stock_pipeline(base)
    pipeline.load_lora_weights(str(path))
    actual, expected = outputs(pipeline.unet, pipeline.text_encoder), outputs(*adapted(base))
    assert error(actual[0], expected[0]) < 1e-5
