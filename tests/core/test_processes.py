"""Two and three real processes: the initialisation of all the data, or an error, on each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cntlora_core.activations.across_processes import common_leaders
from cntlora_core.runtime.processes import Processes

SCRIPT = Path(__file__).with_name("many_processes.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], check=True, timeout=600, env=environment
    )
    return folder


def errors(folder: Path, scenario: str, processes: int) -> list[str]:
    return [(folder / f"{scenario}-{processes}-{r}.txt").read_text() for r in range(processes)]


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(
    "scenario",
    [
        "uneven",
        "in_float64",
        "a_point_is_called_on_one_process_only",
        "no_point_of_a_kind_is_called_anywhere",
        "sharing_differs",
        "sharing_ends",
        "wrapped",
        "accelerate_dataloader",
    ],
)
@pytest.mark.thorough
def test_every_process_gets_the_initialisation_of_all_the_data(folder, scenario, processes):
    alone = load_file(folder / f"{scenario}-1-0.safetensors")
    first, *others = (
        load_file(folder / f"{scenario}-{processes}-{r}.safetensors") for r in range(processes)
    )
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)
    assert torch.equal(first["rows"], alone["rows"])
    for name in {key.split(".")[0] for key in first if key.endswith(".up")}:
        delta, wanted = (
            2 * some[f"{name}.up"].flatten(1).double() @ some[f"{name}.down"].flatten(1).double()
            for some in (first, alone)
        )
        assert (delta - wanted).norm() <= 1e-3 * wanted.norm()
        assert first[f"{name}.down"].abs().min() > 0
        torch.testing.assert_close(
            first[f"{name}.base"], alone[f"{name}.base"], rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(
    ("scenario", "culprit", "own", "others"),
    [
        ("non_finite", 1, "FloatingPointError: the input of 'conv'", "reading activations"),
        ("sharing_ends_in_a_stream", 1, "SharedInputError: 'k'", "reading activations"),
        (
            "one_cannot_prepare",
            1,
            "ValueError: target_modules matches 'q'",
            "preparing the initialisation",
        ),
        ("the_first_cannot_solve", 0, "ZeroDivisionError", "solving for the initialisation"),
    ],
)
@pytest.mark.thorough
def test_they_fail_together_and_name_the_culprit(folder, scenario, culprit, own, others, processes):
    for rank, message in enumerate(errors(folder, scenario, processes)):
        if rank == culprit:
            assert message.startswith(own)
        else:
            assert message.startswith(f"OtherProcessError: process {culprit} failed while {others}")
            assert own in message


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("no_batches", "there are no batches"),
        ("other_points", "other attachment points than process"),
        ("other_settings", "was given another configuration than process 0"),
    ],
)
@pytest.mark.thorough
def test_what_concerns_all_is_refused_on_all(folder, scenario, words, processes):
    for message in errors(folder, scenario, processes):
        assert message.startswith("ValueError")
        assert words in message


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.thorough
def test_one_process_can_work_by_itself(folder, processes):
    alone = load_file(folder / "by_itself-1-0.safetensors")
    first = load_file(folder / f"by_itself-{processes}-0.safetensors")
    assert all(torch.equal(first[key], alone[key]) for key in alone)


@pytest.mark.thorough
def test_repeated_samples_are_warned_of(folder):
    assert "repeats some of its 5 samples" in errors(folder, "repeated_samples", 2)[0]
    assert errors(folder, "repeated_samples", 1) == ["LookupError: "]


@given(
    st.lists(
        st.lists(st.sampled_from([None, 0, 1, 2, 3]), min_size=4, max_size=4),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=60, deadline=None)
def test_points_share_where_they_share_on_every_process_that_called_one(partitions):
    names = "abcd"
    seen = [{n: names[p] for n, p in zip(names, own) if p is not None} for own in partitions]
    leaders = common_leaders(names, seen)
    for x in names:
        assert (x in leaders) == any(x in own for own in seen)
        for y in set(leaders) if x in leaders else ():
            together = all(own.get(x) == own.get(y) for own in seen)
            assert (leaders[x] == leaders[y]) == together
    assert all(leaders[leader] == leader <= name for name, leader in leaders.items())


def test_a_lone_process_passes_everything_through():
    processes = Processes()
    assert processes.count == 1
    assert processes.gather("x") == ["x"]
    assert processes.run(lambda: 3, "counting") == 3
    with pytest.raises(KeyError):
        processes.run(lambda: {}["missing"], "looking")
