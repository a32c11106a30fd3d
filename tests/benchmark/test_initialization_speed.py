"""The benchmark of initialisations: its code path on tiny models, and what it makes of numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cntlora_core.benchmark.init_cases import INIT_CASES, batches_of, build_case
from cntlora_core.benchmark.init_scaling import (
    TINY_BASE,
    growth_exponent,
    measure_shape,
    run_scaling,
)
from cntlora_core.benchmark.init_settings import CASES, DIRECT, InitBenchmark
from cntlora_core.benchmark.init_worker import InitTask, measure
from cntlora_core.benchmark.initialization_speed import run_cases, run_worker, summarise
from cntlora_core.benchmark.peak import peak_bytes, reset_peak
from cntlora_core.cli import main


@pytest.mark.parametrize(
    ("case", "method"),
    [(CASES[0], method) for method in [*DIRECT, "pissa", "self"]]
    + [(case, method) for case in CASES[1:] for method in ("cntlora", "corda")],
)
def test_every_initialisation_runs_on_every_case(case: Any, method: Any):
    reports: list[dict[str, Any]] = []
    found = measure(InitTask(case, method, quick=True), reports.append)
    assert reports[0]["started"]
    assert found["forward_seconds"] > 0
    assert found["forwards_run"] >= (0 if method == "pissa" else found["batches"])
    assert found["method_peak"] > 0
    if method == "corda":  # one sample at a time, one pass
        assert found["forwards_run"] == found["batches"] == (5 if case == "sd15" else 4)
    if method.startswith("cntlora"):
        assert found["forwards_run"] == found["batches"]
        assert found["total_seconds"] >= found["capture_seconds"] + found["solve_seconds"]
        assert found["distinct_inputs"] < found["points"]
        # Layers of the language models are 32 wide, and so is each of their moments.
        if case != "sd15":
            assert found["distinct_inputs"] == 2 * 2
            assert found["moment_bytes"] == 4 * 32 * 32 * 4


def test_what_cannot_be_measured_is_refused_before_anything_runs(tmp_path: Path):
    for name, words in (("lora_ga", "needs a loss"), ("evaa", "no method 'evaa'")):
        with pytest.raises(ValueError, match=words):
            run_cases(InitBenchmark(tmp_path / "out", methods=(name,), quick=True))
    assert not (tmp_path / "out").exists()


def test_the_full_size_cases_have_the_sizes_that_they_claim():
    with torch.device("meta"):
        for name, low, high in (
            ("sd15", 0.97e9, 0.99e9),
            ("roberta-large", 0.35e9, 0.36e9),
            ("llama-1b", 1.0e9, 1.1e9),
        ):
            model = INIT_CASES[name].build(None, False)
            assert low < sum(p.numel() for p in model.parameters()) < high


def test_batches_join_samples_and_lose_none():
    _, samples = build_case(INIT_CASES["sd15"], None, quick=True, seed=0)
    batches = batches_of(samples, 2)
    assert [len(batch["timesteps"]) for batch in batches] == [2, 2, 1]
    joined = torch.cat([batch["latents"] for batch in batches])
    assert torch.equal(joined, torch.cat([sample["latents"] for sample in samples]))


def test_peak_memory_is_seen_and_forgotten():
    reset_peak()
    before = peak_bytes()
    block = torch.ones(32 * 1024 * 1024)  # 128 MB
    grown = peak_bytes()
    assert grown - before > 100e6
    del block
    if Path("/proc/self/clear_refs").exists():
        reset_peak()
        assert peak_bytes() < grown - 100e6


@pytest.mark.slow
def test_the_command_measures_in_processes_and_ends_what_takes_too_long(tmp_path: Path):
    folder = tmp_path / "out"
    arguments = ["bench", "init", "--quick", "--cases", "roberta-large", "--methods", "corda"]
    arguments += ["cntlora-fixed", "--repeats", "1", "--rival-repeats", "1"]
    arguments += ["--output", str(folder)]
    assert main(arguments) == 0
    result = json.loads((folder / "cases.json").read_text())
    summary = result["cases"]["roberta-large"]["summary"]
    assert list(summary) == ["cntlora", "corda", "cntlora-fixed"]
    runs = result["cases"]["roberta-large"]["runs"]
    assert {method: len(measured) for method, measured in runs.items()} == {
        "cntlora": 1,
        "corda": 1,
        "cntlora-fixed": 1,
    }
    assert summary["corda"]["times_faster"] > 0
    assert summary["corda"]["times_faster_fixed"] > 0
    assert summary["cntlora"]["total_over_forwards"] > 1
    assert (folder / "cases.png").stat().st_size > 1000
    late = run_worker(InitTask("roberta-large", "eva", quick=True), 1e-9, folder / "log")
    assert not late["ended"]
    assert late["limit"] == 1e-9
    assert late["forward_seconds"] > 0


@pytest.mark.slow
def test_an_initialisation_that_fails_is_said_to(tmp_path: Path):
    task = InitTask("roberta-large", "eva", model=str(tmp_path / "nowhere"))
    found = run_worker(task, 60.0, tmp_path / "log")
    assert not found["ended"]
    assert "nowhere" in found["failed"]
    assert summarise({"eva": [found]})["eva"]["failed"] == found["failed"]


def run_of(total: float, forward: float = 10.0, **more: Any) -> dict[str, Any]:
    run = {
        "ended": True,
        "total_seconds": total,
        "forward_seconds": forward,
        "batches": 5,
        "forwards_run": 5,
        "forward_peak": 1000,
        "method_peak": 1500,
        "adapter_bytes": 8,
        **more,
    }
    return run


def test_ratios_are_medians_and_a_rival_that_does_not_end_gives_a_bound():
    own = {
        "capture_seconds": 10.5,
        "solve_seconds": 1.0,
        "points": 9,
        "distinct_inputs": 4,
        "moment_bytes": 400,
    }
    ours = [run_of(12.0, **own), run_of(99.0, **own), run_of(11.0, **own)]
    # Three passes over the data: 30 s of the 50 are forward passes.
    rival = [run_of(50.0, forwards_run=15)]
    endless = [
        {"ended": False, "limit": 100.0, "forwards_run": 20, "forward_seconds": 10.0, "batches": 5}
    ]
    fixed = [run_of(14.0, **own)]
    summary = summarise({"cntlora": ours, "eva": rival, "corda": endless, "cntlora-fixed": fixed})
    assert summary["cntlora"]["total_over_forwards"] == pytest.approx(1.2)
    assert summary["cntlora"]["linear_algebra_seconds"] == pytest.approx(2.0)
    assert summary["cntlora"]["memory_over_moments"] == pytest.approx(1.25)
    assert summary["eva"]["times_faster"] == pytest.approx(20.0 / 2.0)
    assert summary["eva"]["times_faster_fixed"] == pytest.approx(20.0 / 4.0)
    assert summary["corda"]["times_faster_at_least"] == pytest.approx(60.0 / 2.0)
    assert summary["corda"]["times_faster_fixed_at_least"] == pytest.approx(60.0 / 4.0)
    assert "times_faster" not in summary["cntlora-fixed"]
    # Noise in the passes cannot make the linear algebra vanish.
    quick = summarise({"cntlora": [run_of(9.0, **own)]})
    assert quick["cntlora"]["linear_algebra_seconds"] == 1.0


def test_scaling_measures_every_phase_of_every_shape(tmp_path: Path):
    settings = InitBenchmark(output=tmp_path, quick=True, repeats=1, scaling=True)
    result = run_scaling(settings)
    assert list(result["sweeps"]) == ["images", "rank", "width", "depth"]
    for sweep in result["sweeps"].values():
        assert all(min(point["seconds"].values()) > 0 for point in sweep["points"])
        assert sweep["bounded_by"] in sweep["points"][0]["seconds"]
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    shape = replace(TINY_BASE, depth=2)
    found = measure_shape(shape, 1)
    assert found["distinct_inputs"] == 2
    assert found["moment_bytes"] == 2 * shape.width**2 * 4
    assert found["rows"] == shape.images * (2 * 2 + 1)


def test_the_exponent_of_a_power_law():
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert growth_exponent(values, [3 * v**2.5 for v in values]) == pytest.approx(2.5)
    assert growth_exponent(values, [1.0, 1.0, 4.0, 8.0, 16.0]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"repeats": 0}, "repeats"),
        ({"rival_repeats": 4}, "rival_repeats"),
        ({"limit": 0.0}, "limit"),
        ({"threads": 0}, "threads"),
        ({"cases": ()}, "cases is empty"),
        ({"model": Path("x")}, "one case"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        InitBenchmark(**values)


def test_a_cancelled_run_ends_its_process(tmp_path: Path):
    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int, values: dict[str, Any]) -> None:
        raise Stop

    with pytest.raises(Stop):
        run_cases(InitBenchmark(output=tmp_path, quick=True, cases=("sd15",)), stop)
