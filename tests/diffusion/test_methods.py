"""Every method that trains an image LoRA: trained, written, and loaded onto the stock model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from cntlora_core.diffusion import job
from cntlora_core.diffusion.export import export_lora
from cntlora_core.diffusion.settings import (
    AdapterSettings,
    JobSettings,
    OutputSettings,
    PriorSettings,
    SubjectSettings,
    TrainingSettings,
)
from cntlora_core.lora_file import read_lora_file
from cntlora_core.methods import METHODS, get_method, image_file_methods

RANK = 4


def prediction(unet, text_encoder) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    tokens = torch.randint(5, 200, (2, 77), generator=generator)
    with torch.no_grad():
        states = text_encoder(tokens)[0]
        return unet(latents, torch.tensor([30, 700]), encoder_hidden_states=states).sample


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> Iterator[StableDiffusionPipeline]:
    yield StableDiffusionPipeline.from_pretrained(str(tiny_model), safety_checker=None)


@pytest.mark.parametrize("name", [n for n in image_file_methods() if n != "pissa_niter_16"])
def test_a_file_on_the_stock_model_equals_the_trained_model(
    name, stock, tiny_model, photo_folder, tmp_path, monkeypatch
):
    method = get_method(name)
    kept = {}
    finish, init = job._finish, job.SubjectTrainer.run

    def keep_start(trainer, **options):
        kept["start"] = prediction(trainer.unet, trainer.text_encoder)
        init(trainer, **options)

    def keep_end(trainer, *rest):
        kept["trainer"] = trainer
        return finish(trainer, *rest)

    monkeypatch.setattr(job, "_finish", keep_end)
    monkeypatch.setattr(job.SubjectTrainer, "run", keep_start)
    settings = JobSettings(
        model=str(tiny_model),
        subject=SubjectSettings(images=str(photo_folder), token="sks", class_name="dog"),
        output=OutputSettings(output=str(tmp_path / "out")),
        prior=PriorSettings(prior_weight=0.0, cache=str(tmp_path / "cache")),
        adapter=AdapterSettings(method=name, rank=RANK, alpha=8, init_passes=1),
        training=TrainingSettings(steps=3, learning_rate=1e-2, device="cpu"),
    )
    result = job.personalise(settings)
    trainer = kept["trainer"]

    base = prediction(stock.unet, stock.text_encoder)
    assert (relative(kept["start"], base) < 1e-4) == method.preserves_output
    assert trainer.plan.rewrites_base == method.rewrites_base
    in_memory = prediction(trainer.unet, trainer.text_encoder)
    assert relative(in_memory, base) > 1e-2
    other = dataclasses.replace(settings.output, layout="diffusers")
    diffusers_file = export_lora(
        trainer.unet, trainer.text_encoder, trainer.plan, tmp_path / "d.safetensors", other, {}
    ).path
    for file in (result.lora, diffusers_file):
        stock.load_lora_weights(str(file))
        after = prediction(stock.unet, stock.text_encoder)
        stock.unload_lora_weights()
        assert relative(after, in_memory) < 1e-4, file
    assert relative(prediction(stock.unet, stock.text_encoder), base) == 0

    layers = read_lora_file(result.lora).layers
    twice = method.image_file == "trained minus start"
    trained = result.export.trained_ranks
    assert {n: layer.rank for n, layer in layers.items()} == {
        n: (2 if twice else 1) * rank for n, rank in trained.items()
    }
    assert {n.split(".")[0] for n in layers} == {"unet", "text_encoder"}
    total = sum(trained.values())
    points = sum("to_" in n or "_proj" in n for n, _ in trainer.unet.named_modules()) and 36
    assert total <= RANK * max(points, len(trained)) * 2
    if name == "lora":
        assert result.initialization is None
    else:
        assert result.initialization
        assert any("linear algebra" in note for note in result.notes)


def test_comparison_methods_are_refused_before_anything_is_read():
    for name, method in METHODS.items():
        if method.image_file is None:
            with pytest.raises(ValueError, match=rf"{name}.*trains no image LoRA: .*start_adapter"):
                AdapterSettings(method=name)
        else:
            assert AdapterSettings(method=name, rank=4).method == name
    with pytest.raises(ValueError, match="there is no method 'lorra'"):
        AdapterSettings(method="lorra")
    assert AdapterSettings(method="pissa_niter_3").method == "pissa_niter_3"
    with pytest.raises(ValueError, match="init_minutes must be a positive number"):
        AdapterSettings(init_minutes=0)
