"""Plots of dynamics, and the command that makes them."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from cntlora_core.cli import main
from cntlora_core.dynamics import plot_dynamics
from cntlora_core.dynamics.plots import _figure


def records(scale: float, image: bool = True) -> list[dict]:
    """Steps of a run whose numbers tell where they should be."""
    found = []
    for step in (1, 2, 3):
        moments = {"visual": 6.0 * scale, "text": 2.0 * scale} if image else {"all": scale}
        found.append(
            {
                "step": step,
                "loss": scale * step,
                "grad_norm": 10 * scale * step,
                "grad_norms": {"vision": 20 * scale * step, "language": None},
                "update_ratios": {"vision": 30 * scale * step, "language": 1.0},
                "second_moments": {"a.q": moments, "a.k": moments, "b": {"visual": 5.0}},
            }
        )
    return found


def lines(axis) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(map(tuple, line.get_xydata())) for line in axis.lines}


def test_each_quantity_has_its_panel_and_each_run_its_line():
    figure = _figure({"one": records(1.0), "two": records(0.5)}, "runs")
    panels = {axis.get_title(): lines(axis) for axis in figure.axes}
    assert panels["loss"]["one"] == [(1, 1), (2, 1.5), (3, 2)]  # the running mean
    assert panels["gradient norm"]["two"][-1] == (3, 10)
    assert panels["gradient norm: vision"]["two"][0] == (1, 10)
    assert panels["gradient norm: language"] == {}  # it never was finite
    assert panels["update-to-weight ratio: vision"]["one"][0] == (1, 30)
    moments = panels["second moment"]
    assert moments["one, visual"] == [(0, 6), (1, 5)]  # queries and keys read one tensor
    assert moments["two, text"] == [(0, 1)]
    assert panels["second moment: visual / text"]["two"] == [(0, 3)]


def test_a_model_without_images_has_no_ratio():
    figure = _figure({"one": records(1.0, image=False)}, "")
    panels = {axis.get_title(): axis for axis in figure.axes}
    assert lines(panels["second moment"])["one"] == [(0, 1)]
    assert "second moment: visual / text" not in panels


def test_nothing_to_plot_is_said(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        plot_dynamics({"one": []}, tmp_path / "picture.png")


def test_the_command_plots_runs_over_each_other(tmp_path, capsys):
    for i, name in enumerate(("lora", "cross")):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(record) + "\n" for record in records(1.0 + i))
        (tmp_path / name / "dynamics.jsonl").write_text(text)
    target = tmp_path / "picture.png"
    folder, file = str(tmp_path / "lora"), str(tmp_path / "cross" / "dynamics.jsonl")
    assert main(["dynamics", folder, file, "--output", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    with Image.open(target) as image:
        assert image.format == "PNG"
    assert main(["dynamics", str(tmp_path)]) == 1
    assert "cntlora train --dynamics-every 10" in " ".join(capsys.readouterr().err.split())
