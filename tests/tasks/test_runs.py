"""A run of any recipe: resumed, cancelled, diverged, begun anew; data types; AdaLoRA's own term."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification, DebertaV2Config

from cntlora_core.commands.config_file import with_config
from cntlora_core.methods.comparisons import AdaLoraOrthogonality
from cntlora_core.runtime.console import Cancelled
from cntlora_core.tasks.presets import TEXT
from cntlora_core.tasks.run import run_task, training_arguments
from cntlora_core.tasks.settings import planned
from cntlora_core.tasks.text import TextSettings, text_task, train_text

from .conftest import SHAPE, make_tokenizer
from .test_text import SENTENCES, logits, rte, settings


def stopping(stage_begins: str, at: int):
    def stop(stage, done, _total, _values):
        if stage.startswith(stage_begins) and done == at:
            raise Cancelled

    return stop


def checkpoints(run: TextSettings) -> list[str]:
    return sorted(path.name for path in Path(run.output, "checkpoints").glob("checkpoint-*"))


def test_a_run_that_diverged_is_recorded(tmp_path, tiny_roberta):
    wanted = settings(tmp_path, tiny_roberta, learning_rate=1e30)
    result = train_text(wanted, data=rte())
    record = json.loads((result.folder / "metrics.json").read_text())
    curves = json.loads((result.folder / "curves.json").read_text())
    assert record["metrics"]["validation"]["loss"] is None
    assert curves["validation"][-1]["loss"] is None
    assert curves["training"][0]["loss"] > 0


def test_a_run_is_resumed_with_its_own_settings_alone(tmp_path, tiny_roberta):
    wanted = settings(tmp_path, tiny_roberta, method="cross", steps=4, eval_every=2)
    with pytest.raises(Cancelled):
        train_text(wanted, stopping("training", 2), data=rte())
    again = dataclasses.replace(wanted, resume=True)
    for other in ({"rank": 4}, {"seed": 1}, {"steps": 6}, {"method": "lora"}):
        with pytest.raises(ValueError, match=f"these differ: {next(iter(other))}.*run.json"):
            train_text(dataclasses.replace(again, **other), data=rte())
    result = train_text(dataclasses.replace(again, workers=0, eval_batch_size=3), data=rte())
    record = json.loads((result.folder / "metrics.json").read_text())
    assert record["initialisation"]["pass_seconds"] > 0
    assert json.loads((result.folder / "ranks.json").read_text())


def test_a_run_stopped_while_it_measures_keeps_its_steps(tmp_path, tiny_roberta):
    wanted = settings(tmp_path, tiny_roberta, steps=6, eval_every=6)
    with pytest.raises(Cancelled):
        train_text(wanted, stopping("measuring", 1), data=rte())
    assert checkpoints(wanted) == ["checkpoint-6"]
    whole = train_text(dataclasses.replace(wanted, output=str(tmp_path / "whole")), data=rte())
    resumed = train_text(dataclasses.replace(wanted, resume=True), data=rte())
    assert resumed.metrics["validation"]["loss"] == pytest.approx(
        whole.metrics["validation"]["loss"], rel=1e-4
    )


@pytest.mark.thorough
def test_the_last_checkpoint_is_kept_beside_the_best(tmp_path, tiny_roberta):
    wanted = settings(
        tmp_path, tiny_roberta, steps=9, eval_every=2, learning_rate=1e-12, select_best=True,
        keep_checkpoints=1,
    )  # fmt: skip
    with pytest.raises(Cancelled):  # the metric stays the same: the first is the best
        train_text(wanted, stopping("training", 7), data=rte())
    assert checkpoints(wanted)[-1] == "checkpoint-7"


@pytest.mark.thorough
def test_a_run_begun_anew_leaves_nothing_of_the_old_one(tmp_path, tiny_roberta):
    wanted = settings(tmp_path, tiny_roberta, method="cross", keep_checkpoints=1)
    folder = train_text(wanted, data=rte()).folder
    (folder / "generated-validation.json").write_text("[]")
    (folder / "notes.txt").write_text("mine")
    wrong = dataclasses.replace(wanted, overwrite=True, accumulate=3)
    with pytest.raises(ValueError, match="cannot be shared"):
        train_text(wrong, data=rte())
    assert (folder / "metrics.json").exists()
    assert checkpoints(wanted)
    full = dataclasses.replace(wanted, overwrite=True, method="full", learning_rate=1e-4)
    with pytest.raises(Cancelled):
        train_text(full, stopping("training", 1), data=rte())
    assert {path.name for path in folder.iterdir()} == {"run.json", "checkpoints", "notes.txt"}


def test_settings_from_a_record_begin_another_run(tmp_path):
    record = {"settings": {"rank": 3, "resume": True, "overwrite": True}}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    arguments = with_config(["task", "text", "--config", str(tmp_path / "metrics.json")])
    assert arguments == ["task", "text", "--rank=3"]


def test_a_process_has_one_device(tmp_path, tiny_roberta, monkeypatch):
    wanted = settings(tmp_path, tiny_roberta, device=None)
    plan = planned(wanted, TEXT["cntlora"]["rte"])
    task = text_task(plan, wanted, data=rte())
    monkeypatch.setattr(
        "transformers.TrainingArguments._setup_devices",
        property(lambda args: setattr(args, "_n_gpu", 4) or torch.device("cuda", 0)),
    )
    monkeypatch.setattr("transformers.TrainingArguments.device", torch.device("cuda", 0))
    assert training_arguments(plan, 16, tmp_path, task, True)._n_gpu == 1


@pytest.mark.parametrize("method", ["full", "bitfit", "lora"])
def test_what_is_trained_is_float32_whatever_the_base_is(method, tmp_path, tiny_roberta):
    wanted = settings(
        tmp_path, tiny_roberta, method=method, base_precision="bfloat16", precision="bfloat16",
        learning_rate=1e-4, steps=2,
    )  # fmt: skip
    result = train_text(wanted, data=rte())
    trained = {p.dtype for p in result.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    if method == "lora":
        frozen = {p.dtype for p in result.model.parameters() if not p.requires_grad}
        assert torch.bfloat16 in frozen
        other = dataclasses.replace(wanted, precision="float32", output=str(tmp_path / "other"))
        with pytest.raises(ValueError, match="give precision='bfloat16' too"):
            train_text(other, data=rte())


def test_what_is_refused_leaves_an_earlier_run_alone(tmp_path, tiny_roberta):
    wanted = settings(tmp_path, tiny_roberta, steps=1, max_eval=2)
    metrics = train_text(wanted, data=rte()).folder / "metrics.json"
    again = dataclasses.replace(wanted, base_precision="bfloat16", overwrite=True)
    with pytest.raises(ValueError, match="give precision='bfloat16' too"):
        train_text(again, data=rte())
    assert metrics.exists()


def test_a_learning_rate_of_no_head_is_refused(tmp_path, tiny_roberta):
    wanted = settings(tmp_path, tiny_roberta, head_learning_rate=1e-3)
    preset = dataclasses.replace(TEXT["cntlora"]["rte"], head=())
    plan = planned(wanted, preset)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_roberta, num_labels=2)
    task = text_task(plan, wanted, data=rte(), model=model)
    with pytest.raises(ValueError, match="there are none"):
        run_task(task, plan)


@pytest.mark.parametrize("own", [True, False])
def test_adalora_has_its_regulariser_however_it_was_asked_for(own, tmp_path, tiny_roberta):
    wanted = settings(
        tmp_path, tiny_roberta, method="lora" if own else "adalora", steps=9, max_eval=2,
        keep_checkpoints=0, select_best=False,
    )  # fmt: skip
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["query"])
    plan = planned(wanted, TEXT["cntlora"]["rte"])
    task = text_task(plan, wanted, data=rte())
    with patch.object(
        AdaLoraOrthogonality, "__call__", autospec=True, side_effect=AdaLoraOrthogonality.__call__
    ) as term:
        run_task(task, plan, config=config if own else None)
    assert term.call_count == 9


@pytest.mark.parametrize(
    "more", [{"schedule": "constant"}, {"eval_every": 1, "select_best": True}, {"method": "full"}]
)
def test_a_run_resumed_at_its_last_step_is_measured_again(more, tmp_path, tiny_roberta):
    given = {"steps": 2, "eval_every": 2, "select_best": False}
    wanted = settings(tmp_path, tiny_roberta, **{**given, **more})
    results = []
    for asked in (wanted, dataclasses.replace(wanted, resume=True)):
        plan = planned(asked, TEXT["cntlora"]["rte"])
        task = text_task(plan, asked, data=rte())
        rows_of, said = task.measure, task.generated

        def measure(model, batch, rows_of=rows_of, said=said):
            said.append({"said": 1})
            return rows_of(model, batch)

        result = run_task(dataclasses.replace(task, measure=measure), plan)
        written = result.folder / "generated-validation.json"
        results.append((result.metrics, result.curves, json.loads(written.read_text())))
        written.unlink()
    assert results[0] == results[1]


def test_a_run_in_float32_after_one_in_bfloat16_is_in_float32(tmp_path, tiny_roberta):
    losses = []
    for i, precision in enumerate(("float32", "bfloat16", "float32")):
        wanted = settings(tmp_path, tiny_roberta, precision=precision, keep_checkpoints=0)
        result = train_text(dataclasses.replace(wanted, output=str(tmp_path / str(i))), data=rte())
        losses.append([point["loss"] for point in result.curves.training])
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.thorough
def test_layers_that_the_pre_trained_weights_lack_are_trained_and_saved(tmp_path):
    tokenizer = make_tokenizer()
    shape = DebertaV2Config(
        vocab_size=len(tokenizer), pad_token_id=1, pooler_hidden_size=SHAPE["hidden_size"], **SHAPE
    )
    torch.manual_seed(0)
    AutoModel.from_config(shape).save_pretrained(tmp_path / "deberta")
    tokenizer.save_pretrained(tmp_path / "deberta")
    wanted = settings(tmp_path, tmp_path / "deberta", targets=("query_proj", "value_proj"))
    result = train_text(wanted, data=rte())
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "deberta", num_labels=2)
    found = PeftModel.from_pretrained(stock, result.adapter)
    torch.testing.assert_close(
        logits(found, tokenizer), logits(result.model, tokenizer), rtol=1e-3, atol=1e-5
    )


def test_adalora_s_regulariser_is_peft_s(tmp_path, tiny_roberta):
    tokenizer = make_tokenizer()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    batch["labels"] = torch.tensor([0, 1, 1, 0])
    losses = []
    for kind in (TaskType.SEQ_CLS, None):
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(tiny_roberta, num_labels=2)
        config = AdaLoraConfig(
            init_r=3, target_r=2, total_step=9, target_modules=["query"], task_type=kind
        )
        model = get_peft_model(base, config).eval()
        losses.append(float(model(**batch).loss.detach()))
    term = AdaLoraOrthogonality(model)()
    assert float(term.detach()) > 0.01
    assert losses[1] + float(term.detach()) == pytest.approx(losses[0], rel=1e-5)
    wanted = settings(tmp_path, tiny_roberta, method="adalora", steps=2, log_every=1)
    seen = []
    train_text(wanted, data=rte(), callbacks=(), reporter=lambda *args: seen.append(args))
    losses = [values["loss"] for *_, values in seen if "loss" in values]
    assert losses[0] > 0.9, "about 0.7 without the regulariser"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"method": "adalora", "select_best": True}, "give select_best=False"),
        ({"method": "vera", "lora_plus": 16.0}, "vera has not"),
        ({"preset": "lava", "lora_plus": 16.0}, "LAVA has not"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(more, words, tmp_path, tiny_roberta):
    with pytest.raises(ValueError, match=words):
        train_text(settings(tmp_path, tiny_roberta, **more), data=rte())


@pytest.mark.thorough
def test_a_preset_s_choice_of_the_best_needs_checkpoints(tmp_path, tiny_roberta):
    wanted = settings(tmp_path, tiny_roberta, preset="lava", keep_checkpoints=0)
    result = train_text(wanted, data=rte())
    record = json.loads((result.folder / "metrics.json").read_text())
    assert record["decided"]["select_best"] is False
