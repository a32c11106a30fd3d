"""Objects whose hues are turned: another colour, the same shape, in place."""

from __future__ import annotations

from dataclasses import replace

import torch
from PIL import Image

from cntlora_core.mini.making.collage import Collage, CollageConfig, hue_rotation
from cntlora_core.mini.making.compose import Background


def test_hues_turn_about_grey():
    third = 2 * torch.pi / 3
    still, swapped, other = hue_rotation(torch.tensor([0.0, third, 1.0]))
    torch.testing.assert_close(still, torch.eye(3))
    torch.testing.assert_close(swapped @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]))
    torch.testing.assert_close(other @ torch.ones(3), torch.ones(3))
    torch.testing.assert_close(other @ other.T, torch.eye(3))


def test_a_dyed_object_has_another_colour_and_lies_where_it_lay():
    red = Image.new("RGBA", (32, 32), (200, 40, 40, 255)).convert("RGBa")
    still = CollageConfig(blur_share=0.0, light=0.0, per_background=1)
    pictures = []
    for config in (still, replace(still, dye_share=1.0), replace(still, dye_share=0.5)):
        collage = Collage([red], [Background("plain", "white")], 0, config)
        torch.manual_seed(1)
        pictures.append(collage.compose(torch.zeros(40, dtype=torch.long), torch.zeros(40).long()))
    plain, dyed, half = pictures
    lies = [(picture != 1).any(1) for picture in (plain, dyed)]
    assert torch.equal(*lies)
    assert dyed.min() >= -1
    assert dyed.max() <= 1
    moved = [(picture - plain).abs().amax((1, 2, 3)) > 0.05 for picture in (dyed, half)]
    assert moved[0].float().mean() > 0.9
    assert 0.2 < moved[1].float().mean() < 0.8
