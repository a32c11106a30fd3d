"""Grid files: expansion to runs, what is refused, and the keys of runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cntlora_core.benchmark.convergence.command import tasks_of
from cntlora_core.benchmark.convergence.grid import MeasureSettings, expand, read_grid
from cntlora_core.benchmark.convergence.subjects import subject_names
from cntlora_core.methods import METHODS

GRIDS = Path(__file__).parents[3] / "docs" / "experiments" / "grids"


def grid_of(tmp_path: Path, text: str):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return read_grid(path, subject_names)


def test_a_table_expands_to_all_combinations_of_its_lists():
    table = {"a": [1, 2], "b": 3, "c": ["x", "y"]}
    assert list(expand(table)) == [{"a": a, "b": 3, "c": c} for a in (1, 2) for c in ("x", "y")]


def test_blocks_override_the_base_and_what_is_asked_for_twice_is_one_run(tmp_path):
    grid = grid_of(
        tmp_path,
        """
        [base]
        subject = ["penguin", "boot"]
        rank = 4
        steps = 7
        learning_rate = 1e-3

        [[grid]]
        method = ["lora", "cross"]
        unit = ["mean", "least-change"]

        [[grid]]
        method = "lora"
        learning_rate = [1e-3, 1e-4]
        """,
    )
    found = [(r.subject, r.method, r.training.learning_rate) for r in grid.runs]
    # The unit has no effect on plain LoRA, and lora at 1e-3 stands in both blocks.
    assert found.count(("penguin", "lora", 1e-3)) == 1
    assert found.count(("boot", "cross", 1e-3)) == 2
    assert len(found) == 2 * (1 + 2 + 1)
    assert {r.training.steps for r in grid.runs} == {7}
    assert {r.adapter.cntlora.unit for r in grid.runs if r.method == "cross"} == {
        "mean",
        "least-change",
    }


def test_all_subjects_and_controls(tmp_path):
    grid = grid_of(
        tmp_path,
        """
        [base]
        subject = "all"
        rank = 4
        method = ["random-directions", "plain-norms"]
        control_of = "eva"
        """,
    )
    assert len(grid.runs) == 2 * len(subject_names(grid.bench))
    assert {run.adapter.method for run in grid.runs} == {"eva"}
    assert {run.values()["control_of"] for run in grid.runs} == {"eva"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[base]\nsubject = 'boot'\nlearning_rat = 1", r"grid 1: unknown settings.*learning_rat"),
        ("[base]\nmethod = 'lora'", "needs a subject"),
        ("[base]\nsubject = 'boot'\nmethod = 'lorra'", "Did you mean 'lora'"),
        ("[base]\nsubject = 'boot'\nmethod = 'lora'\ncontrol_of = 'eva'", "control_of belongs to"),
        ("[base]\nsubject = 'boot'\nphotos = 0", "photos must be"),
        ("colour = 1", r"unknown keys \['colour'\]"),
        ("[measure]\nprompts = ['a dog']", "needs one {}"),
        ("[measure]\nper_prompt = 0", "per_prompt must be at least 1"),
        ("held_out = 1", "held_out belongs to dreambooth"),
        ("[base", "grid.toml cannot be read as a grid in TOML"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        grid_of(tmp_path, text)


def test_a_run_is_measured_at_its_start_and_end_too():
    measure = MeasureSettings(steps=(2, 50), pictures_at=(3,))
    assert measure.at(10) == (0, 2, 3, 10)
    assert [step for step in measure.at(10) if measure.has_pictures(step, 10)] == [3, 10]


def keys(tmp_path: Path, text: str, folder: str = "out") -> list[str]:
    tasks = tasks_of(grid_of(tmp_path, text), tmp_path / folder)
    return [task.key for task in tasks]


BASE = "[base]\nsubject = 'boot'\nmethod = 'lora'\nrank = 4\n"


def test_keys_follow_from_content_alone(tmp_path):
    first = keys(tmp_path, BASE)
    assert first == keys(tmp_path, BASE, "another folder")
    # A default that is written out is the same run.
    assert first == keys(
        tmp_path,
        BASE
        + "learning_rate = 1e-3\nsteps = 150\nlr_schedule = 'cosine'\nalpha = 8\nunit = 'mean'",
    )
    assert first == keys(tmp_path, "device = 'cpu'\nsave_every = 3\n" + BASE)


@pytest.mark.parametrize(
    "more", ["seed = 1", "photos = 2", "steps = 5", "prior_weight = 0.0", "[measure]\nsteps = [1]"]
)
def test_keys_differ_where_results_do(tmp_path, more):
    assert keys(tmp_path, BASE) != keys(tmp_path, BASE + more)


def test_keys_follow_the_weights_of_what_looks_at_images(tmp_path):
    def key(name: str, value: float) -> list[str]:
        (tmp_path / name).mkdir()
        save_file({"weight": torch.tensor([value])}, tmp_path / name / "model.safetensors")
        return keys(tmp_path, f"{BASE}[measure]\ndino = '{name}'")

    assert key("one", 1.0) == key("another_place", 1.0)
    assert key("trained_again", 2.0) != keys(tmp_path, f"{BASE}[measure]\ndino = 'one'")


def test_the_grids_that_come_along_can_be_read():
    for path in GRIDS.glob("*.toml"):
        grid = read_grid(path, lambda _bench: ["dog"])
        assert grid.runs
        for run in grid.runs:
            assert run.control or run.method in METHODS


def test_grids_of_the_small_model_have_ranks_that_all_its_layers_hold():
    grids = [read_grid(path, lambda _bench: ["dog"]) for path in GRIDS.glob("*.toml")]
    ranks = [r.adapter.rank for grid in grids if grid.bench.model == "small" for r in grid.runs]
    assert max(ranks) == 64  # the narrowest has 64 features


def test_what_is_compared_with_each_other_is_measured_alike():
    grids = [read_grid(GRIDS / f"{name}.toml") for name in ("main", "rates", "settings")]
    assert grids[0].bench.measure == grids[1].bench.measure == grids[2].bench.measure
    for other in ("base", "short", "short_rates", "long"):
        measure = read_grid(GRIDS / f"{other}.toml", subject_names).bench.measure
        for name in ("prompts", "per_prompt", "sampling_steps", "guidance", "scheduler"):
            assert getattr(measure, name) == getattr(grids[0].bench.measure, name), (other, name)
    main, rates = ({run.subject for run in grid.runs} for grid in grids[:2])
    assert not main & rates
    assert len(main) >= 8


def test_the_classifier_can_tell_all_backgrounds_of_the_grids_for_the_small_model():
    from cntlora_core.mini.making.evaluate import rows_of_prompts

    for name in ("smoke", "base", "main"):  # the others are measured as main.toml
        prompts = read_grid(GRIDS / f"{name}.toml", subject_names).bench.measure.prompts
        spoken = [prompt.format("sks boot") for prompt in prompts]
        assert None not in rows_of_prompts(spoken, "boot")
