"""Weight decay pulls every adapter towards its initialisation, rewritten base or not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cntlora_core.diffusion.export import trained_layers
from cntlora_core.diffusion.settings import AdapterSettings
from cntlora_core.lora_file.algebra import norm

from .conftest import change

ADAPTERS = [
    *(("lora", name) for name in ("lora", "cross", "self", "pissa", "eva", "lora_ga")),
    *(("lava", name) for name in ("cross", "lora")),
]


@pytest.fixture
def trained(settings, train_and_keep):
    """The trainer of a short run without class images, and its parameters at the start of it."""

    def train(adapter: AdapterSettings, **training):
        asked = change(settings, "prior", prior_weight=0.0)
        asked = change(asked, "training", learning_rate=1e-2, **training)
        return train_and_keep(dataclasses.replace(asked, adapter=adapter))

    return train


@pytest.mark.parametrize(
    ("kind", "method"),
    [pytest.param(*a, marks=[] if "cross" in a else pytest.mark.thorough) for a in ADAPTERS],
)
@pytest.mark.thorough
def test_an_adapter_that_learns_nothing_exports_nothing(trained, kind, method):
    adapter = AdapterSettings(method, kind, rank=4, init_passes=1)
    # Clipped to this norm, a gradient is far below AdamW's epsilon.
    trainer, _ = trained(adapter, steps=3, weight_decay=10.0, max_grad_norm=1e-30)
    assert trainer.step == 3
    layers, _ = trained_layers(trainer.networks, trainer.plan)
    assert max(norm(layer) for layer in layers.values()) < 1e-6


@pytest.mark.parametrize(
    ("kind", "method"),
    [("lora", "lora"), ("lora", "cross"), pytest.param("lava", "lora", marks=pytest.mark.thorough)],
)
def test_what_is_learnt_decays(trained, kind, method):
    adapter = AdapterSettings(method, kind, rank=4, init_passes=1)

    def learnt(weight_decay: float) -> float:
        trainer, initial = trained(adapter, steps=5, weight_decay=weight_decay)
        moved = [p.detach() - initial[name] for name, p in trainer.parameters.items()]
        return float(torch.cat([m.flatten() for m in moved]).norm())

    # The learning rate times 100 is 1: of what was learnt, the last step's share is left.
    assert learnt(100.0) < 0.5 * learnt(0.0)
