"""The nodes with LAVA in place of LoRA, from photos to pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cntlora_core.diffusion.settings import AdapterSettings

from .conftest import Pack, pictures, subject_of, train


def initialize(pack: Pack, **inputs: Any) -> Any:
    model = pack.run("CNTLoRALoadModel", checkpoint="diffusers/tiny").args[0]
    subject = subject_of(pack, images=[pictures()]).args[0]
    few = {"rank": 3, "passes": 1, "rank_budget": "fixed", "adapter": "lava"}
    return pack.run("CNTLoRAInitialize", model=model, subject=subject, **{**few, **inputs})


@pytest.mark.thorough
def test_lava_is_initialised_trained_saved_and_sampled_with(pack: Pack) -> None:
    initialized = initialize(pack)
    names = list(initialized.args[0].initialization.plan.ranks)
    assert any(name.endswith(".conv1") for name in names)
    trained = train(pack, initialized.args[0])
    lora = trained.args[0]
    assert any(t.ndim == 4 and t.shape[-1] == 3 for t in lora.values())  # a convolution's
    model = initialized.args[0].model
    few = {"prompts": "a photo of sks dog", "steps": 1}
    generated = pack.run("CNTLoRASample", model=model, lora=lora, **few).args[0]
    assert not torch.equal(generated, pack.run("CNTLoRASample", model=model, **few).args[0])
    saved = pack.run("CNTLoRASave", lora=lora, filename_prefix="lava").args[0]
    report = pack.run("CNTLoRAInspect", lora_name=saved).args[0]
    assert "method: cross" in report


def test_what_says_something_of_lava_alone_does_not_count_for_a_lora(pack: Pack) -> None:
    given = {"rank_budget": "fixed", "convolutions": False, "orthogonality": 0.5}
    options = pack.run("CNTLoRAInitializationOptions", **given).args[0]
    start = initialize(pack, adapter="lora", options=options).args[0]
    assert start.initialization.adapter.orthogonality == AdapterSettings.orthogonality


def test_the_attention_alone(pack: Pack) -> None:
    plan = initialize(pack, method="lora", convolutions=False).args[0].initialization.plan
    assert not any("conv" in name for name in plan.ranks)


def test_other_methods_are_refused_in_words(pack: Pack) -> None:
    with pytest.raises(ValueError, match="with adapter='lava' use cross, self, shift or lora"):
        initialize(pack, method="pissa")
