"""Losses and gradients that are not finite stop a run, or cost it a step in float16."""

from __future__ import annotations

import json

import pytest

from cntlora_core.diffusion.job import personalise
from cntlora_core.diffusion.trainer import NonFiniteLossError, SubjectTrainer

from ..conftest import change


@pytest.mark.thorough
def test_a_float16_base_may_skip_a_step(settings, monkeypatch):
    plain = SubjectTrainer._loss

    def steep(self, batch):
        loss, *parts = plain(self, batch)
        total = next(iter(self.parameters.values())).sum()
        steeper = loss + (total - total.detach()).sqrt()
        return (steeper if self.step == 1 else loss, *parts)

    monkeypatch.setattr(SubjectTrainer, "_loss", steep)
    settings = change(settings, "training", precision="float16", steps=4)
    result = personalise(settings)
    assert [record["skipped"] for record in result.history] == [0.0, 1.0, 0.0, 0.0]
    assert json.loads((result.folder / "run.json").read_text())["history"][1]["grad_norm"] == 0.0


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_state(settings, monkeypatch):
    plain = SubjectTrainer._loss

    def poisoned(self, batch):
        loss, *parts = plain(self, batch)
        return (loss * float("nan") if self.step == 3 else loss, *parts)

    monkeypatch.setattr(SubjectTrainer, "_loss", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 4 .*after step 3 is kept"):
        personalise(settings)
    monkeypatch.undo()
    resumed = personalise(settings, resume=True)
    assert len(resumed.history) == 6


def test_an_infinite_gradient_stops_the_run(settings, monkeypatch):
    plain = SubjectTrainer._loss

    def steep(self, batch):
        loss, *parts = plain(self, batch)
        total = next(iter(self.parameters.values())).sum()
        steeper = loss + (total - total.detach()).sqrt()  # adds nothing, at an infinite slope
        return (steeper if self.step == 2 else loss, *parts)

    monkeypatch.setattr(SubjectTrainer, "_loss", steep)
    with pytest.raises(NonFiniteLossError, match="step 3"):
        personalise(settings)
