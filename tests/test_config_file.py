"""``--config``: flags from a file, which those of the command line override."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from cntlora_core.benchmark.convergence.grid import read_grid
from cntlora_core.cli import main
from cntlora_core.commands.config_file import with_config
from cntlora_core.commands.flags import registry
from cntlora_core.commands.train import Train
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.diffusion.presets import preset
from cntlora_core.diffusion.settings import (
    AdapterSettings,
    JobSettings,
    OutputSettings,
    PriorSettings,
    SubjectSettings,
    TrainingSettings,
)

JOB = JobSettings(
    "model",
    SubjectSettings("photos", token="-sks", class_name="big dog", flip=True),
    OutputSettings("out", compress=False, name="a=b"),
    PriorSettings(prior_weight=0.0),
    AdapterSettings(
        method="self",
        rank=4,
        cntlora=CNTLoRAConfig("self", unit="mean", damping=0.5, preserve_output=False),
    ),
    TrainingSettings(steps=7, sample_prompts=("a dog", "a cat"), sample_every=3),
)


def parsed(*arguments: str) -> JobSettings:
    rules, words = registry(with_config(["train", *arguments])[1:])
    train = tyro.cli(Train, args=words, registry=rules)
    return JobSettings(
        train.model, train.subject, train.output, train.prior, train.adapter, train.training
    )


def test_a_run_is_repeated_from_its_record_with_other_flags(tmp_path: Path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"settings": JOB.to_dict(), "seconds": {"training": 1.0}}))
    assert parsed("--config", str(file)) == JOB
    again = parsed("--steps", "9", f"--config={file}", "--method", "cross", "--no-flip")
    assert again.training == replace(JOB.training, steps=9)
    assert (again.adapter.method, again.adapter.cntlora.constraint) == ("cross", "cross")
    assert again.subject == replace(JOB.subject, flip=False)


def test_toml_with_or_without_sections(tmp_path: Path):
    file = tmp_path / "my run.toml"
    file.write_text(
        """
        model = "m"
        images = "photos"
        output = "out"
        class_name = "dog"
        sample-prompts = ["a dog"]
        [adapter]
        rank = 8
        [adapter.cntlora]
        rank_budget = "fixed"
        [training]
        learning_rate = 3e-4
        """
    )
    job = parsed("--config", str(file))
    assert (job.model, job.subject.images, job.output.output) == ("m", "photos", "out")
    assert (job.adapter.rank, job.adapter.cntlora.rank_budget) == (8, "fixed")
    assert (job.training.learning_rate, job.training.sample_prompts) == (3e-4, ("a dog",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("steps = ", "TOML"),
        ("day = 2026-01-01", "day"),
        ("stepz = 3", "stepz"),
        ("orthogonal_factors = [{a = 1}]", "orthogonal_factors"),
        ('sample_prompts = ["a dog", "--rank=3"]', "sample_prompts"),
        ("steps = 0", "steps must be at least 1"),
    ],
)
def test_bad_files_are_refused_in_words(tmp_path: Path, capsys, content, message):
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_text(content)
    flags = ["--model", "m", "--images", "i", "--output", str(tmp_path / "o")]
    try:
        status = main(["train", "--config", str(file), *flags])
    except SystemExit as stop:
        status = stop.code
    said = " ".join(capsys.readouterr().err.split())
    assert status == 2
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize("content", ['{"settings": 3}', '{"settings": [1]}', "[]", "{"])
def test_records_that_hold_no_settings_are_refused(tmp_path: Path, capsys, content):
    (tmp_path / "run.json").write_text(content)
    assert main(["train", "--config", str(tmp_path / "run.json")]) == 2
    assert "run.json" in capsys.readouterr().err.replace("\n", "")


def test_flags_go_behind_the_name_of_a_command_within_another(tmp_path: Path):
    file = tmp_path / "settings.toml"
    file.write_text("rank = 4\n")
    words = ["--config", str(file), "--task", "rte"]
    assert with_config(["task", "text", *words]) == ["task", "text", "--rank=4", "--task", "rte"]
    assert with_config(["bench", "lava", *words])[:3] == ["bench", "lava", "--rank=4"]
    assert with_config(["train", *words])[:2] == ["train", "--rank=4"]


def test_a_flag_without_its_file_is_refused(capsys):
    assert main(["train", "--config"]) == 2
    assert "--config needs a file" in capsys.readouterr().err


ASKED = ("--model=m", "--images=p", "--output=o", "--token=sks", "--class-name=dog")


def test_a_preset_is_a_set_of_flags_that_others_override():
    paper = parsed("--steps", "9", "--preset", "paper", *ASKED)
    assert paper.training == TrainingSettings(steps=9, learning_rate=1e-4, lr_schedule="constant")
    assert (paper.adapter.rank, paper.adapter.lora_alpha) == (128, 256)
    assert parsed("--preset=paper", "--rank=64", *ASKED).adapter.lora_alpha == 128
    whole = {"model": "m", "subject": {"images": "p"}, "output": {"output": "o"}, **preset("paper")}
    assert JobSettings.from_dict(whole).adapter == paper.adapter


def test_rank_steps_rate_and_schedule_are_by_default_those_of_the_comparison():
    grid = Path(__file__).parents[1] / "docs" / "experiments" / "grids" / "main.toml"
    default = parsed(*ASKED)
    adapter, training = default.adapter, default.training
    asked = [
        (r.adapter.rank, r.adapter.lora_alpha, r.training.steps, r.training.lr_schedule)
        for r in read_grid(grid).runs
        if (r.method, r.training.learning_rate) == (adapter.method, training.learning_rate)
    ]
    ours = (adapter.rank, adapter.lora_alpha, training.steps, training.lr_schedule)
    assert set(asked) == {ours}


def test_a_file_wins_over_a_preset_and_may_name_one(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text('rank = 8\nmethod = "lora"\n')
    for order in (["--preset=paper", f"--config={file}"], [f"--config={file}", "--preset=paper"]):
        found = parsed(*order, *ASKED)
        assert (found.adapter.rank, found.adapter.method, found.training.steps) == (8, "lora", 1000)
    file.write_text('preset = "paper"\nrank = 8\n')
    found = parsed("--config", str(file), *ASKED)
    assert (found.adapter.rank, found.training.steps) == (8, 1000)
    file.write_text("preset = 3\n")
    with pytest.raises(ValueError, match="no preset 3"):
        with_config(["train", f"--config={file}"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--preset", "papre"], "no preset 'papre'; there are: paper"),
        (["train", "--preset"], "--preset needs a name"),
    ],
)
def test_a_preset_that_is_none_is_named(arguments: list[str], said: str, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
