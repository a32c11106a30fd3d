"""The demo on the embedded model: shortened for every run, whole when slow tests are asked for."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cntlora_core import mini
from cntlora_core.commands.demo import SHEET_NAME, run_demo


def check_output(folder, steps: int) -> dict:
    record = json.loads((folder / "run.json").read_text())
    assert len(record["history"]) == steps
    assert record["settings"]["adapter"]["method"] == "cross"
    assert record["demo"]["total_seconds"] > 0
    for name in (SHEET_NAME, "loss.png", "ranks.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 300
    file = folder / record["export"]["file"]
    assert all(torch.isfinite(t).all() for t in load_file(file).values())
    return record


@pytest.mark.plots
def test_the_demo_in_short(tmp_path):
    sheet = run_demo(tmp_path, steps=3, class_images=2, sampling_steps=3)
    assert sheet == tmp_path / SHEET_NAME
    check_output(tmp_path, 3)


def test_every_embedded_subject_has_its_photos():
    for name in mini.subjects():
        subject = mini.subject(name)
        assert len(list(subject.photos.glob("*.png"))) == 5, name
        assert len(list(subject.held_out.glob("*.png"))) == 5, name


def test_unknown_subjects_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=mini.subjects()[0]):
        run_demo(tmp_path, subject_name="unicorn rocket")


@pytest.mark.slow
@pytest.mark.plots
def test_the_whole_demo_learns_its_subject(tmp_path):
    """1000 steps: the loss on the subject falls, and pictures with the LoRA are nearer to it."""
    run_demo(tmp_path)
    history = check_output(tmp_path, 1000)["history"]
    losses = torch.tensor([record["instance_loss"] for record in history])
    assert losses[-200:].mean() < 0.9 * losses[:100].mean()
