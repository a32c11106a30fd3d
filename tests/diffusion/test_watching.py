"""What can be watched while a run trains: the loss on held-out photos, and trackers."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from cntlora_core.diffusion.family import predict
from cntlora_core.diffusion.initialize import NoisedPhotos
from cntlora_core.diffusion.job import personalise
from cntlora_core.diffusion.pipeline import load_stable_diffusion
from cntlora_core.diffusion.stages import EncodedSubject, encode_held_out, read_subject
from cntlora_core.diffusion.watching import HeldOutLoss

from .conftest import StopAt, change


@pytest.fixture
def held_out(tmp_path):
    folder = tmp_path / "held out"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (40, 48), (200 - 40 * i, 90, 30 * i)).save(folder / f"{i}.png")
    return str(folder)


def measured(result) -> dict[int, float]:
    records = enumerate(result.history, 1)
    return {i: r["held_out_loss"] for i, r in records if "held_out_loss" in r}


@pytest.mark.thorough
def test_held_out_photos_are_measured_and_change_nothing(settings, held_out, tmp_path):
    plain = personalise(settings)
    watched = change(settings, "output", output=str(tmp_path / "watched"))
    watched = change(change(watched, "training", held_out_every=4), "subject", held_out=held_out)
    with pytest.raises(KeyboardInterrupt):
        personalise(watched, reporter=StopAt(5))
    result = personalise(watched, resume=True)
    a, b = load_file(plain.lora), load_file(result.lora)
    assert all(torch.equal(a[key], b[key]) for key in a)
    found = measured(result)
    assert list(found) == [4, 6]
    with safe_open(result.lora, "pt") as file:
        assert "held out" not in str(file.metadata())  # files travel, folders stay
    assert found[4] != found[6]
    assert any("held-out photos: lowest at step" in note for note in result.notes)
    record = json.loads((result.folder / "run.json").read_text())
    assert record["history"][3]["held_out_loss"] == found[4]
    again = change(watched, "output", output=str(tmp_path / "again"))
    assert measured(personalise(change(again, "training", held_out_every=2)))[4] == found[4]


@pytest.mark.thorough
def test_a_held_out_loss_falls_where_the_photos_are_those_trained_on(settings):
    same = change(settings, "subject", held_out=settings.subject.images)
    asked = change(same, "training", steps=30, learning_rate=5e-3, held_out_every=10)
    result = personalise(change(asked, "prior", prior_weight=0.0))
    found = measured(result)
    assert found[30] < found[10]
    assert any("before training" in note for note in result.notes)


@torch.no_grad()
def test_each_held_out_photo_is_measured_under_its_own_caption(settings, held_out, tmp_path):
    parts = load_stable_diffusion(settings.model)
    asked = dataclasses.replace(settings.subject, held_out=held_out)

    def loss() -> tuple[float, EncodedSubject]:
        encoded = encode_held_out(parts, read_subject(asked), cache=tmp_path / "cache")
        assert encoded is not None
        return HeldOutLoss(parts, encoded)(), encoded

    plain, _ = loss()
    caption = Path(held_out) / "0.txt"
    caption.write_text("a photo of {token} {class}")
    assert loss()[0] == plain  # the subject's prompt, in other words
    caption.write_text("a red {class} in the snow")
    found, encoded = loss()
    assert encoded.prompts == ("a red dog in the snow", "a photo of sks dog")
    errors, scheduler = [], parts.noise_scheduler
    for batch in NoisedPhotos(encoded.latents, encoded.tokens, scheduler, passes=4, seed=2026):
        prompt = parts.family.encode(parts.networks, batch.tokens)
        predicted = predict(parts.unet, batch.latents, batch.timesteps, prompt)
        errors.append(float((predicted - batch.target).square().mean()))
    assert found == pytest.approx(sum(errors) / len(errors))
    assert found != plain


def test_what_is_wrong_with_held_out_photos_is_said(settings, held_out, tmp_path):
    folder = Path(held_out)
    (folder / "1.png").unlink()
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "0.txt").write_text("a photo of a {class}")
    (folder / "9.txt").write_text("of no picture")
    Image.new("RGB", (16, 96)).save(folder / "long.png")
    lost = change(settings, "subject", held_out=held_out, token="zwq")
    lost = change(change(lost, "prior", prior_weight=0.0), "adapter", method="lora")
    notes = personalise(change(lost, "training", steps=1)).notes
    said = [note for note in notes if note.startswith("held-out photos: ")]
    for words in ("skipped bad.png", "9.txt is not used", "0.png does not contain the token",
                  "long.png", "enlarged"):  # fmt: skip
        assert any(words in note for note in said), (words, said)
    assert sum("is read as" in note for note in notes) == 1  # the token, once
    (folder / "long.png").unlink()
    assert not any("only one photo" in note for note in read_subject(lost.subject).notes)
    (folder / "0.txt").write_text("a photo of {token}")
    whole = {"instance_prompt": "a photo of my dog", "class_prompt": "a photo of a dog"}
    with pytest.raises(ValueError, match=r"caption of 0\.png has a placeholder"):
        personalise(change(lost, "subject", token=None, class_name=None, **whole), overwrite=True)


def events(folder) -> list:
    """What TensorBoard reads: records of a length, a checksum, an event, and a checksum."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.rglob("events.out.tfevents*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = proto.Event()
            event.ParseFromString(data[at + 12 : at + 12 + length])
            found.append(event)
            at += length + 16
    return found


def test_tensorboard_is_told_of_steps_and_previews(settings):
    pytest.importorskip("tensorboardX")
    watched = {"log_with": ("tensorboard",), "sample_prompts": ("a dog",), "sample_steps": 1}
    result = personalise(change(settings, "training", **watched))
    told = events(result.folder / "logs")
    losses = {
        event.step: value.simple_value
        for event in told
        for value in event.summary.value
        if value.tag == "loss"
    }
    wanted = {i: record["loss"] for i, record in enumerate(result.history, 1)}
    assert losses == pytest.approx(wanted, rel=1e-6)
    images = [v for event in told for v in event.summary.value if v.HasField("image")]
    assert [value.tag.partition("/")[0] for value in images] == ["a_dog"]


def test_a_tracker_whose_package_is_missing_is_named(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    stages = StopAt(-1)
    with pytest.raises(ValueError, match="pip install wandb"):
        personalise(change(settings, "training", log_with=("wandb",)), reporter=stages)
    assert stages.stages == []  # before any work
