"""Which 3D drawings are all but a subject's own.

``python -m cntlora_core.mini.making.near_doubles``

The subjects are drawings of the 3D style, and training shows that style. What training may not
show is ``object_classes.KEPT_OUT_3D``: the subjects' drawings and those that this check finds to be
nearly the same. Distance is the root mean squared difference of two drawings on grey at 32 pixels,
as a part of the subject's own difference from the grey; a drawing counts mirrored too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cntlora_core.mini.making.collage import square_sprite
from cntlora_core.mini.making.make_subjects import SUBJECTS
from cntlora_core.mini.making.object_classes import KEPT_OUT_3D
from cntlora_core.mini.making.sprites import SpriteSource

__all__ = ["NEAR", "distances", "nearest"]

NEAR = 0.5
"""Drawings nearer than this are near doubles; two drawings without a likeness have 1 and more."""


def distances(subject: Tensor, drawings: Tensor) -> Tensor:
    """Relative distance of drawings from a subject's.

    Args:
        subject: (4, h, w), premultiplied RGBA in 0..1.
        drawings: (n, 4, h, w).

    Returns:
        (n,), the lesser of that of a drawing and of its mirror image.
    """

    def on_grey(layers: Tensor) -> Tensor:
        return layers[..., :3, :, :] - 0.5 * layers[..., 3:, :, :]

    own, others = on_grey(subject), on_grey(drawings)
    size = own.pow(2).mean().sqrt()
    apart = [
        (picture - own).pow(2).mean((1, 2, 3)).sqrt() / size for picture in (others, others.flip(3))
    ]
    return torch.minimum(*apart)


def nearest(source: SpriteSource, count: int = 5) -> dict[str, list[tuple[str, float]]]:
    """The nearest 3D drawings to each subject, itself left out.

    Returns:
        Subject -> ``(emoji, distance)``, nearest first.
    """
    found = source.all_of("3d", skin_tones=False)
    layers = torch.stack([square_sprite(sprite, 64) for sprite in found.values()])
    layers = functional.avg_pool2d(layers.float() / 255, 2)
    names = {code: name for name, code in source.codepoints.items()}
    emoji = [names.get(code, code) for code in found]
    table = {}
    for subject in SUBJECTS:
        own = emoji.index(subject.emoji)
        away = distances(layers[own], layers)
        order = [int(i) for i in np.argsort(away.numpy()) if i != own][:count]
        table[subject.name] = [(emoji[i], round(away[i].item(), 2)) for i in order]
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder filled by mini.fetch")
    parser.add_argument("--count", type=int, default=5, help="neighbours to list for each subject")
    args = parser.parse_args()
    table = nearest(SpriteSource(args.cache / "node_modules"), args.count)
    missed = []
    for subject, rows in table.items():
        print(subject, *(f"{emoji} {away:.2f}" for emoji, away in rows), sep=" · ")
        missed += [emoji for emoji, away in rows if away < NEAR and emoji not in KEPT_OUT_3D]
    if missed:
        raise SystemExit(f"near doubles that are not in KEPT_OUT_3D: {', '.join(missed)}")


if __name__ == "__main__":
    main()
