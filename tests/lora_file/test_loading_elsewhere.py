"""LoRA files, loaded by the tools they are for: diffusers and peft."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from cntlora_core.diffusion.sampler import LoRAUse, apply_lora_files
from cntlora_core.lora_file.writing import (
    Layout,
    LoRALayers,
    collect_adapter,
    compress_layers,
    diffusers_tensors,
    read_lora_file,
    subtract_initial_layers,
    total_relative_error,
    write_lora_file,
)

from .conftest import (
    ATTENTION,
    EVERYTHING,
    adapted,
    assert_same_layers,
    collect,
    error,
    outputs,
    stock_pipeline,
    without_text_model,
)


@pytest.mark.parametrize(
    ("layout", "targets"),
    [
        pytest.param("kohya", ATTENTION, marks=pytest.mark.thorough, id="kohya-attention"),
        pytest.param("kohya", EVERYTHING, id="kohya-everything"),
        pytest.param("diffusers", ATTENTION, id="diffusers-attention"),
        pytest.param(
            "diffusers", EVERYTHING, marks=pytest.mark.thorough, id="diffusers-everything"
        ),
    ],
)
def test_stock_pipeline_gives_the_trained_output(
    base, tmp_path: Path, loader_messages: list[str], layout: Layout, targets: list[str]
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


@pytest.mark.thorough
def test_layers_of_differing_ranks_are_scaled_right(
    base, tmp_path: Path, loader_messages: list[str]
) -> None:
    """diffusers before 0.40 scales layers without alpha and header by the rank of the first."""
    models = adapted(base, ATTENTION)
    layers = collect(models)
    assert len({layer.rank for layer in layers.values()}) > 1
    expected = outputs(*models)
    path = write_lora_file(tmp_path / "lora.safetensors", layers, layout="diffusers")
    tensors, bare = load_file(path), tmp_path / "bare.safetensors"
    save_file(tensors, bare)
    uses = (LoRAUse(Path("it"), 1.0, tensors), LoRAUse(bare), LoRAUse(path))
    loads: list[Callable[[StableDiffusionPipeline], None]] = [
        lambda pipeline: pipeline.load_lora_weights(diffusers_tensors(layers)),
        *(partial(apply_lora_files, loras=[use]) for use in uses),
    ]
    for load in loads:
        pipeline = stock_pipeline(base)
        load(pipeline)
        actual = outputs(pipeline.unet, pipeline.text_encoder)
        assert error(actual[0], expected[0]) < 1e-5
        assert error(actual[1], expected[1]) < 1e-5


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

    for model, part in zip(base, ("unet", "text_encoder")):
        fields = {k.removeprefix(f"{part}."): v for k, v in header.items() if k.startswith(part)}
        built = get_peft_model(copy.deepcopy(model), LoraConfig(**fields))
        from_header = collect_adapter(built, prefix=part)
        assert from_header.keys() == {name for name in layers if name.startswith(f"{part}.")}
        for name, layer in from_header.items():
            assert (layer.rank, layer.scaling) == (layers[name].rank, 1.0), name


@pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.40"),
    reason="diffusers before 0.40 scales all layers of a file without header by the first's rank",
)
def test_stock_pipeline_loads_the_diffusers_layout_without_its_header(base, tmp_path: Path) -> None:
    models = adapted(base)
    path = write_lora_file(tmp_path / "lora.safetensors", collect(models), layout="diffusers")
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(path), bare)
    pipeline = stock_pipeline(base)
    pipeline.load_lora_weights(str(bare))
    expected = outputs(*models)
    assert error(outputs(pipeline.unet, pipeline.text_encoder)[0], expected[0]) < 1e-5


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


def rewrite_base(models: Any, layers: LoRALayers) -> None:
    """W <- W - s B0 A0, as a data-driven start that keeps the output does."""
    for model, prefix in zip(models, ("unet", "text_encoder")):
        modules = without_text_model(model.base_model.model.named_modules())
        for name, layer in layers.items():
            if name.startswith(f"{prefix}."):
                modules[name.removeprefix(f"{prefix}.")].base_layer.weight.data -= layer.delta()


@pytest.mark.parametrize("layout", ["kohya", pytest.param("diffusers", marks=pytest.mark.thorough)])
def test_rewritten_base_is_undone_in_the_file(base, tmp_path: Path, layout: Layout) -> None:
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


@pytest.mark.thorough
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
