"""Weight decay pulls every adapter towards its initialisation, rewritten base or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cntlora_core.diffusion import job
from cntlora_core.diffusion.export import trained_layers
from cntlora_core.diffusion.settings import (
    AdapterSettings,
    JobSettings,
    OutputSettings,
    PriorSettings,
    SubjectSettings,
    TrainingSettings,
)
from cntlora_core.lora_file.algebra import norm
from cntlora_core.methods import image_file_methods

ADAPTERS = [("lora", n) for n in image_file_methods() if n != "pissa_niter_16"]
ADAPTERS += [("lava", "cross"), ("lava", "lora")]


@pytest.fixture
def trained(tiny_model: Path, photo_folder: Path, tmp_path: Path, monkeypatch):
    """The trainer of a short run and its parameters at the start of it."""
    initial = {}
    run = job.SubjectTrainer.run

    def keep_initialization(trainer, **options):
        initial.update({n: p.detach().clone() for n, p in trainer.parameters.items()})
        run(trainer, **options)

    monkeypatch.setattr(job.SubjectTrainer, "run", keep_initialization)
    monkeypatch.setattr(job, "_finish", lambda trainer, *rest: trainer)

    def train(adapter: AdapterSettings, **training):
        settings = JobSettings(
            model=str(tiny_model),
            subject=SubjectSettings(images=str(photo_folder), token="sks", class_name="dog"),
            output=OutputSettings(output=str(tmp_path / "out")),
            prior=PriorSettings(prior_weight=0.0, cache=str(tmp_path / "cache")),
            adapter=adapter,
            training=TrainingSettings(learning_rate=1e-2, device="cpu", **training),
        )
        return job.personalise(settings, overwrite=True), initial

    return train


@pytest.mark.parametrize(("kind", "method"), ADAPTERS)
def test_an_adapter_that_learns_nothing_exports_nothing(trained, kind, method):
    adapter = AdapterSettings(method, kind, rank=4, init_passes=1)
    # Clipped to this norm, a gradient is far below AdamW's epsilon.
    trainer, _ = trained(adapter, steps=3, weight_decay=10.0, max_grad_norm=1e-30)
    assert trainer.step == 3
    layers, _ = trained_layers(trainer.networks, trainer.plan)
    assert max(norm(layer) for layer in layers.values()) < 1e-6


@pytest.mark.parametrize(
    ("kind", "method"), [("lora", "lora"), ("lora", "cross"), ("lava", "cross")]
)
def test_what_is_learnt_decays(trained, kind, method):
    adapter = AdapterSettings(method, kind, rank=4, init_passes=1)

    def learnt(weight_decay: float) -> float:
        trainer, initial = trained(adapter, steps=5, weight_decay=weight_decay)
        moved = [p.detach() - initial[name] for name, p in trainer.parameters.items()]
        return float(torch.cat([m.flatten() for m in moved]).norm())

    # The learning rate times 100 is 1: of what was learnt, the last step's share is left.
    assert learnt(100.0) < 0.5 * learnt(0.0)
