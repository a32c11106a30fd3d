"""The report of runs whose numbers are known."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from cntlora_core.benchmark.convergence.command import ConvergenceReport
from cntlora_core.benchmark.convergence.grid import MeasureSettings, Run
from cntlora_core.benchmark.convergence.report import write_report
from cntlora_core.benchmark.convergence.results import baseline_of, configs_of, groups_of
from cntlora_core.cli import main

DINO = {"lora": 0.5, "eva": 0.6, "cross": 0.7}


def record_of(method: str, subject: str, seed: int, learning_rate: float, gain: float) -> dict:
    run = Run.of(
        {"subject": subject, "method": method, "rank": 4, "steps": 10, "seed": seed}
        | {"learning_rate": learning_rate}
    )
    level = {"penguin": 0.0, "boot": 0.1}[subject]
    shown = {"clip_i": 0.4, "clip_t": 0.6, "backgrounds": 0.75}
    rows = [
        {"step": 0, "loss": 0.08, "drift": 0.0},
        {"step": 5, "loss": 0.07, "drift": 1e-4, "dino": 0.4 + level, "sheet": "5.jpg", **shown},
        {"step": 10, "loss": 0.06, "drift": 2e-4, "dino": gain + level, "sheet": "10.jpg", **shown},
    ]
    seconds = {"initialization": 2.0, "training": 3.0, "measuring": 1.0, "images": 0.5}
    return {
        "settings": run.values(),
        "model": {"source": "small", "fingerprint": "f"},
        "measure": {"per_prompt": 2, "steps": list(MeasureSettings().steps)},
        "rows": rows,
        "revision": "abc",
        "trained_parameters": 1000,
        "seconds": seconds,
        "cpu_seconds": seconds,
        "machine": {"threads": 1},
        "peak_bytes": 5 * 10**8,
        "continued_after": [],
    }


def keep(folder: Path, records: list[dict]) -> None:
    for number, record in enumerate(records):
        place = folder / "runs" / f"{number:04d}"
        place.mkdir(parents=True)
        (place / "run.json").write_text(json.dumps(record))
        for row in record["rows"]:
            if "sheet" in row:
                Image.new("RGB", (2 * 16, 6 * 16), (9 * row["step"], 0, 0)).save(
                    place / row["sheet"]
                )


@pytest.fixture
def records() -> list[dict]:
    return [
        record_of(method, subject, seed, 1e-3, gain + 0.01 * seed + more * (method == "cross"))
        for method, gain in DINO.items()
        for subject, more in (("penguin", 0.0), ("boot", 0.02))
        for seed in (0, 1)
    ]


def test_the_files_of_a_report(records, tmp_path, capsys):
    keep(tmp_path, records)
    bad = tmp_path / "runs" / "ffff"
    bad.mkdir()
    failed = {"error": "ValueError: rank too large", "settings": records[0]["settings"]}
    (bad / "failed.json").write_text(json.dumps(failed))
    assert main(["bench", "report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "report.md"),
        str(tmp_path / "report.html"),
    ]
    text = (tmp_path / "report.md").read_text()
    # DINO at the end, means of the seeds: .705 and .825; 12.706 is the quantile of two values.
    assert re.search(r"\| cross \| 4 \| 10 \| 0\.765 ± 0\.762 \|", text)
    assert re.search(r"\| cross \| 2 \| \+0\.210 ± 0\.127\* \|", text)  # from LoRA, paired
    assert re.search(r"\| cross \| 2 \| \+0\.110 ± 0\.127 \|", text)  # from EVA
    # LoRA ends at .5 (.51); cross goes from .4 to .7 (.71) between steps 5 and 10.
    assert re.search(r"\| cross \| 10 \| 7 \(4 of 4\) \|", text)
    assert "rank too large" in text
    assert "| cross | 1,000 | 2.00 | 3.0 | 300 | 1.0 | 0.5 | 500.0 MB |" in text
    for name in re.findall(r"!\[.*\]\((.+)\)", text):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) >= 100
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/") == text.count("![") == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "+0.210 ± 0.127*" in page


@pytest.mark.parametrize("name", ["lora@x", "lora@", "@1e-3", "lora@-1"])
def test_a_baseline_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="such as lora@2e-3"):
        ConvergenceReport(tmp_path, baselines=(name,))


def test_seeds_of_a_subject_are_no_independent_values():
    runs = [record_of("lora", "boot", seed, 1e-3, 0.5 + 0.1 * seed) for seed in (0, 1, 2)]
    runs += [record_of("lora", "penguin", 0, 1e-3, 0.4)]
    (both,) = configs_of(runs)
    found = both.mean("dino", 10)
    assert found is not None
    assert found.count == 2
    assert found.mean == pytest.approx((0.7 + 0.4) / 2)
    (alone,) = configs_of(runs[:3])
    found = alone.mean("dino", 10)
    assert found is not None
    assert found.count == 3  # of one subject, seeds


def test_a_run_that_never_gets_there_counts_in_the_median(tmp_path):
    gains = {"lora": [0.6] * 3, "cross": [0.65, 0.65, 0.5], "eva": [0.5, 0.5, 0.65]}
    keep(
        tmp_path,
        [
            record_of(method, "penguin", seed, 1e-3, gain)
            for method, found in gains.items()
            for seed, gain in enumerate(found)
        ],
    )
    write_report(ConvergenceReport(tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert "| cross | 10 | 9 (2 of 3) |" in text
    assert "| eva | 10 | never (1 of 3) |" in text


def test_baselines_have_equal_settings_or_one_rate_of_their_own():
    cross = record_of("cross", "boot", 0, 1e-3, 0.7)
    lora = [record_of("lora", "boot", 0, learning_rate, 0.5) for learning_rate in (1e-3, 1e-4)]
    configs = configs_of([cross, *lora])
    assert [config.label for config in configs] == [
        "lora, learning rate 0.0001",
        "lora, learning rate 0.001",
        "cross, learning rate 0.001",
    ]
    assert baseline_of(configs[2], "lora", configs) is configs[1]
    assert baseline_of(configs[1], "lora", configs) is None
    assert baseline_of(configs[2], "eva", configs) is None
    assert baseline_of(configs[2], "lora@1e-4", configs) is configs[0]
    assert baseline_of(configs[1], "lora@1e-4", configs) is configs[0]
    assert baseline_of(configs[0], "lora@1e-4", configs) is None
    assert baseline_of(configs[2], "lora@2e-3", configs) is None
    apart = configs_of([cross, lora[1]])
    assert baseline_of(apart[1], "lora", apart) is apart[0]
    shorter = json.loads(json.dumps(lora[0]))
    shorter["settings"]["steps"] = 5
    other = configs_of([cross, shorter])
    assert all(baseline_of(config, "lora", other) is None for config in other)


def test_settings_that_only_one_method_has_make_labels_and_groups():
    records = [record_of("lora", "boot", 0, learning_rate, 0.5) for learning_rate in (1e-3, 1e-4)]
    for unit in ("mean", "least-change"):
        own = record_of("cross", "boot", 0, 1e-3, 0.7)
        own["settings"]["unit"] = unit
        records.append(own)
    configs = configs_of(records)
    assert configs[-1].label == "cross, learning rate 0.001, unit mean"
    assert baseline_of(configs[-1], "lora", configs) is configs[1]
    groups = groups_of(configs, most=3)
    assert [(name, len(members)) for name, members in groups] == [
        ("learning rate 0.0001", 1),
        ("learning rate 0.001", 3),
    ]


def test_the_best_rate_of_each_method(tmp_path):
    records = [
        record_of(method, "boot", 0, learning_rate, gain)
        for method in ("lora", "cross")
        for learning_rate, gain in ((1e-4, 0.6), (1e-3, 0.5))
    ]
    keep(tmp_path, records)
    write_report(ConvergenceReport(tmp_path, choose_by="dino"))
    text = (tmp_path / "report.md").read_text()
    best = text.partition("best learning rate")[2].partition("##")[0]
    assert len(re.findall(r"\| 0\.0001 \| 0\.0001, 0\.001 \| 0\.700", best)) == 2


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        write_report(ConvergenceReport(tmp_path))
