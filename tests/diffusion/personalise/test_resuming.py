"""Interrupted, killed or failed runs resume to the same result, or are overwritten."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cntlora_core.diffusion.job import STATE_NAME, JobResult, personalise
from cntlora_core.diffusion.run_identity import check_same_run
from cntlora_core.diffusion.run_lock import HOLDER_NAME
from cntlora_core.diffusion.settings import JobSettings
from cntlora_core.diffusion.state import TrainingState
from cntlora_core.diffusion.trainer import NonFiniteLossError, SubjectTrainer
from cntlora_core.runtime.threads import threads

from ..conftest import ForkedCommand, StopAt, change, command, losses


@pytest.mark.parametrize(
    ("stop", "schedule"), [pytest.param(1, "constant", marks=pytest.mark.thorough), (4, "cosine")]
)
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


def test_a_run_within_a_run_s_folder_is_refused_and_both_can_follow_one_another(settings):
    def meddle(stage, done, _total, _values):
        if stage == "training" and done == 3:
            with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
                personalise(settings, overwrite=True)

    result = personalise(settings, reporter=meddle)
    assert result.lora.is_file()
    assert not (result.folder / HOLDER_NAME).exists()
    assert personalise(settings, overwrite=True).lora.is_file()


@pytest.mark.thorough
def test_a_run_goes_on_where_class_images_were_generated_again_with_other_rounding(settings):
    with pytest.raises(KeyboardInterrupt):
        personalise(settings, reporter=StopAt(3))
    path = next(Path(settings.prior.cache).glob("class_images/*/00000.png"))
    with Image.open(path) as picture:
        red, green, blue = picture.getpixel((0, 0))
        picture.putpixel((0, 0), (red ^ 1, green, blue))
        picture.save(path)
    assert len(personalise(settings, resume=True).history) == 6
    with pytest.raises(KeyboardInterrupt):
        personalise(settings, overwrite=True, reporter=StopAt(3))
    shutil.rmtree(settings.prior.cache)
    assert len(personalise(settings, resume=True).history) == 6


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


def test_resuming_with_other_settings_or_photos_is_refused(settings, photo_folder):
    with pytest.raises(KeyboardInterrupt):
        personalise(settings, reporter=StopAt(3))
    with pytest.raises(ValueError, match=r"training\.learning_rate"):
        personalise(change(settings, "training", learning_rate=5e-4), resume=True)
    photo = photo_folder / "0.png"
    Image.new("RGB", (40, 40), "green").save(photo)
    with pytest.raises(ValueError, match=r"identity\.photos"):
        personalise(settings, resume=True)


def test_a_setting_that_is_newer_than_the_state_and_off_is_no_other_setting(settings):
    with pytest.raises(KeyboardInterrupt):
        personalise(settings, reporter=StopAt(3))
    state = TrainingState.load(Path(settings.output.output) / STATE_NAME)
    given = {"job": copy.deepcopy(state.settings["job"])}
    del state.settings["job"]["training"]["noise_offset"]
    check_same_run(state, given)
    given["job"]["training"]["noise_offset"] = 0.1
    with pytest.raises(ValueError, match=r"training\.noise_offset"):
        check_same_run(state, given)


def test_a_finished_run_without_its_state_is_begun_anew_only_by_overwriting(settings):
    settings = change(settings, "output", keep_state=False)
    personalise(change(settings, "training", steps=1))
    with pytest.raises(FileExistsError, match="--overwrite"):
        personalise(settings)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        personalise(settings, resume=True)
    assert len(personalise(settings, overwrite=True).history) == 6


def trained_steps(settings: JobSettings, **options: Any) -> tuple[int, JobResult]:
    """The result, and how many steps were trained for it."""
    steps = []

    def note(stage: str, done: int, _total: int, _values: dict[str, Any]) -> None:
        if stage == "training":
            steps.append(done)

    result = personalise(settings, reporter=note, **options)
    return len(steps), result


def same_tensors(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_more_steps_go_on_from_a_finished_run_to_the_same_result(settings, tmp_path):
    settings = change(settings, "training", lr_schedule="constant_with_warmup", lr_warmup=5)
    short = change(settings, "training", steps=4)
    personalise(short)
    with pytest.raises(FileExistsError, match=r"finished run of 4 steps.*--resume.*--overwrite"):
        personalise(settings)
    steps, longer = trained_steps(settings, resume=True)
    assert steps == 2
    record = json.loads((longer.folder / "run.json").read_text("utf-8"))
    assert len(record["history"]) == len(longer.history) == 6
    whole = personalise(change(settings, "output", output=str(tmp_path / "whole")))
    assert losses(longer) == losses(whole)
    assert same_tensors(longer.lora, whole.lora)
    with pytest.raises(ValueError, match="has done 6 steps, more than the 4"):
        personalise(short, resume=True)


def test_names_layouts_and_what_saves_memory_are_no_reason_to_train_again(settings):
    settings = change(settings, "training", steps=2)
    first = personalise(settings)
    before = first.lora.read_bytes()
    renamed = change(settings, "output", name="rex", compress=False, layout="diffusers")
    steps, second = trained_steps(renamed, resume=True)
    assert steps == 0
    assert second.lora.name == "rex.safetensors"
    assert first.lora.read_bytes() == before
    assert second.export.truncation_error is None  # it was not asked for
    assert losses(second) == losses(first)
    saving = change(settings, "training", gradient_checkpointing=True)
    saving = change(saving, "output", name="rex again")
    steps, third = trained_steps(saving, resume=True)
    assert steps == 0
    assert same_tensors(first.lora, third.lora)


def test_gradient_checkpointing_trains_the_same_lora(settings, tmp_path):
    settings = change(settings, "training", steps=3)
    plain = personalise(settings)
    settings = change(settings, "output", output=str(tmp_path / "saving memory"))
    saving = personalise(change(settings, "training", gradient_checkpointing=True))
    assert same_tensors(plain.lora, saving.lora)


def test_a_finished_run_is_gone_on_with_only_as_the_run_that_it_was(settings, monkeypatch):
    cosine = change(settings, "training", lr_schedule="cosine", steps=1)
    personalise(cosine)
    with pytest.raises(ValueError, match="the learning rate of each step depends on their number"):
        personalise(change(cosine, "training", steps=2), resume=True)
    trained, renamed = trained_steps(change(cosine, "output", name="rex"), resume=True)
    assert (trained, renamed.lora.stem) == (0, "rex")
    with pytest.raises(ValueError, match=r"training\.learning_rate"):
        personalise(change(cosine, "training", learning_rate=5e-4), resume=True)
    monkeypatch.setattr("cntlora_core.diffusion.run_identity.ALGORITHM", 10**6)
    with pytest.raises(ValueError, match=r"identity\.algorithm"):
        personalise(cosine, resume=True)


def wait_for(state: Path, process: ForkedCommand, other_than: int | None = None) -> None:
    """Until the state is there, or another than the one of that time."""
    deadline = time.monotonic() + 120
    while not state.exists() or state.stat().st_mtime_ns == other_than:
        assert process.running, process.end()
        assert time.monotonic() < deadline, f"{state} did not appear"
        time.sleep(0.005)


@pytest.mark.thorough
def test_ctrl_c_sigterm_and_kill_leave_a_state_that_resumes_to_the_same_result(plain, tmp_path):
    steps = 40
    settings = change(plain, "training", steps=steps, save_every=2)
    whole = personalise(change(settings, "output", output=str(tmp_path / "whole")))
    state = Path(settings.output.output) / STATE_NAME
    arguments = command(settings, "--steps", str(steps), "--method", "lora", "--prior-weight", "0")

    process = ForkedCommand(arguments, tmp_path)
    wait_for(state, process)
    status, _, errors = process.end(signal.SIGINT)
    assert status == 130, errors
    assert "--resume" in errors

    before = state.stat().st_mtime_ns
    process = ForkedCommand([*arguments, "--resume"], tmp_path)
    wait_for(state, process, before)
    with pytest.raises(BlockingIOError, match=f"another run, process {process.pid} on"):
        personalise(settings, overwrite=True)
    status, _, errors = process.end(signal.SIGTERM)
    assert status == 128 + signal.SIGTERM, errors
    assert "--resume" in errors

    before = state.stat().st_mtime_ns
    process = ForkedCommand([*arguments, "--resume"], tmp_path)
    wait_for(state, process, before)
    status, _, errors = process.end(signal.SIGKILL)
    assert status == -signal.SIGKILL, "it finished before: give it more steps"

    status, said, errors = ForkedCommand([*arguments, "--resume"], tmp_path).end()
    assert status == 0, errors
    a, b = load_file(whole.lora), load_file(said.strip().splitlines()[-1])
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [p.name for p in state.parent.iterdir() if p.name.endswith(".tmp")] == []


def test_a_small_model_is_trained_on_one_thread_and_the_process_keeps_its_own_number(settings):
    numbers = []

    def note(stage, _done, _total, _values):
        if stage != "notes":
            numbers.append((stage, torch.get_num_threads()))

    with threads(2):
        result = personalise(settings, reporter=note)
        assert torch.get_num_threads() == 2
    within = dict(numbers)  # the last report of each stage
    assert within["training"] == 1
    assert within["encoding photos"] == 1
    assert len(result.history) == 6


def test_a_run_is_resumed_with_the_threads_it_had(settings, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        personalise(settings, reporter=StopAt(3))
    monkeypatch.setattr("cntlora_core.diffusion.job.threads_for", lambda unet: 2)
    result = personalise(settings, resume=True)
    record = json.loads((result.folder / "run.json").read_text("utf-8"))
    assert record["machine"]["threads"] == 1
