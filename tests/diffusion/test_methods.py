"""Every method that trains an image LoRA: trained, written, and loaded onto the stock model."""

from __future__ import annotations

import dataclasses
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
from cntlora_core.lora_file.writing import read_lora_file
from cntlora_core.methods import METHODS, get_method, image_file_methods

from ..conftest import prediction, relative

RANK = 4
ATTACHMENT_POINTS = 4 * 8 + 2 * 4
"""4 transformer blocks of two attentions in the denoiser, two layers in the text encoder."""


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(str(tiny_model), safety_checker=None)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("cross", "pissa", "lora") else pytest.mark.thorough)
        for name in image_file_methods()
        if name != "pissa_niter_16"
    ],
)
def test_a_file_on_the_stock_model_equals_the_trained_model(
    name, stock, tiny_model, photo_folder, tmp_path, monkeypatch
):
    method = get_method(name)
    kept = {}
    run = job.SubjectTrainer.run

    def keep_initialization(trainer, **options):
        kept["initial"] = prediction(*trainer.networks.values())
        run(trainer, **options)

    # Up to where the file is written, which is done here, in two layouts.
    monkeypatch.setattr(job.SubjectTrainer, "run", keep_initialization)
    monkeypatch.setattr(job, "_finish", lambda trainer, *rest: (trainer, rest))
    settings = JobSettings(
        model=str(tiny_model),
        subject=SubjectSettings(images=str(photo_folder), token="sks", class_name="dog"),
        output=OutputSettings(str(tmp_path / "out"), file_precision="float32", compress=False),
        prior=PriorSettings(prior_weight=0.0, cache=str(tmp_path / "cache")),
        adapter=AdapterSettings(method=name, rank=RANK, alpha=8, init_passes=1),
        training=TrainingSettings(steps=2, learning_rate=1e-2, device="cpu"),
    )
    trainer, rest = job.personalise(settings)  # pyright: ignore[reportGeneralTypeIssues]

    base = prediction(stock.unet, stock.text_encoder)
    assert (relative(kept["initial"], base) < 1e-4) == method.preserves_output
    assert trainer.plan.rewrites_base == method.rewrites_base
    in_memory = prediction(*trainer.networks.values())
    assert relative(in_memory, base) > 1e-2
    for layout in ("kohya", "diffusers"):
        output = dataclasses.replace(settings.output, layout=layout)
        path = tmp_path / f"{layout}.safetensors"
        report = export_lora(trainer.networks, trainer.plan, path, output, {})
        stock.load_lora_weights(str(path))
        after = prediction(stock.unet, stock.text_encoder)
        stock.unload_lora_weights()
        assert relative(after, in_memory) < 1e-4
        layers = read_lora_file(path).layers
        factor = 2 if method.image_file == "trained minus initial" else 1
        trained = report.trained_ranks
        assert {n: layer.rank for n, layer in layers.items()} == {
            n: factor * rank for n, rank in trained.items()
        }
        assert {n.split(".")[0] for n in layers} == {"unet", "text_encoder"}
        assert sum(trained.values()) == RANK * ATTACHMENT_POINTS
    assert torch.equal(prediction(stock.unet, stock.text_encoder), base)
    initialization = next(r for r in rest if r is None or (isinstance(r, dict) and "ranks" in r))
    assert (initialization is None) == (name == "lora")


def test_comparison_methods_are_refused_before_anything_is_read():
    for name, method in METHODS.items():
        if method.image_file is None:
            with pytest.raises(
                ValueError, match=rf"{name}.*trains no image LoRA: .*initialize_adapter"
            ):
                AdapterSettings(method=name)
        else:
            assert AdapterSettings(method=name, rank=4).method == name
    with pytest.raises(ValueError, match="there is no method 'lorra'"):
        AdapterSettings(method="lorra")
    assert AdapterSettings(method="pissa_niter_3").method == "pissa_niter_3"
    with pytest.raises(ValueError, match="init_minutes must be a positive number"):
        AdapterSettings(init_minutes=0)
