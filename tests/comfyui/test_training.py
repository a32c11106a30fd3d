"""Initialisation and training by the nodes, on a tiny random model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from cntlora_core.diffusion.settings import OutputSettings, TrainingSettings

from .conftest import STEPS, WORKFLOW, Pack, train


def test_the_initialisation_keeps_the_budget_and_can_be_trained(run: SimpleNamespace) -> None:
    plan = run.initialized.args[0].initialization.plan
    assert sum(plan.ranks.values()) == 4 * len(plan.ranks)
    assert not any(f.down.is_inference() or f.up.is_inference() for f in plan.factors.values())
    assert run.initialized.args[1].ndim == 4


def test_training_gives_a_lora_losses_and_a_file(run: SimpleNamespace, comfy: Path) -> None:
    lora, losses, path, picture, _ = run.trained.args
    assert len(losses["loss"]) == STEPS
    assert all(np.isfinite(losses["loss"]))
    assert Path(path).parent.parent == comfy / "output" / "cntlora"
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(lora)
        assert lora.metadata == file.metadata()
    assert lora.label == f"cross, {STEPS} steps"
    assert max(float(t.abs().max()) for name, t in lora.items() if "lora_up" in name) > 0
    assert picture.shape[0] == 1
    record = json.loads((Path(path).parent / "run.json").read_text("utf-8"))
    assert record["settings"]["prior"]["num_class_images"] == 2
    assert all(step["prior_loss"] > 0 for step in record["history"])


def test_nodes_show_pictures_that_are_there(run: SimpleNamespace, comfy: Path) -> None:
    for output in (run.subject, run.others, run.initialized, run.trained):
        assert output.ui["images"]
        for image in output.ui["images"]:
            with Image.open(comfy / image["type"] / image["filename"]) as picture:
                picture.load()
    assert len(run.trained.ui["images"]) == 2  # the loss, and the last preview


def test_previews_come_out_in_the_order_of_their_steps(run: SimpleNamespace) -> None:
    previews = run.trained.args[4]
    folder = Path(run.trained.args[2]).parent / "samples"
    paths = [next(folder.glob(f"{step:06d}-*.png")) for step in (2, STEPS)]
    assert previews.shape == (2, 32, 32, 3)
    for preview, path in zip(previews, paths, strict=True):
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(picture), np.rint(preview.numpy() * 255))


def test_previews_of_an_earlier_prompt_are_not_shown(pack: Pack, run: SimpleNamespace) -> None:
    asked = {"validation_prompt": "a cat"}
    again = train(pack, run.initialized.args[0], run.others.args[0], **asked)
    assert again.args[2] == run.trained.args[2]
    assert len(again.ui["images"]) == 1  # the loss
    assert type(again.args[4]).__name__ == "ExecutionBlocker"


def test_the_workflow_is_in_the_header_of_the_file(pack: Pack, run: SimpleNamespace) -> None:
    with safe_open(run.trained.args[2], framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["prompt"]) == WORKFLOW.prompt
    assert json.loads(header["workflow"]) == WORKFLOW.extra_pnginfo["workflow"]
    assert header["modelspec.trigger_phrase"] == "sks"


def test_no_workflow_is_written_where_comfyui_writes_none(
    pack: Pack, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pack.module("workflow")
    assert module.workflow_header(None) == {}
    monkeypatch.setattr(module.command_line, "disable_metadata", True)
    assert module.workflow_header(WORKFLOW) == {}
    saved = pack.run("CNTLoRASave", lora=run.trained.args[0], filename_prefix="bare").args[1]
    with safe_open(saved, framework="pt") as file:
        assert not {"prompt", "workflow"} & file.metadata().keys()
        assert file.metadata()["modelspec.trigger_phrase"] == "sks"


def test_a_finished_training_is_found_again_and_another_one_is_not(
    pack: Pack, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialized, others = run.initialized.args[0], run.others.args[0]

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr("cntlora_core.diffusion.job.personalise", refuse)
    again = train(pack, initialized, others)
    assert again.args[2] == run.trained.args[2]
    assert again.args[1] == run.trained.args[1]
    for other in (
        {"training_seed": 1},
        {"steps": 2},
        {"trained_before": "train anew"},
        {"learning_rate": 2e-3},
    ):
        with pytest.raises(AssertionError, match="it trains"):
            train(pack, initialized, others, **other)
    with pytest.raises(AssertionError, match="it trains"):
        train(pack, initialized)
    monkeypatch.setattr("cntlora_core.diffusion.run_identity.ALGORITHM", 10**6)
    with pytest.raises(AssertionError, match="it trains"):
        train(pack, initialized, others)


@pytest.mark.parametrize(
    ("widgets", "expected"),
    [
        ({"optimizer": "prodigy", "learning_rate": 1e-4, "text_encoder_lr": 5e-5},
         {"learning_rate": 1.0, "text_encoder_lr": None}),
        ({"lr_schedule": "cosine_with_restarts", "lr_power": 3.0},
         {"lr_cycles": 3, "lr_power": 1.0}),
        ({"lr_schedule": "polynomial", "lr_cycles": 5}, {"lr_cycles": 1, "lr_power": 2.0}),
        ({"lr_cycles": 5, "lr_power": 3.0}, {"lr_cycles": 1, "lr_power": 1.0}),
    ],
)  # fmt: skip
def test_widgets_that_do_not_matter_are_not_counted(
    pack: Pack, run: SimpleNamespace, widgets: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Nor does an artist have to know which learning rate an optimizer wants."""
    trained = train(pack, run.initialized.args[0], steps=2, preview_every=0, **widgets)
    record = json.loads((Path(trained.args[2]).parent / "run.json").read_text("utf-8"))
    training = record["settings"]["training"]
    assert training.items() >= expected.items()
    ups = [tensor for name, tensor in trained.args[0].items() if "lora_up" in name]
    assert max(float(tensor.abs().max()) for tensor in ups) > 0


def test_a_text_encoder_that_is_not_adapted_has_no_settings(
    pack: Pack, run: SimpleNamespace
) -> None:
    initialized = run.initialized.args[0]
    alone = dataclasses.replace(initialized.initialization.adapter, train_text_encoder=False)
    planned = dataclasses.replace(initialized.initialization, adapter=alone)
    initialized = dataclasses.replace(initialized, initialization=planned)
    training = TrainingSettings(text_encoder_lr=1e-5, text_encoder_steps=3)
    make = pack.module("training_run").job_settings
    job = make(initialized, None, training, 0.1, OutputSettings(output="out"))
    assert job.training == TrainingSettings()


def test_bad_settings_are_an_error_in_words(pack: Pack, run: SimpleNamespace) -> None:
    def initialize(**inputs: Any) -> Any:
        subject = run.subject.args[0]
        return pack.run("CNTLoRAInitialize", model=run.model, subject=subject, passes=1, **inputs)

    with pytest.raises(ValueError, match="more than their widths hold"):
        initialize(rank=1280)
    with pytest.raises(ValueError, match="belongs to constraint='shift'"):
        initialize(rank=4, shift=10.0)
    with pytest.raises(ValueError, match="lr_warmup=5 has no effect"):
        train(pack, run.initialized.args[0], lr_warmup=5)
    other = dataclasses.replace(run.initialized.args[0].initialization, model="0" * 16)
    moved = dataclasses.replace(run.initialized.args[0], initialization=other)
    with pytest.raises(ValueError, match="made on another model"):
        train(pack, moved)
