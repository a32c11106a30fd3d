"""Trainings that are found, gone on with, lengthened, or begun anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .conftest import Pack, train


class Steps:
    """Counts the training steps that nodes report."""

    def __init__(self, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = 0
        reporter = pack.module("runtime").HostReporter
        plain = reporter._say

        def count(reporter: Any, stage: str, done: int, total: int, values: dict) -> None:
            self.done += stage == "training"
            plain(reporter, stage, done, total, values)

        monkeypatch.setattr(reporter, "_say", count)

    def of(self, *inputs: Any, **widgets: Any) -> tuple[int, Any]:
        """How many steps were trained, and the node's output."""
        before = self.done
        output = train(*inputs, preview_every=0, **widgets)
        return self.done - before, output


@pytest.fixture
def steps(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(pack, monkeypatch)


def test_names_and_exports_train_nothing_and_more_steps_go_on(
    pack: Pack, run: SimpleNamespace, steps: Steps
) -> None:
    graph = (pack, run.initialized.args[0], run.others.args[0])
    done, first = steps.of(*graph, name="once", training_seed=11, steps=2)
    assert done == 2
    folder = Path(first.args[2]).parent
    for changed in (
        {"name": "twice", "gradient_checkpointing": True},
        {"name": "exact", "compress": False},
    ):
        done, output = steps.of(*graph, **{"training_seed": 11, "steps": 2, **changed})
        assert done == 0, changed
        path = Path(output.args[2])
        assert path.parent == folder
        assert path.stem == changed["name"]
    assert (folder / "once.safetensors").is_file()
    done, longer = steps.of(*graph, name="longer", training_seed=11, steps=3)
    assert done == 1
    assert Path(longer.args[2]).parent == folder
    assert len(longer.args[1]["loss"]) == 3
    loras = pack.module("compare_steps").steps_of(longer.args[0])
    assert [step for step, _ in loras] == [2, 3]
    done, shorter = steps.of(*graph, name="once", training_seed=11, steps=2)
    assert done == 2
    assert Path(shorter.args[2]).parent.name == f"once-{folder.name.rpartition('-')[2]}-2"
    assert all(torch.equal(first.args[0][k], tensor) for k, tensor in shorter.args[0].items())
    assert steps.of(*graph, name="once", training_seed=11, steps=2)[0] == 0
    assert steps.of(*graph, name="longer", training_seed=11, steps=3)[0] == 0


def test_with_a_falling_learning_rate_more_steps_are_a_training_of_their_own(
    pack: Pack, run: SimpleNamespace, steps: Steps
) -> None:
    graph = (pack, run.initialized.args[0], run.others.args[0])
    given = {"name": "falling", "training_seed": 12, "lr_schedule": "cosine"}
    two, first = steps.of(*graph, **given, steps=2)
    three, longer = steps.of(*graph, **given, steps=3)
    assert (two, three) == (2, 3)
    assert Path(first.args[2]).parent != Path(longer.args[2]).parent
    assert Path(first.args[2]).is_file()


def test_a_damaged_state_is_said_and_can_be_trained_anew(
    pack: Pack, run: SimpleNamespace, steps: Steps
) -> None:
    inputs = {"training_seed": 13, "steps": 1, "name": "damaged"}
    graph = (pack, run.initialized.args[0], run.others.args[0])
    path = Path(steps.of(*graph, **inputs)[1].args[2])
    (path.parent / "state.safetensors").write_bytes(b"no state")
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read as a training state"):
        steps.of(*graph, **inputs)
    anew = steps.of(*graph, **inputs, trained_before="train anew")[1]
    assert anew.args[2] == str(path)


@pytest.fixture
def folder(run: SimpleNamespace, tmp_path: Path) -> Iterator[Path]:
    """Of the run that all tests share, which is afterwards what it was."""
    folder = Path(run.trained.args[2]).parent
    shutil.copytree(folder, tmp_path / "before")
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "before", folder)


def test_a_cancelled_training_goes_on_to_the_same_lora(
    pack: Pack, run: SimpleNamespace, folder: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy import model_management  # pyright: ignore[reportMissingImports]

    graph = (pack, run.initialized.args[0], run.others.args[0])
    reporter = pack.module("runtime").HostReporter
    plain = reporter._say

    def press_cancel(self: Any, stage: str, done: int, total: int, values: dict) -> None:
        plain(self, stage, done, total, values)
        if stage == "training" and done == 1:
            model_management.interrupt_current_processing()

    with monkeypatch.context() as pressing:
        pressing.setattr(reporter, "_say", press_cancel)
        with pytest.raises(model_management.InterruptProcessingException):
            steps.of(*graph, save_lora_every=1, trained_before="train anew")
    assert not model_management.processing_interrupted()
    assert not (folder / "run.json").exists()  # the training of before is not taken for this one
    assert (folder / "state.safetensors").is_file()
    done, resumed = steps.of(*graph, save_lora_every=1)
    assert done == 1
    record = json.loads((folder / "run.json").read_text("utf-8"))
    assert any("going on after step 2" in note for note in record["notes"])
    assert resumed.args[1] == run.trained.args[1]
    whole = run.trained.args[0]
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.args[0].items())
