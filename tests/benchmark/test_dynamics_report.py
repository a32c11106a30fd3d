"""The table of recorded dynamics: what its columns say of records that are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cntlora_core.benchmark.tasks import dynamics_report
from cntlora_core.benchmark.tasks.dynamics_report import COLUMNS, DynamicsReport, token_ratios
from cntlora_core.benchmark.tasks.study import RECORD_NAME, Run
from cntlora_core.dynamics.log import FILE_NAME

LAYERS = {
    "language_model.layers.0.q_proj": {"visual": 3.0, "text": 1.0},
    "vision_tower.layers.0.q_proj": {"visual": 5.0},
}


def records(level: float, steps: int = 200) -> list[dict]:
    return [
        {
            "step": step,
            "loss": level + (1.0 if step == 1 else 0.0),
            "grad_norm": level * (10 if step == 5 else 1 + step % 2),
            "grad_norms": {"vision": 4 * level, "language": 2 * level},
            "update_ratios": {"vision": 0.1, "language": 0.01 * level},
            **({"second_moments": LAYERS} if step % 10 == 1 else {}),
        }
        for step in range(1, steps + 1)
    ]


def test_the_columns_say_what_their_names_do():
    found = {name: column(records(2.0)) for name, column in COLUMNS.items()}
    assert list(found.values()) == pytest.approx(
        [3.0, 2.0, 20.0, 3.0, np.log(2) / 2**0.5, 2.0, 0.02], rel=1e-2
    )
    assert token_ratios(records(1.0), 0) == [3.0]


def test_differences_from_plain_lora_are_marked(tmp_path):
    for name, level in (("lora", 1.0), ("eva", 2.0), ("cross", 1.0)):
        for seed in range(3):
            run = Run("captions", name, 1200, 2e-4, seed)
            folder = tmp_path / "runs" / run.key
            folder.mkdir(parents=True)
            (folder / RECORD_NAME).write_text(json.dumps({"run": vars(run)}))
            lines = [json.dumps(r) for r in records(level * (1 + 0.01 * seed))]
            (folder / FILE_NAME).write_text("\n".join(lines) + "\n")
    path = dynamics_report.report(DynamicsReport(tmp_path, tmp_path))
    text = path.read_text()
    rows = {
        line.split(" | ")[0].strip("| "): line for line in text.partition("Visual")[0].splitlines()
    }
    assert "2.02 ± 0.05*" in rows["eva"]
    assert "*" not in rows["lora"] + rows["cross"]
    assert "| eva | 3.00 (3.00 to 3.00) | 3.00 (3.00 to 3.00) |" in text
    assert (tmp_path / "dynamics.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no runs of captions"):
        dynamics_report.report(DynamicsReport(tmp_path / "none", tmp_path))
