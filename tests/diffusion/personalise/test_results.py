"""What a run leaves behind: the LoRA, pictures, a record, and notes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cntlora_core.diffusion.job import STATE_NAME, personalise
from cntlora_core.diffusion.settings import JobSettings
from cntlora_core.runtime.progress import silent

from ..conftest import StopAt, change


@pytest.mark.plots
def test_a_run_leaves_a_lora_pictures_and_a_record(settings):
    shutil.rmtree(settings.prior.cache)
    stages = StopAt(-1)
    result = personalise(settings, reporter=stages)
    assert result.lora.name == "sks-dog-cross.safetensors"
    for name in ("loss.png", "ranks.png"):
        with Image.open(result.folder / name) as picture:
            assert picture.size[0] > 300
    record = json.loads((result.folder / "run.json").read_text())
    used = change(settings, "training", precision="float32")  # what auto is on a CPU
    assert JobSettings.from_dict(record["settings"]) == used
    assert len(record["history"]) == 6
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["seconds"]) >= {"class images", "initialization", "training", "export"}
    # Everything that takes time says so.
    assert {
        "loading the model",
        "encoding photos",
        "generating class images",
        "encoding class images",
        "reading activations",
        "training",
    } <= set(stages.stages)
    assert (result.folder / STATE_NAME).is_file()
    # The exact file has twice the trained rank, since the base weight was rewritten.
    ranks, trained = record["export"]["ranks"], record["export"]["trained_ranks"]
    assert all(ranks[name] == 2 * trained[name] for name in trained)
    assert sum(trained.values()) == 4 * len(trained)


@pytest.mark.parametrize("method", ["cross", "lora"])
def test_training_changes_what_the_method_says(settings, method):
    settings = change(settings, "adapter", method=method)
    result = personalise(change(settings, "training", steps=2))
    assert (result.initialization is None) == (method == "lora")
    tensors = load_file(result.lora)
    rank = {int(t.shape[0]) for k, t in tensors.items() if k.endswith("lora_down.weight")}
    assert (rank == {4}) == (method == "lora")
    assert max(t.abs().max() for k, t in tensors.items() if k.endswith("lora_up.weight")) > 0


def test_paths_are_taken_for_text_and_recorded(settings):
    given = dataclasses.replace(settings, model=Path(settings.model))
    for part, names in {"subject": ["images"], "output": ["output"], "prior": ["cache"]}.items():
        values = {name: Path(getattr(getattr(settings, part), name)) for name in names}
        given = change(given, part, **values)
    assert given == settings
    result = personalise(change(given, "training", steps=1))
    record = json.loads((result.folder / "run.json").read_text())
    assert record["settings"]["model"] == settings.model


@pytest.mark.parametrize(
    ("part", "values", "named"),
    [
        ("training", {"seed": torch.tensor(1)}, r"training\.seed"),
        ("training", {"sample_prompts": (b"a dog",)}, "sample_prompts must be text"),
        ("output", {"name": Path("x")}, "name must be text"),
        ("subject", {"flip": {1}}, r"subject\.flip"),
    ],
)
def test_settings_that_cannot_be_recorded_are_refused_before_any_work(
    settings, part, values, named
):
    with pytest.raises(TypeError, match=named):
        change(settings, part, **values)


def test_long_prompts_and_odd_tokens_are_said(settings, photo_folder):
    notes = []
    (photo_folder / "1.txt").write_text("a photo of sks dog " + "in the red snow " * 40)
    (photo_folder / "2.txt").write_text("a photo of a dog")

    def reporter(stage, done, total, values):
        notes.extend([values["note"]] if "note" in values else [])

    result = personalise(change(settings, "training", steps=1), reporter=reporter)
    text = "\n".join(notes)
    assert "is left out" in text
    assert "does not contain the token" in text
    assert tuple(notes) == result.notes


def test_silent_reporter_takes_anything():
    assert silent("x", 0, 0, {"note": 1}) is None
