"""The steps of a run side by side: what is generated, scored and called the best trade-off."""

from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image

from cntlora_core.cli import main
from cntlora_core.diffusion.job import personalise
from cntlora_core.metrics.fidelity import Fidelity
from cntlora_core.metrics.steps import NO_STEP, Ends, StepComparison

from ..conftest import change


@pytest.fixture
def run(plain):
    """A finished run of two steps with a snapshot of the first."""
    plain = change(plain, "training", steps=2, learning_rate=3e-2)
    return personalise(change(plain, "output", save_lora_every=1))


def compared(run, *flags: str) -> dict:
    arguments = ["compare", str(run.folder), "--device", "cpu", "--steps", "1", "--batch-size", "9"]
    assert main([*arguments, *flags]) == 0
    return json.loads((run.folder / "compare.json").read_text("utf-8"))


def test_steps_score_as_evaluate_scores_them_and_the_best_is_named(
    run, photo_folder, tiny_encoders, tmp_path, capsys
):
    flags = [
        "--prompt", "a photo of {}", "a red {} box", "--per-prompt", "2", "--seed", "5",
        "--dino", str(tiny_encoders / "vision"), "--clip", str(tiny_encoders / "clip"),
    ]  # fmt: skip
    record = compared(run, *flags)
    printed = capsys.readouterr().out
    assert record["steps"] == [1, 2]
    assert record["seeds"] == [5, 6]
    assert [result["step"] for result in record["results"]] == [None, 1, 2]
    assert record["results"][1]["dino"] != record["results"][2]["dino"]
    best = max(record["results"][1:], key=lambda result: result["balance"])
    assert record["best"] == (best["step"] if best["balance"] else None)
    assert ("best trade-off" if best["balance"] else NO_STEP) in printed
    with Image.open(run.folder / "compare.jpg") as sheet:
        assert sheet.format == "JPEG"
        assert sheet.width > 3 * 2 * 96  # three columns of two images

    out = tmp_path / "evaluation"
    snapshot = run.snapshots[0].path
    arguments = ["evaluate", "--subject", str(photo_folder), "--output", str(out)]
    arguments += ["--model", record["model"], "--lora", str(snapshot), "--device", "cpu"]
    arguments += ["--steps", "1", "--token", "sks", "--class-name", "dog", *flags]
    assert main(arguments) == 0
    evaluated = json.loads((out / "fidelity.json").read_text("utf-8"))["results"]
    for mine, theirs in zip(record["results"][:2], evaluated):
        for name in ("dino", "clip_i", "clip_t"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-6)
    assert record["ends"]["photos_dino"] == pytest.approx(evaluated[-1]["dino"])


def test_without_encoders_there_is_the_picture_alone(run, capsys):
    record = compared(run, "--per-prompt", "1")
    assert (record["best"], record["results"], record["encoders"]) == (None, [], None)
    assert record["prompts"][1] == "a photo of sks dog in the snow"
    assert "no scores: encoder facebook/dino-vits16" in capsys.readouterr().err.replace("\n", " ")
    sheet = run.folder / "other.png"
    assert main(["compare", str(run.folder), "--output", str(sheet.with_suffix(".txt"))]) == 1
    assert "must end in .jpg" in capsys.readouterr().err
    assert main(["compare", str(sheet.parent / "samples")]) == 1
    assert "no finished run" in capsys.readouterr().err


def test_images_are_generated_by_what_the_run_s_model_predicts(plain):
    told = dataclasses.replace(plain, prediction_type="v_prediction")
    run = personalise(change(told, "training", steps=1))
    record = compared(run, "--no-scores", "--per-prompt", "1", "--prompt", "a dog")
    assert record["sampling"]["prediction_type"] == "v_prediction"


def comparison(*scores: tuple[float, float]) -> StepComparison:
    """Of the model without a LoRA, DINO 0.3 and CLIP-T 0.3, photos 0.8 and 0.2, and of steps."""
    ends = Ends(0.3, 0.8, 0.3, 0.2)
    results = [Fidelity("", 1, dino, 0.0, clip_t) for dino, clip_t in [(0.3, 0.3), *scores]]
    balances = tuple(ends.balance(dino, clip_t) for dino, clip_t in scores)
    steps = tuple(100 * i for i in range(1, len(scores) + 1))
    return StepComparison(steps, Image.new("RGB", (1, 1)), tuple(results), balances, ends)


def test_the_balance_is_the_harmonic_mean_of_both_scales():
    found = comparison((0.4, 0.3), (0.65, 0.27), (0.8, 0.22))
    assert found.balances == pytest.approx((2 * 0.2 / 1.2, 0.7, 2 * 0.2 / 1.2))
    assert found.best == 200
    assert found.verdict() == "best trade-off of subject and prompt: step 200"
    assert "balance 70.0" in found.report()


def test_scores_beyond_the_ends_count_as_the_ends_and_the_earliest_of_equals_is_best():
    found = comparison((0.2, 0.4), (0.9, 0.35), (0.8, 0.3))
    assert found.balances == (0.0, 1.0, 1.0)
    assert found.best == 200


def test_no_step_is_best_where_none_shows_the_subject():
    found = comparison((0.3, 0.3), (0.1, 0.3))
    assert found.best is None
    assert NO_STEP in found.verdict()


def test_a_scale_whose_ends_are_in_the_wrong_order_counts_for_nothing():
    ends = Ends(0.3, 0.8, base_clip_t=0.2, photos_clip_t=0.3)
    assert ends.balance(0.55, 0.25) == pytest.approx(2 * 0.5 / 1.5)
    assert ends.balance(0.8, 0.0) == 1.0
