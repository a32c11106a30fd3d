"""Two processes train what one trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("many_processes.py")


@pytest.mark.thorough
def test_two_processes_train_what_one_trains(tiny_roberta, tmp_path):
    alone = [sys.executable]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    found = []
    for name, start in (("one", alone), ("two", together)):
        words = [str(SCRIPT), str(tiny_roberta), str(tmp_path / name), "cross"]
        subprocess.run([*start, *words], check=True, timeout=300, capture_output=True)
        found.append(json.loads((tmp_path / name / "metrics.json").read_text()))
        curves = json.loads((tmp_path / name / "curves.json").read_text())
        found[-1]["losses"] = [point["loss"] for point in curves["training"]]
    one, two = found
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["metrics"]["validation"] == pytest.approx(one["metrics"]["validation"], rel=1e-4)
