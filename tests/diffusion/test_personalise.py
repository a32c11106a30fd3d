"""The main job on a tiny random model: what it leaves, and what it survives."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cntlora_core.cli import main
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.diffusion.job import STATE_NAME, personalise
from cntlora_core.diffusion.settings import (
    AdapterSettings,
    JobSettings,
    OutputSettings,
    PriorSettings,
    SubjectSettings,
    TrainingSettings,
)
from cntlora_core.diffusion.trainer import NonFiniteLossError, SubjectTrainer
from cntlora_core.progress import silent


@pytest.fixture
def settings(tiny_model: Path, photo_folder: Path, tmp_path: Path) -> JobSettings:
    return JobSettings(
        model=str(tiny_model),
        subject=SubjectSettings(images=str(photo_folder), token="sks", class_name="dog"),
        output=OutputSettings(output=str(tmp_path / "out put")),
        prior=PriorSettings(num_class_images=2, class_steps=2, cache=str(tmp_path / "cache")),
        adapter=AdapterSettings(rank=4, alpha=8),
        training=TrainingSettings(steps=6, learning_rate=1e-3, save_every=2, device="cpu"),
    )


def change(settings: JobSettings, part: str, **values: Any) -> JobSettings:
    new = dataclasses.replace(getattr(settings, part), **values)
    return dataclasses.replace(settings, **{part: new})


def losses(result) -> list[float]:
    return [record["loss"] for record in result.history]


class StopAt:
    """A reporter that raises after a number of training steps."""

    def __init__(self, step: int, error: BaseException | None = None) -> None:
        self.step, self.error = step, error or KeyboardInterrupt()
        self.stages: list[str] = []

    def __call__(self, stage: str, done: int, total: int, values: dict[str, Any]) -> None:
        self.stages.append(stage)
        if stage == "training" and done == self.step:
            raise self.error


def test_a_run_leaves_a_lora_pictures_and_a_record(settings):
    stages = StopAt(-1)
    result = personalise(settings, reporter=stages)
    assert result.lora.name == "sks-dog-cross.safetensors"
    for name in ("loss.png", "ranks.png"):
        with Image.open(result.folder / name) as picture:
            assert picture.size[0] > 300
    record = json.loads((result.folder / "run.json").read_text())
    assert JobSettings.from_dict(record["settings"]) == settings
    assert len(record["history"]) == 6
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["seconds"]) >= {"class images", "initialization", "training", "export"}
    # Everything that takes time says so.
    assert {
        "loading the model",
        "encoding photos",
        "drawing class images",
        "encoding class images",
        "reading activations",
        "training",
    } <= set(stages.stages)
    assert not (result.folder / STATE_NAME).exists()
    # The exact file has twice the trained rank, since the base weight was rewritten.
    ranks, trained = record["export"]["ranks"], record["export"]["trained_ranks"]
    assert all(ranks[name] == 2 * trained[name] for name in trained)
    assert sum(trained.values()) == 4 * len(trained)


@pytest.mark.parametrize("method", ["cross", "self", "shift", "lora", "eva"])
def test_training_changes_what_the_method_says(settings, method):
    settings = change(settings, "adapter", method=method)
    result = personalise(change(settings, "training", steps=2))
    assert (result.initialization is None) == (method == "lora")
    tensors = load_file(result.lora)
    rank = {int(t.shape[0]) for k, t in tensors.items() if k.endswith("lora_down.weight")}
    assert (rank == {4}) == (method == "lora")
    assert max(t.abs().max() for k, t in tensors.items() if k.endswith("lora_up.weight")) > 0


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_resumed_run_equals_an_uninterrupted_one(settings, tmp_path, stop, schedule):
    settings = change(settings, "training", lr_schedule=schedule)
    whole = personalise(settings)
    again = change(settings, "output", output=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        personalise(again, reporter=StopAt(stop))
    with pytest.raises(FileExistsError, match="--resume"):
        personalise(again)
    resumed = personalise(again, resume=True)
    assert losses(resumed) == losses(whole)
    a, b = load_file(whole.lora), load_file(resumed.lora)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_resuming_on_another_model_is_refused(settings, tiny_model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        personalise(settings, reporter=StopAt(3))
    other = tmp_path / "other model"
    shutil.copytree(tiny_model, other)
    weights = next((other / "unet").glob("*.safetensors"))
    tensors = {k: v + 0.01 for k, v in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"identity\.model"):
        personalise(dataclasses.replace(settings, model=str(other)), resume=True)
    moved = tmp_path / "moved model"
    shutil.copytree(tiny_model, moved)
    personalise(dataclasses.replace(settings, model=str(moved)), resume=True)


def test_overwriting_forgets_the_old_state(settings, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        personalise(settings, reporter=StopAt(5))

    def poisoned(self, batch):
        raise NonFiniteLossError("the loss of step 1 is nan")

    monkeypatch.setattr(SubjectTrainer, "_loss", poisoned)
    with pytest.raises(NonFiniteLossError) as caught:
        personalise(settings, overwrite=True)
    monkeypatch.undo()
    assert "after step 5" not in str(caught.value)
    assert len(personalise(settings, overwrite=True).history) == 6


def test_a_failing_export_does_not_lose_the_training(settings, monkeypatch):
    settings = change(settings, "training", save_every=100)
    whole = personalise(settings)

    def full_disk(*_args, **_options):
        raise OSError("no space left")

    monkeypatch.setattr("cntlora_core.diffusion.job.export_lora", full_disk)
    with pytest.raises(OSError, match="no space"):
        personalise(settings, overwrite=True)
    monkeypatch.undo()
    resumed = personalise(settings, resume=True)
    assert losses(resumed) == losses(whole)


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


def test_resuming_with_other_settings_or_photos_is_refused(settings, photo_folder):
    with pytest.raises(KeyboardInterrupt):
        personalise(settings, reporter=StopAt(3))
    with pytest.raises(ValueError, match=r"training\.learning_rate"):
        personalise(change(settings, "training", learning_rate=5e-4), resume=True)
    photo = photo_folder / "0.png"
    Image.new("RGB", (40, 40), "green").save(photo)
    with pytest.raises(ValueError, match=r"identity\.photos"):
        personalise(settings, resume=True)


def test_a_finished_run_can_be_extended_from_nothing_only_by_overwriting(settings):
    personalise(change(settings, "training", steps=1))
    with pytest.raises(FileExistsError, match="--overwrite"):
        personalise(settings)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        personalise(settings, resume=True)
    assert len(personalise(settings, overwrite=True).history) == 6


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


def test_class_images_and_latents_are_reused_and_topped_up(settings):
    first = StopAt(-1)
    personalise(change(settings, "training", steps=1), reporter=first)
    again = StopAt(-1)
    personalise(change(settings, "training", steps=1), overwrite=True, reporter=again)
    assert "drawing class images" in first.stages
    assert "drawing class images" not in again.stages
    folder = next((Path(settings.prior.cache) / "class_images").iterdir())
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    more = change(change(settings, "training", steps=1), "prior", num_class_images=3)
    personalise(more, overwrite=True)
    after = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    assert len(after) == 3
    assert before.items() <= after.items()


def test_given_class_images_are_used_and_none_with_weight_zero(settings, tmp_path):
    folder = tmp_path / "dogs"
    folder.mkdir()
    Image.new("RGB", (32, 32), "blue").save(folder / "x.png")
    result = personalise(change(settings, "prior", class_images=str(folder)))
    assert all(record["prior_loss"] > 0 for record in result.history)
    without = change(settings, "prior", prior_weight=0.0)
    result = personalise(without, overwrite=True)
    assert all(record["prior_loss"] == 0 for record in result.history)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("training", {"gradient_checkpointing": True}),
        ("training", {"gradient_accumulation": 2, "batch_size": 2}),
        ("training", {"min_snr_gamma": 5.0}),
        ("training", {"precision": "bfloat16"}),
        ("training", {"precision": "float16"}),
        ("training", {"lr_schedule": "constant_with_warmup", "lr_warmup": 2}),
        ("adapter", {"train_text_encoder": False}),
        ("adapter", {"cntlora": CNTLoRAConfig(preserve_output=False, damping=0.5)}),
        ("subject", {"flip": True}),
        ("output", {"layout": "diffusers", "file_precision": "float16"}),
        ("output", {"layout": "peft"}),
        ("output", {"compress": True}),
    ],
)
def test_every_option_runs(settings, part, values):
    result = personalise(change(change(settings, "training", steps=2), part, **values))
    assert len(result.history) == 2
    assert result.lora.exists()


def test_gradient_checkpointing_gives_the_same_losses(settings):
    plain = personalise(settings)
    settings = change(settings, "training", gradient_checkpointing=True)
    checkpointed = personalise(settings, overwrite=True)
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-4)


def test_samples_are_drawn_while_training(settings):
    prompts = ("a photo of sks dog", "a photo of sks dog in the snow")
    settings = change(settings, "training", sample_prompts=prompts, sample_every=4)
    result = personalise(settings)
    names = sorted(p.name for p in (result.folder / "samples").iterdir())
    assert [n[:6] for n in names] == ["000004", "000004", "000006", "000006"]


def test_drawing_samples_does_not_change_the_training(settings):
    plain = personalise(settings)
    settings = change(settings, "training", sample_prompts=("a dog",), sample_every=2)
    assert losses(personalise(settings, overwrite=True)) == losses(plain)


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


RUN = """
import sys
from cntlora_core.cli import main
sys.exit(main(sys.argv[1:]))
"""


def command(settings: JobSettings, *more: str) -> list[str]:
    return [
        sys.executable, "-c", RUN, "train",
        "--model", settings.model, "--images", settings.subject.images,
        "--token", "sks", "--class-name", "dog", "--output", settings.output.output,
        "--cache", str(settings.prior.cache), "--num-class-images", "2", "--class-steps", "2",
        "--rank", "4", "--alpha", "8", "--learning-rate", "1e-3", "--device", "cpu",
        "--save-every", "2", *more,
    ]  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_ctrl_c_and_kill_leave_a_state_that_resumes_to_the_same_result(settings, tmp_path):
    steps = 40
    settings = change(settings, "training", steps=steps)
    whole = personalise(change(settings, "output", output=str(tmp_path / "whole")))
    state = Path(settings.output.output) / STATE_NAME
    arguments = command(settings, "--steps", str(steps))
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    process = subprocess.Popen(arguments, **options)
    wait_for(state, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "--resume" in errors

    process = subprocess.Popen([*arguments, "--resume"], **options)
    before = state.stat().st_mtime_ns
    while process.poll() is None and state.exists() and state.stat().st_mtime_ns == before:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert state.exists(), "the run finished before it could be killed: give it more steps"

    done = subprocess.run([*arguments, "--resume"], check=False, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    a, b = load_file(whole.lora), load_file(done.stdout.strip().splitlines()[-1])
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [p.name for p in state.parent.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s, p: change(s, "training", device="abacus"), "abacus"),
        (lambda s, p: change(s, "subject", images=str(p / "none")), "none"),
        (lambda s, p: change(s, "subject", token="dog"), "share the word"),
        (lambda s, p: change(s, "subject", class_name=None), "class name"),
        (lambda s, p: change(s, "subject", resolution=33), "multiple of 2"),
        (lambda s, p: change(s, "adapter", rank=64), "more than their widths hold"),
        (lambda s, p: dataclasses.replace(s, model=str(p / "model.ckpt")), "model.ckpt"),
    ],
)
def test_bad_input_is_an_error_in_words(settings, tmp_path, spoil, words):
    with pytest.raises((ValueError, OSError), match=words):
        personalise(spoil(settings, tmp_path))


def test_the_command_says_errors_in_words_and_shows_no_trace(settings, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    settings = change(settings, "subject", images=str(empty))
    done = subprocess.run(command(settings), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert str(empty.name) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/1").exists(), reason="needs /proc")
def test_an_unwritable_output_folder_is_said_before_any_work(settings):
    stages = StopAt(-1)
    with pytest.raises(OSError, match=r"cannot|not"):
        personalise(change(settings, "output", output="/proc/1/out"), reporter=stages)
    assert stages.stages == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--steps", "0"], "steps must be at least 1"), (["--rank", "0"], "rank must be at least 1")],
)
def test_flags_that_make_no_sense_are_refused_without_a_trace(capsys, flags, words):
    given = ["train", "--model", "m", "--images", "i", "--output", "o", *flags]
    assert main(given) == 2
    assert words in capsys.readouterr().err


def test_silent_reporter_takes_anything():
    assert silent("x", 0, 0, {"note": 1}) is None
