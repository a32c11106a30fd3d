"""Curves of many runs can be told apart."""

from __future__ import annotations

import pytest

from cntlora_core.figures.plots import curve_figure


@pytest.mark.parametrize("count", [3, 18])
def test_every_run_has_a_line_of_its_own_and_a_name(count):
    lines = {f"run {i}": [(1, float(i)), (2, 0.0)] for i in range(count)}
    figure = curve_figure({"loss": lines, "accuracy": lines})
    for axis in figure.axes:
        looks = {(line.get_color(), line.get_linestyle()) for line in axis.lines}
        assert len(looks) == count
    (legend,) = figure.legends or [figure.axes[0].get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == list(lines)
    assert bool(figure.legends) == (count > 10), "beside the panels, where it would hide lines"
