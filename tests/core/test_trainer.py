"""transformers' Trainer with an adapter whose initialisation rewrote the base."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cntlora_core import convert_adapter, load_initialized, save_converted
from cntlora_core.adapter.record import RECORD_FILE

from . import trainer_run as run


@pytest.fixture(scope="module", params=["cross", "lava"])
def finished(request, tmp_path_factory):
    """A run of eight steps that was not interrupted: its trainer, and its folder."""
    folder = tmp_path_factory.mktemp("trainer") / request.param
    trainer = run.make_trainer(run.initialised(request.param), folder / "whole")
    trainer.train()
    return trainer, folder


def given(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**run.batches()[0]).logits


def losses(log) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


@pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="a fresh process of transformers 4's Trainer takes other batches, with plain LoRA too",
)
@pytest.mark.parametrize(
    "finished", ["cross", pytest.param("lava", marks=pytest.mark.slow)], indirect=True
)
@pytest.mark.thorough
def test_a_run_resumed_in_a_fresh_process_ends_as_one_that_was_not_interrupted(finished):
    trainer, folder = finished
    copied = folder / "killed"
    shutil.copytree(folder / "whole" / "checkpoint-6", copied / "checkpoint-6")
    subprocess.run(
        [sys.executable, run.__file__, str(copied)], check=True, timeout=300, capture_output=True
    )
    log = json.loads((copied / "log.json").read_text())
    expected = losses(trainer.state.log_history)
    assert losses(log) == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 8
    whole, resumed = (
        load_file(folder / name / "checkpoint-8" / "adapter_model.safetensors")
        for name in ("whole", "killed")
    )
    for key, tensor in whole.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=1e-3, atol=1e-5)
    # The converted checkpoints of the resumed run are those of the whole one.
    for name in ("whole", "killed"):
        stock = PeftModel.from_pretrained(run.base(), folder / name / "converted" / "checkpoint-8")
        model = load_initialized(run.base(), folder / "whole" / "checkpoint-8")
        torch.testing.assert_close(given(stock), given(model), rtol=1e-3, atol=1e-4)


def test_the_best_model_at_the_end_is_the_best_checkpoint_on_the_stock_base(finished, tmp_path):
    trainer, folder = finished
    best = Path(trainer.state.best_model_checkpoint)
    save_converted(trainer.model, tmp_path / "end")
    expected = given(trainer.model)
    for adapter in (tmp_path / "end", folder / "whole" / "converted" / best.name):
        stock = PeftModel.from_pretrained(run.base(), adapter)
        torch.testing.assert_close(given(stock), expected, rtol=1e-3, atol=1e-4)
    assert (given(run.base()) - expected).abs().max() > 1e-2


def test_a_checkpoint_is_refused_on_the_stock_base_and_can_be_converted_alone(finished, tmp_path):
    _, folder = finished
    checkpoint = folder / "whole" / "checkpoint-6"
    with pytest.raises(ValueError, match="fit a rewritten base model"):
        PeftModel.from_pretrained(run.base(), checkpoint)
    convert_adapter(checkpoint, tmp_path / "converted")
    stock = PeftModel.from_pretrained(run.base(), tmp_path / "converted")
    expected = given(load_initialized(run.base(), checkpoint))
    torch.testing.assert_close(given(stock), expected, rtol=1e-3, atol=1e-4)


def test_converted_checkpoints_go_with_the_trainer_s_own(finished):
    _, folder = finished
    kept = {path.name for path in (folder / "whole").glob("checkpoint-*")}
    assert kept == {path.name for path in (folder / "whole" / "converted").iterdir()}
    assert len(kept) == 3  # of four that were written


def test_going_on_from_another_initialisation_is_refused(finished, tmp_path):
    _, folder = finished
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(folder / "whole" / "checkpoint-6", checkpoint)
    record = shutil.copytree(checkpoint, tmp_path / "another") / RECORD_FILE
    with safe_open(record, "pt") as file:
        tensors = {name: 1.5 * file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, record, file.metadata())
    other = load_initialized(run.base(), tmp_path / "another", is_trainable=True)
    with pytest.raises(ValueError, match=r"another initialisation.*load_initialized"):
        run.make_trainer(other, tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(RuntimeError, match="size mismatch"):  # the plain ranks are no others' ranks
        run.make_trainer(run.plain(folder.name), tmp_path).train(resume_from_checkpoint=True)


def test_the_recipe_of_the_docs_trains_resumes_and_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    docs = Path(__file__).parents[2] / "docs" / "any_model.md"
    blocks = re.findall(r"```python\n(.*?)```", docs.read_text("utf-8"), re.DOTALL)
    (recipe,) = [block for block in blocks if "ConvertedCheckpoints" in block]
    recipe = recipe.replace("save_steps=100, eval_steps=100", "save_steps=2, eval_steps=2")
    for steps in (2, 4):  # the second one goes on from the first
        names = {
            "base": run.base(),
            "lora_config": run.config("cross"),
            "dataloader": run.batches(),
            "train": run.examples(),
            "validation": run.examples(16, seed=8),
        }
        short = recipe.replace('"runs/one", ', f'"runs/one", max_steps={steps}, use_cpu=True, ')
        exec(compile(short, str(docs), "exec"), names)
        assert names["trainer"].state.global_step == steps
        assert (names["checkpoint"] is None) == (steps == 2)
    stock = PeftModel.from_pretrained(run.base(), tmp_path / "adapter")
    torch.testing.assert_close(given(stock), given(names["model"]), rtol=1e-3, atol=1e-4)
