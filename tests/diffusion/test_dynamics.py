"""The dynamics of a run of the image trainer."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cntlora_core.diffusion.job import personalise
from cntlora_core.dynamics import read_dynamics

from .conftest import StopAt, change, losses


@pytest.fixture
def recorded(settings):
    return change(settings, "training", dynamics_every=4)


def test_dynamics_are_recorded_and_change_nothing(settings, recorded, tmp_path):
    plain = personalise(change(settings, "output", output=str(tmp_path / "plain")))
    assert not (plain.folder / "dynamics.jsonl").exists()
    result = personalise(recorded)
    assert losses(result) == losses(plain)
    a, b = load_file(plain.lora), load_file(result.lora)
    assert all(torch.equal(a[key], b[key]) for key in a)
    records = read_dynamics(result.folder / "dynamics.jsonl")
    assert [r["loss"] for r in records] == losses(result)
    norms = [record["grad_norm"] for record in result.history]
    assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-5)
    assert all(set(r["grad_norms"]) == {"UNet", "text encoder"} for r in records)
    assert all(min(r["update_ratios"].values()) > 0 for r in records)
    assert [i for i, r in enumerate(records, 1) if "second_moments" in r] == [1, 5]
    moments = records[0]["second_moments"]
    assert {name.partition(".")[0] for name in moments} == {"unet", "text_encoder"}
    assert all(found["all"] > 0 for found in moments.values())
    with Image.open(result.folder / "dynamics.png") as image:
        assert image.width > 500


@pytest.mark.thorough
def test_layers_of_lava_are_recorded_too(recorded):
    lava = change(change(recorded, "adapter", adapter="lava"), "prior", prior_weight=0.0)
    records = read_dynamics(personalise(lava).folder / "dynamics.jsonl")
    assert set(records[0]["grad_norms"]) == {"UNet", "text encoder"}
    assert any(name.startswith("unet.") for name in records[0]["second_moments"])


@pytest.mark.thorough
def test_a_run_that_goes_on_continues_the_file(recorded, tmp_path):
    whole = personalise(change(recorded, "output", output=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        personalise(recorded, reporter=StopAt(3))
    result = personalise(recorded, resume=True)
    found, expected = (read_dynamics(r.folder / "dynamics.jsonl") for r in (result, whole))
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 6]
    assert found == expected
    stopped = personalise(change(recorded, "training", dynamics_every=0), overwrite=True)
    assert not list(stopped.folder.glob("dynamics.*"))
