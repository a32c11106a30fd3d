"""The study of tasks: a run, what is kept of it, the search of learning rates, the tables."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from cntlora_core.benchmark.tasks import report, study
from cntlora_core.benchmark.tasks.problems import PROBLEMS, Folders, Problem, _vision
from cntlora_core.benchmark.tasks.study import SEARCH_SEED, VARIANTS, Run, TaskStudy
from cntlora_core.tasks.settings import TaskSettings, planned
from cntlora_core.tasks.text import measure_classes, score_classes
from cntlora_core.tasks.trainer import Task

CONFIG = ViTConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    image_size=8, patch_size=4, num_labels=3,
)  # fmt: skip


def bright(_plan, size, seed, _folders) -> Task:
    """Three classes of brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = [i % 3 for i in range(size)]
    pictures = [torch.rand(3, 8, 8, generator=generator) + label for label in labels]
    samples = list(zip(pictures, labels, strict=True))
    torch.manual_seed(seed)
    return Task(
        name="bright",
        model=ViTForImageClassification(CONFIG),
        train=samples,
        splits={"validation": samples},
        collate=lambda rows: {
            "pixel_values": torch.stack([p for p, _ in rows]),
            "labels": torch.tensor([label for _, label in rows]),
        },
        measure=measure_classes,
        score=score_classes,
        best="accuracy",
    )


@pytest.fixture
def tiny(monkeypatch) -> Problem:
    preset = dataclasses.replace(PROBLEMS["digits"].preset, rank=2, alpha=4.0, batch_size=6)
    problem = Problem(bright, preset, {12: 3})
    monkeypatch.setattr(study, "PROBLEMS", {"digits": problem})
    monkeypatch.setattr(report, "PROBLEMS", {"digits": problem})
    return problem


def test_runs_are_kept_searched_and_compared(tiny, tmp_path):
    runs = [Run("digits", "lora", 12, rate, SEARCH_SEED) for rate in VARIANTS["lora"].rates]
    compared = [
        Run("digits", name, 12, 5e-4, seed) for name in ("lora", "bitfit") for seed in (0, 1)
    ]
    compared += [Run("digits", "cross-qr", 12, 5e-4, 0)]
    for run in (*runs, *compared):
        study.train((run, tmp_path, Folders()))
    records = study.read_runs(tmp_path)
    assert records.keys() == {run.key for run in (*runs, *compared)}
    assert {p.name for p in (tmp_path / "runs" / runs[0].key).iterdir()} == {"run.json"}
    record = records[compared[-1].key]
    assert record["settings"]["cntlora"]["factorization"] == "qr"
    found = {r.learning_rate: records[r.key]["metrics"]["validation"] for r in runs}
    best = max(found, key=lambda rate: (found[rate]["accuracy"], -found[rate]["loss"]))
    assert study.best_rate(records, "digits", "lora", 12) == best

    rows = report.table(records, "digits", 12, dict.fromkeys(("lora", "bitfit"), 5e-4))
    assert [row.split(" | ")[0] for row in rows.splitlines()[2:]] == ["| lora", "| bitfit"]
    rows = report.table(records, "digits", 12, dict.fromkeys(("bitfit", "cross-qr"), 5e-4))
    assert "accuracy - bitfit's" in rows, "the first where plain LoRA is not among them"
    study.train((Run("digits", "lora", 12, best, 0), tmp_path, Folders()))
    asked = {"lora": best, "bitfit": 5e-4}
    text = report.report(study.read_runs(tmp_path), tmp_path, asked).read_text()
    text, _, chosen = text.partition("12 samples, as asked")
    assert f"| lora | {best:g} | 1 |" in chosen
    assert "| bitfit | 0.0005 | 2 |" in chosen
    alike, _, each = text.partition("12 samples, every method at its best rate")
    assert "12 samples, every method at 0.0005" in alike
    assert "| cross-qr | 0.0005 | 1 |" in alike
    assert f"| lora | {best:g} | 1 |" in each
    assert "cross-qr" not in each, "its learning rates were not searched"

    kept = tmp_path / "kept" / study.ARCHIVE_NAME
    report.archive(study.read_runs(tmp_path), kept)
    report.archive({}, kept)  # what is kept stays
    for place in (kept, kept.parent):
        again = report.report(study.read_runs(place), tmp_path / "again", asked)
        assert again.read_text() == (tmp_path / "tasks-tables.md").read_text()


@pytest.mark.parametrize("side", [32, 64])
def test_the_image_encoder_takes_pictures_of_either_size(side, tmp_path):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(3)]
    samples = [(picture, label) for label, picture in enumerate(pictures)]
    plan = planned(TaskSettings(output=str(tmp_path)), PROBLEMS["digits"].preset)
    task = _vision(plan, "pictures", {"train": samples, "validation": samples}, 3, 0)
    batch = task.collate([task.train[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, side, side)
    with torch.no_grad():
        loss, rows = task.measure(task.model.eval(), batch)
    assert loss is not None
    assert loss.isfinite()
    assert rows.shape == (3, 4)


def test_learning_rates_that_are_given_are_not_searched(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "_run_missing", lambda _s, runs, *_: asked.extend(runs) or [])
    study.study(TaskStudy(tmp_path, "digits", methods=("lora",), seeds=(0, 1), rates=(1e-3,)))
    assert asked == [Run("digits", "lora", 12, 1e-3, seed) for seed in (0, 1)]


def test_a_run_s_key_follows_its_settings(tiny, monkeypatch):
    run = Run("digits", "lora", 12, 1e-3, 0)
    other = dataclasses.replace(run, seed=1)
    assert len({run.key, other.key, dataclasses.replace(run, name="cross").key}) == 3
    before = run.key
    changed = dataclasses.replace(tiny, sizes={12: 4})
    monkeypatch.setattr(study, "PROBLEMS", {"digits": changed})
    assert run.key != before


@pytest.mark.parametrize(
    ("wrong", "words"), [({"methods": ("lorra",)}, "lorra"), ({"sizes": (7,)}, "400")]
)
def test_what_is_not_in_the_tables_is_refused(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        study.study(TaskStudy(tmp_path, "digits", **wrong))
