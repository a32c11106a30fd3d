"""The demo on the embedded model: shortened for every run, whole when slow tests are asked for."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cntlora_core import mini
from cntlora_core.cli import main
from cntlora_core.commands import demo
from cntlora_core.commands.demo import BASELINE, SHEET_NAME, run_demo


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
@pytest.mark.thorough
def test_the_demo_in_short(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, "demo_settings", partial(demo.demo_settings, class_steps=2))
    monkeypatch.setattr(demo, "PICTURES_PER_PROMPT", 1)
    sheet = run_demo(tmp_path, steps=3, class_images=2, sampling_steps=3)
    assert sheet == tmp_path / SHEET_NAME
    assert "Loading weights" not in capfd.readouterr().err
    record = check_output(tmp_path, 3)
    assert list(record["demo"]["scores"]) == ["base model", "lora", "cross"]
    plain = json.loads((tmp_path / BASELINE / "run.json").read_text())
    assert plain["settings"]["adapter"]["method"] == "lora"
    assert plain["identity"]["class_images"] == record["identity"]["class_images"]


@pytest.mark.plots
@pytest.mark.thorough
def test_the_demo_on_ones_own_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "demo_settings", partial(demo.demo_settings, class_steps=2))
    monkeypatch.setattr(demo, "PICTURES_PER_PROMPT", 1)
    own = tmp_path / "photos"
    own.mkdir()
    for path in mini.subject("boot").photos.glob("*.png"):
        shutil.copy(path, own)  # without captions
    run_demo(
        tmp_path / "out",
        images=own,
        class_name="boot",
        method="lora",
        steps=2,
        class_images=2,
        sampling_steps=2,
    )
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert list(record["demo"]["scores"]) == ["base model", "lora"]
    assert all(prompt.startswith("a sks boot ") for prompt in record["demo"]["prompts"])
    assert record["settings"]["subject"]["images"] == str(own)


def test_scenes_are_neither_in_the_photos_nor_in_what_images_are_compared_with():
    for name in mini.subjects():
        subject = mini.subject(name)
        captions = [path.read_text() for path in subject.photos.glob("*.txt")]
        assert len(captions) == len(subject.held_out_captions) == 5
        seen = " ".join((*captions, *subject.held_out_captions))
        assert sum(scene not in seen for scene in demo.SCENES) >= demo.PROMPTS, name


def test_without_the_research_no_backgrounds_are_counted(monkeypatch):
    monkeypatch.setitem(sys.modules, "cntlora_core.mini.making.evaluate", None)
    assert demo._right_backgrounds([Image.new("RGB", (64, 64))], ["a cat in space"], "cat") is None


def test_own_pictures_need_a_class_name(tmp_path, capsys):
    assert main(["demo", "--images", str(tmp_path), "--output", str(tmp_path / "o")]) == 1
    assert "--class-name" in capsys.readouterr().err


def test_every_embedded_subject_has_its_photos():
    for name in mini.subjects():
        subject = mini.subject(name)
        assert len(list(subject.photos.glob("*.png"))) == 5, name
        assert len(list(subject.held_out.glob("*.png"))) == 5, name


def test_unknown_subjects_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=mini.subjects()[0]):
        run_demo(tmp_path, subject_name="unicorn rocket")


def test_an_unknown_method_is_refused_before_plain_lora_trains(tmp_path):
    with pytest.raises(ValueError, match="no such method"):
        run_demo(tmp_path / "out", method="no such method", steps=1)  # pyright: ignore
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.plots
def test_the_whole_demo_learns_its_subject(tmp_path):
    """The loss on the subject falls, and pictures with either LoRA are nearer to it."""
    run_demo(tmp_path)
    record = check_output(tmp_path, demo.STEPS)
    losses = torch.tensor([step["instance_loss"] for step in record["history"]])
    assert losses[-50:].mean() < 0.9 * losses[:20].mean()
    scores = record["demo"]["scores"]
    for name in ("lora", "cross"):
        assert scores[name]["dino"] > scores["base model"]["dino"] + 0.1
