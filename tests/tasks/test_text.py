"""GLUE: formats, labels, metrics, training, saving, resuming."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from cntlora_core.methods.registry import METHODS
from cntlora_core.tasks.adapting import initialization_batches
from cntlora_core.tasks.presets import TEXT
from cntlora_core.tasks.scores import matthews_correlation, pearson_correlation
from cntlora_core.tasks.settings import planned
from cntlora_core.tasks.text import GLUE, TextSettings, halved, text_task, train_text

SENTENCES = [
    "the cat sat on the mat",
    "a big dog ran",
    "it is not good",
    "the red dog saw a small cat",
]


def pairs(count: int, **columns) -> list[dict]:
    """Pairs of which the second repeats the first, or not."""
    rows = []
    for i in range(count):
        first, second = SENTENCES[i % 4], SENTENCES[(i + i % 2) % 4]
        rows.append({"sentence1": first, "sentence2": second, "label": int(i % 2 == 0)})
    return [{columns.get(k, k): v for k, v in row.items()} for row in rows]


def rte(train: int = 16, validation: int = 10) -> dict[str, list[dict]]:
    return {"train": pairs(train), "validation": pairs(validation)}


def settings(tmp_path: Path, tiny_roberta: Path, **more) -> TextSettings:
    given = {
        "output": str(tmp_path / "run"),
        "task": "rte",
        "model": str(tiny_roberta),
        "rank": 2,
        "steps": 3,
        "batch_size": 4,
        "learning_rate": 0.02,
        "log_every": 1,
        "device": "cpu",
    }
    return TextSettings(**{**given, **more})


def logits(model, tokenizer) -> torch.Tensor:
    batch = tokenizer(SENTENCES, SENTENCES[::-1], padding=True, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.plots
@pytest.mark.parametrize(
    "more",
    [
        {"method": "cross", "weight_decay": 0.1},
        {"preset": "lava"},
        pytest.param({"adapter": "lava", "method": "self"}, marks=pytest.mark.thorough),
        pytest.param({"method": "adalora", "steps": 4}, marks=pytest.mark.thorough),
        {"method": "full", "layer_decay": 0.5, "keep_checkpoints": 0},
        {"method": "bitfit"},
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_a_run_trains_measures_and_leaves_what_fits_the_stock_base(more, tmp_path, tiny_roberta):
    from .conftest import make_tokenizer

    result = train_text(settings(tmp_path, tiny_roberta, **more), data=rte())
    record = json.loads((result.folder / "metrics.json").read_text())
    curves = json.loads((result.folder / "curves.json").read_text())
    assert record["metrics"] == result.metrics
    last = "test" if more.get("preset") == "lava" else "validation"
    assert {"accuracy", "loss"} <= set(result.metrics[last])
    steps = more.get("steps", 3)
    assert [point["step"] for point in curves["training"]] == list(range(1, steps + 1))
    assert curves["validation"][-1].keys() >= {"step", "accuracy", "loss"}
    assert (result.folder / "curves.png").stat().st_size > 1000
    tokenizer = make_tokenizer()
    expected = logits(result.model, tokenizer)
    stock = AutoModelForSequenceClassification.from_pretrained(tiny_roberta, num_labels=2)
    before = logits(stock, tokenizer)
    assert any((result.folder / "checkpoints").glob("*")) == ("keep_checkpoints" not in more)
    if more.get("method") in ("full", "bitfit"):
        found = AutoModelForSequenceClassification.from_pretrained(result.adapter)
    else:
        found = PeftModel.from_pretrained(stock, result.adapter)
    torch.testing.assert_close(logits(found, tokenizer), expected, rtol=1e-3, atol=1e-4)
    assert (before - expected).abs().max() > 1e-3


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path, tiny_roberta):
    from cntlora_core.runtime.console import Cancelled

    # The interrupted run takes its batches in two parts, which changes nothing either.
    wanted = settings(tmp_path, tiny_roberta, steps=4, eval_every=4, weight_decay=0.5, accumulate=2)
    together = dataclasses.replace(wanted, output=str(tmp_path / "whole"), accumulate=1)
    whole = train_text(together, data=rte())

    def stop(stage, done, total, values):
        if stage.startswith("training") and done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        train_text(wanted, stop, data=rte())
    with pytest.raises(ValueError, match="holds a run already"):
        train_text(wanted, data=rte())
    resumed = train_text(dataclasses.replace(wanted, resume=True), data=rte())
    expected = [point["loss"] for point in whole.curves.training]
    assert [p["loss"] for p in resumed.curves.training] == pytest.approx(expected, rel=1e-4)
    assert resumed.metrics["validation"]["loss"] == pytest.approx(
        whole.metrics["validation"]["loss"], rel=1e-4
    )


def test_what_the_training_measured_at_its_end_is_not_measured_again(
    tmp_path, tiny_roberta, monkeypatch
):
    from cntlora_core.tasks import text

    seen, measure = [], text.measure_classes

    def counting(model, batch):
        seen.append(len(batch["labels"]))
        return measure(model, batch)

    monkeypatch.setattr(text, "measure_classes", counting)
    wanted = settings(
        tmp_path, tiny_roberta, steps=4, eval_every=2, select_best=False, keep_checkpoints=0
    )
    result = train_text(wanted, data=rte())
    assert sum(seen) == 2 * 10, "after steps 2 and 4"
    last = result.curves.validation[-1]
    assert result.metrics["validation"] == {key: last[key] for key in ("accuracy", "loss")}

    seen.clear()
    best = dataclasses.replace(
        wanted, output=str(tmp_path / "best"), keep_checkpoints=1, select_best=True
    )
    train_text(best, data=rte())
    assert sum(seen) == 3 * 10, "the best step may be another"


def write_tsv(path: Path, header: list[str] | None, rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [*([header] if header else []), *rows]
    path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines), "utf-8")


def samples(tmp_path, tiny_roberta, task: str, data: Path):
    wanted = settings(tmp_path, tiny_roberta, task=task, data=str(data))
    found = text_task(planned(wanted, TEXT["cntlora"][task]), wanted)
    return [found.train[i] for i in range(len(found.train))], found


def test_glue_s_own_files_are_read(tmp_path, tiny_roberta):
    pytest.importorskip("datasets")
    cola = [["gj04", 1, "", 'the "cat sat'], ["gj04", 0, "*", "null"]]
    for split in ("train", "dev"):
        write_tsv(tmp_path / f"glue/CoLA/{split}.tsv", None, cola)
    rows, task = samples(tmp_path, tiny_roberta, "cola", tmp_path / "glue")
    assert rows == [(('the "cat sat',), 1), (("null",), 0)]
    assert task.best == "matthews_correlation"
    mnli = [[0, "a cat", "a dog", "contradiction"], [1, "a cat", "a cat", "entailment"]]
    header = ["index", "sentence1", "sentence2", "gold_label"]
    for split in ("train", "dev_matched", "dev_mismatched"):
        write_tsv(tmp_path / f"glue/MNLI/{split}.tsv", header, mnli)
    rows, task = samples(tmp_path, tiny_roberta, "mnli", tmp_path / "glue")
    assert rows == [(("a cat", "a dog"), 2), (("a cat", "a cat"), 0)]
    assert list(task.splits) == ["validation_matched", "validation_mismatched"]
    assert task.collate(rows)["labels"].tolist() == [2, 0]
    mrpc = [[1, 11, 12, "a cat", "the cat"]]
    for split in ("train", "dev"):
        header = ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        write_tsv(tmp_path / f"glue/MRPC/{split}.tsv", header, mrpc)
    assert samples(tmp_path, tiny_roberta, "mrpc", tmp_path / "glue")[0] == [
        (("a cat", "the cat"), 1)
    ]


def test_rows_that_a_line_break_cuts_are_left_out(tmp_path, tiny_roberta):
    pytest.importorskip("datasets")
    header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
    rows = [[i, 2 * i, 2 * i + 1, f"a cat {i}", f"a dog {i}", i % 2] for i in range(20_000)]
    broken = [*rows[:5], [5, 10, 11, "the red"], ["dog ran", "it sat", 1], *rows[5:]]
    for split, lines in (("train", broken), ("dev", rows[:10])):
        write_tsv(tmp_path / f"glue/QQP/{split}.tsv", header, lines)
    with pytest.warns(UserWarning, match="'train': 2 rows without a label are left out"):
        found, _ = samples(tmp_path, tiny_roberta, "qqp", tmp_path / "glue")
    assert len(found) == 20_000
    assert found[5] == (("a cat 5", "a dog 5"), 1)
    write_tsv(tmp_path / "glue/QQP/train.tsv", header, broken[:9])
    with pytest.raises(ValueError, match="row 5, column 'is_duplicate'"):
        samples(tmp_path, tiny_roberta, "qqp", tmp_path / "glue")


def test_parquet_and_json_lines_are_read(tmp_path, tiny_roberta):
    datasets = pytest.importorskip("datasets")
    scores = [{"sentence1": "a cat", "sentence2": "a dog", "label": 2.5, "idx": 0}]
    (tmp_path / "stsb").mkdir()
    for name in ("train-00000-of-00001", "validation-00000-of-00001"):
        datasets.Dataset.from_list(scores).to_parquet(str(tmp_path / f"stsb/{name}.parquet"))
    rows, task = samples(tmp_path, tiny_roberta, "stsb", tmp_path)
    assert rows == [(("a cat", "a dog"), 2.5)]
    assert task.collate(rows)["labels"].dtype == torch.float32
    assert task.model.config.num_labels == 1
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(pairs(1)[0]) + "\n")
    assert samples(tmp_path, tiny_roberta, "rte", tmp_path)[0][0][1] == 1


def test_the_command_writes_a_run_and_says_what_came_out(tmp_path, tiny_roberta, capsys):
    pytest.importorskip("datasets")
    from cntlora_core.cli import main

    (tmp_path / "data").mkdir()
    for name, count in (("train", 6), ("validation", 4)):
        lines = "".join(json.dumps(row) + "\n" for row in pairs(count))
        (tmp_path / f"data/{name}.jsonl").write_text(lines)
    words = ["task", "text", "--task", "rte", "--model", str(tiny_roberta), "--method", "lora"]
    words += ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--rank", "2"]
    words += ["--steps", "1", "--device", "cpu", "--batch-size", "4"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.startswith("validation: ")
    assert said.out.splitlines()[-1] == str(tmp_path / "run")
    assert "training by lora: 1 of 1" in said.err
    record = json.loads((tmp_path / "run/metrics.json").read_text())
    assert record["method"] == "lora"
    assert record["decided"]["rank"] == 2
    assert record["decided"]["learning_rate"] == 4e-4  # the preset's
    assert main(words) == 1
    assert "holds a run already" in capsys.readouterr().err
    again = ["task", "text", "--config", str(tmp_path / "run/metrics.json")]
    assert main([*again, "--output", str(tmp_path / "again"), "--learning-rate", "0.1"]) == 0
    capsys.readouterr()
    other = json.loads((tmp_path / "again/metrics.json").read_text())
    assert other["decided"] == {**record["decided"], "learning_rate": 0.1}


def test_other_processes_can_prepare_samples(tmp_path, tiny_roberta):
    wanted = settings(tmp_path, tiny_roberta)
    task = text_task(planned(wanted, TEXT["cntlora"]["rte"]), wanted, data=rte())
    train, collate = pickle.loads(pickle.dumps((task.train, task.collate)))
    assert train[1] == task.train[1] == ((SENTENCES[1], SENTENCES[2]), 0)
    assert collate([train[0], train[1]])["labels"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": [], "validation": pairs(2)}, "split 'train' is empty"),
        ({"train": pairs(2)}, "there is no split 'validation'; there are train"),
        (
            {"train": pairs(2, sentence2="other"), "validation": pairs(2)},
            "split 'train' has no column 'sentence2'; its columns are sentence1, other, label",
        ),
        (
            {"train": [{**pairs(1)[0], "label": -1}], "validation": pairs(2)},
            r"row 0, column 'label': the label -1 is not one of entailment, not_entailment.*test",
        ),
        ({"train": [{**pairs(1)[0], "label": "maybe"}], "validation": pairs(2)}, "label 'maybe'"),
    ],
)
def test_data_of_another_form_are_refused(data, message, tmp_path, tiny_roberta):
    with pytest.raises(ValueError, match=message):
        train_text(settings(tmp_path, tiny_roberta), data=data)


def test_folders_and_models_that_are_not_there_are_named(tmp_path, tiny_roberta):
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no table named after a split \(train"):
        train_text(settings(tmp_path, tiny_roberta, data=str(tmp_path / "empty")))
    with pytest.raises(FileNotFoundError, match="there is no such file or folder here"):
        train_text(settings(tmp_path, tiny_roberta, model="nobody/nothing"), data=rte())


def test_without_the_library_of_data_sets_its_extra_is_named(tmp_path, tiny_roberta, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs the library datasets: pip install .*\[tasks\]"):
        train_text(settings(tmp_path, tiny_roberta, data=str(tmp_path)))


def test_settings_that_do_not_go_together_are_refused(tmp_path, tiny_roberta):
    for more, message in (
        ({"method": "best"}, "there is no method 'best'"),
        ({"adapter": "lava", "method": "eva"}, "with adapter='lava' use"),
        ({"epochs": 1.0}, "steps and epochs"),
        ({"batch_size": 3, "accumulate": 2}, "multiple of 2"),
        ({"targets": ("qkv",)}, "matches no module"),
        ({"device": "cuda:1"}, "device must be cpu"),
        ({"dropout": 1.0}, "below 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"select_best": True, "keep_checkpoints": 0}, "select_best needs checkpoints"),
    ):
        with pytest.raises(ValueError, match=message):
            train_text(settings(tmp_path, tiny_roberta, **more), data=rte())


def test_validation_sets_are_halved_as_in_the_paper():
    sizes = {277: (139, 138), 1043: (522, 521), 872: (436, 436), 5463: (1000, 4463)}
    for size, (validation, test) in sizes.items():
        found = halved({"validation": range(size)}, seed=3)
        first, second = found["validation"], found["test"]
        assert (len(first), len(second)) == (validation, test)
        values = {split[i] for split in (first, second) for i in range(len(split))}
        assert values == set(range(size))


def test_processes_read_parts_of_the_samples_that_one_reads():
    def chosen(share):
        options = {"batch_size": 2, "count": 3, "seed": 5, "share": share, "device": "cpu"}
        batches = initialization_batches(
            range(20), lambda numbers: {"x": torch.tensor(numbers)}, **options
        )
        assert [int(n) for b in batches for n in b["x"]] == [
            int(n) for b in batches for n in b["x"]
        ]  # anew in each pass
        return [int(n) for batch in batches for n in batch["x"]]

    alone, first, second = chosen((0, 1)), chosen((0, 2)), chosen((1, 2))
    assert len(set(alone)) == 6
    assert sorted([*first, *second]) == sorted(alone)
    everywhere = initialization_batches(
        range(4), lambda n: {"x": torch.tensor(n)}, batch_size=3, count=0, seed=0, device="meta"
    )
    assert [batch["x"].shape[0] for batch in everywhere] == [3, 1]
    assert all(batch["x"].is_meta for batch in everywhere)


def test_correlations_are_those_of_numpy():
    generator = np.random.default_rng(0)
    x, y = generator.random(50), generator.random(50)
    assert pearson_correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    a, b = x > 0.5, (x + y) > 1
    assert matthews_correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert matthews_correlation(np.zeros(3), np.ones(3)) == 0.0
    assert pearson_correlation(np.ones(3), np.arange(3)) == 0.0


def test_every_task_has_presets_and_every_method_is_one_of_the_registry():
    for presets in TEXT.values():
        assert presets.keys() == GLUE.keys()
        assert {preset.method for preset in presets.values()} <= METHODS.keys()
    assert TEXT["lava"]["cola"].orthogonality == 0.05
