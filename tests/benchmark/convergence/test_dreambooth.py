"""DreamBooth's public folder: its file of prompts and classes, and a run on such a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from cntlora_core import mini
from cntlora_core.benchmark.convergence.command import tasks_of
from cntlora_core.benchmark.convergence.grid import Bench, Run, read_grid
from cntlora_core.benchmark.convergence.run import execute
from cntlora_core.benchmark.convergence.subjects import (
    bench_subject,
    dreambooth_subjects,
    parse_prompts_and_classes,
    subject_names,
)
from cntlora_core.cli import main
from cntlora_core.diffusion.random_checkpoint import write_random_checkpoint

GRIDS = Path(__file__).parents[3] / "docs" / "experiments" / "grids"
TEXT = """Classes

subject_name,class
backpack,backpack
bear_plushie,stuffed animal
dog,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


@pytest.fixture
def dreambooth(tmp_path: Path) -> Path:
    folder = tmp_path / "dreambooth"
    for name in ("backpack", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            image = Image.new("RGB", (80, 70), (40 * i, 90, 200 - 30 * i))
            ImageDraw.Draw(image).ellipse((5 + i, 6, 30, 40), fill=(230, 60 * i, 20))
            image.save(folder / name / f"0{i}.jpg")
    (folder / "prompts_and_classes.txt").write_text(TEXT)
    return folder


def test_the_file_gives_classes_and_prompts():
    found = parse_prompts_and_classes(TEXT)
    assert {name: own.class_name for name, own in found.items()} == {
        "backpack": "backpack",
        "bear_plushie": "stuffed animal",
        "dog": "dog",
    }
    assert found["dog"].templates == ("a {} in the jungle", "a {} wearing a red hat")
    assert found["bear_plushie"].templates == ("a {} in the jungle", "a red {}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "no object prompts and no live prompts and no classes"),
        (TEXT.replace("Live Subject", "Other"), "no live prompts"),
        (TEXT.replace("a red {0} {1}", "a red {1}"), "does not hold"),
    ],
)
def test_a_file_that_lacks_something_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_prompts_and_classes(text)


def test_only_subjects_with_photos_count(dreambooth: Path, tmp_path: Path):
    assert list(dreambooth_subjects(dreambooth)) == ["backpack", "dog"]
    with pytest.raises(FileNotFoundError, match=r"there is no .*prompts_and_classes"):
        dreambooth_subjects(tmp_path)


def test_photos_can_be_held_out(dreambooth: Path):
    run = Run.of({"subject": "dog", "rank": 4})
    whole = bench_subject(Bench(dreambooth=str(dreambooth)), run)
    assert (len(whole.subject.photos.photos), whole.held_out) == (3, None)
    assert whole.references is whole.subject.photos
    parted = bench_subject(Bench(dreambooth=str(dreambooth), held_out=1), run)
    assert len(parted.subject.photos.photos) == 2
    assert parted.held_out is not None
    assert parted.held_out.photos[0].digest == whole.subject.photos.photos[2].digest
    assert parted.subject.prompts.instance_prompt == "a photo of sks dog"
    with pytest.raises(ValueError, match="held_out=3 leaves none"):
        bench_subject(Bench(dreambooth=str(dreambooth), held_out=3), run)


def test_a_checkpoint_and_the_folder_make_a_run(dreambooth: Path, tmp_path: Path):
    grid_file = tmp_path / "grid.toml"
    grid_file.write_text(
        f"""
        model = "{mini.model_path().as_posix()}"
        dreambooth = "dreambooth"
        device = "cpu"
        [base]
        subject = "all"
        method = "lora"
        rank = 2
        steps = 2
        num_class_images = 1
        class_steps = 1
        [measure]
        per_prompt = 2
        sampling_steps = 1
        drift_images = 1
        dino = "small"
        clip = "small"
        """
    )
    tasks = tasks_of(read_grid(grid_file, subject_names), tmp_path)
    assert [task.run.subject for task in tasks] == ["backpack", "dog"]
    execute(tasks[1])
    record = json.loads((tasks[1].place / "run.json").read_text())
    last = record["rows"][-1]
    assert [row["step"] for row in record["rows"]] == [0, 2]
    assert last["loss"] is None  # the protocol trains on all photos
    assert last["backgrounds"] is None  # the classifier is the small model's own
    assert last["drift"] > 0
    assert all(-1 <= last[name] <= 1 for name in ("dino", "clip_i", "clip_t"))
    with Image.open(tasks[1].place / last["sheet"]) as sheet:
        assert sheet.size == (2 * 64, 2 * 64)  # two prompts, two seeds


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_published_protocol_runs_on_a_full_size_checkpoint(dreambooth: Path, tmp_path: Path):
    """The grid that comes along, by the command: two steps of two methods, one subject."""
    write_random_checkpoint(tmp_path / "sd15", layout="single", dtype=torch.float16)
    text = (GRIDS / "dreambooth.toml").read_text().partition("[[grid]]\nrank = 64")[0]
    for before, after in {
        '"v1-5-pruned-emaonly.safetensors"': '"sd15.safetensors"',
        '"dreambooth/dataset"': '"dreambooth"\ndevice = "cpu"',
        '"all"': '"dog"\nresolution = 64\nnum_class_images = 1\nclass_steps = 1',
        "steps = 1000": "steps = 2",
        '["lora", "eva", "cross", "self", "shift"]': '["lora", "cross"]',
        "pictures_at = [100, 500, 1000]": 'dino = "small"\nclip = "small"\nsampling_steps = 1',
        "per_prompt = 4": "per_prompt = 1\nloss_passes = 1\ndrift_images = 1",
    }.items():
        assert before in text
        text = text.replace(before, after, 1)
    (tmp_path / "grid.toml").write_text(text)
    out = tmp_path / "out"
    command = ["bench", "convergence", str(tmp_path / "grid.toml"), "--output", str(out)]
    assert main([*command, "--workers", "1"]) == 0
    assert main(["bench", "report", str(out)]) == 0
    records = [json.loads(path.read_text()) for path in (out / "runs").glob("*/run.json")]
    assert {r["settings"]["method"] for r in records} == {"lora", "cross"}
    assert all(len(r["ranks"]) == 176 for r in records)  # 128 of the UNet, 48 of the text encoder
    assert "| cross |" in (out / "report.md").read_text()
