"""How good masks are: overlap, balanced error, structure, enhanced alignment, F-measure."""

from __future__ import annotations

import torch
from torch import Tensor

MASK_SCORES = (
    "dice",
    "iou",
    "balanced_error_rate",
    "s_measure",
    "e_measure",
    "f_measure",
)
"""The columns of :func:`mask_rows`. The balanced error rate is in percent, the others 0 to 1."""

_EPSILON = 1e-8
_BETA_SQUARED = 0.3
_THRESHOLDS = 256


def mask_rows(found: Tensor, masks: Tensor) -> Tensor:
    """All scores of each image, float32 (n, 6), in the order of `MASK_SCORES`.

    Overlap and balanced error are those of the mask at 0.5; the E-measure and the F-measure are
    means over 256 thresholds. A balanced error needs object and background, and is not a number
    where one is missing.

    Args:
        found: Probabilities, (n, 1, h, w).
        masks: 0 or 1, of that shape.
    """
    rows = []
    for probability, mask in zip(found.float(), masks.float(), strict=True):
        p, m = probability[0], mask[0]
        hard = (p > 0.5).float()
        both, either = (hard * m).sum(), ((hard + m) > 0).float().sum()
        dice = (2 * both + _EPSILON) / (hard.sum() + m.sum() + _EPSILON)
        iou = (both + _EPSILON) / (either + _EPSILON)
        rows.append(
            torch.stack(
                [dice, iou, _balanced_error(hard, m), s_measure(p, m), *_over_thresholds(p, m)]
            )
        )
    return torch.stack(rows)


def s_measure(p: Tensor, m: Tensor, alpha: float = 0.5) -> Tensor:
    """Structure measure (arXiv 1708.00786): alpha times that of objects, the rest that of regions.

    Args:
        p: Probabilities, (h, w).
        m: 0 or 1, of that shape.
        alpha: Weight of the objects' part.
    """
    share = m.mean()
    if share == 0:
        return 1 - p.mean()
    if share == 1:
        return p.mean()
    objects = share * _object(p[m == 1]) + (1 - share) * _object(1 - p[m == 0])
    return (alpha * objects + (1 - alpha) * _regions(p, m)).clamp_min(0)


def e_measure(hard: Tensor, m: Tensor) -> Tensor:
    """Enhanced-alignment measure (arXiv 1805.10421) of a mask of 0 and 1, (h, w)."""
    if m.sum() == 0:
        return 1 - hard.mean()
    if m.sum() == m.numel():
        return hard.mean()
    a, b = hard - hard.mean(), m - m.mean()
    alignment = 2 * a * b / (a * a + b * b + _EPSILON)
    return ((alignment + 1) ** 2 / 4).mean()


def _over_thresholds(p: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the E-measure and the F-measure over the thresholds.

    A pixel of the mask that is found counts by four kinds alone, found or not and object or not,
    so that both come from the counts of these at each threshold.
    """
    thresholds = torch.linspace(0, 1, _THRESHOLDS, device=p.device)
    size, area = float(m.numel()), m.sum()
    inside = p[m == 1].sort().values
    outside = p[m == 0].sort().values
    hits = len(inside) - torch.searchsorted(inside, thresholds, right=False)
    false = len(outside) - torch.searchsorted(outside, thresholds, right=False)
    hits, false = hits.float(), false.float()
    found = hits + false
    precision, recall = hits / (found + _EPSILON), hits / (area + _EPSILON)
    above = (1 + _BETA_SQUARED) * precision * recall
    f = (above / (_BETA_SQUARED * precision + recall + _EPSILON)).mean()
    if area == 0:
        return (1 - found / size).mean(), f
    if area == size:
        return (found / size).mean(), f
    mean_found, mean_mask = found / size, area / size
    total = torch.zeros_like(found)
    for hard, mask, count in (
        (1.0, 1.0, hits),
        (1.0, 0.0, false),
        (0.0, 1.0, area - hits),
        (0.0, 0.0, size - area - false),
    ):
        a, b = hard - mean_found, mask - mean_mask
        total = total + count * (2 * a * b / (a * a + b * b + _EPSILON) + 1) ** 2 / 4
    return (total / size).mean(), f


def _balanced_error(hard: Tensor, m: Tensor) -> Tensor:
    """100 times the mean of the shares of object and of background that are missed."""
    object_right = (hard * m).sum() / m.sum()
    background_right = ((1 - hard) * (1 - m)).sum() / (1 - m).sum()
    return 100 * (1 - (object_right + background_right) / 2)


def _object(values: Tensor) -> Tensor:
    mean = values.mean()
    deviation = values.std() if values.numel() > 1 else torch.zeros_like(mean)
    return 2 * mean / (mean**2 + 1 + deviation + _EPSILON)


def _regions(p: Tensor, m: Tensor) -> Tensor:
    """Structural similarity of the four parts about the mask's centre, weighted by their area."""
    h, w = m.shape
    rows, columns = m.nonzero(as_tuple=True)
    y = int(rows.float().mean().round()) + 1
    x = int(columns.float().mean().round()) + 1
    total = torch.zeros((), device=p.device)
    for part in ((slice(0, y), slice(0, x)), (slice(0, y), slice(x, w)),
                 (slice(y, h), slice(0, x)), (slice(y, h), slice(x, w))):  # fmt: skip
        a, b = p[part], m[part]
        if a.numel():
            total = total + a.numel() / m.numel() * _similarity(a, b)
    return total


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    mean_a, mean_b = a.mean(), b.mean()
    below = max(1, a.numel() - 1)
    var_a, var_b = ((a - mean_a) ** 2).sum() / below, ((b - mean_b) ** 2).sum() / below
    both = ((a - mean_a) * (b - mean_b)).sum() / below
    above = 4 * mean_a * mean_b * both
    under = (mean_a**2 + mean_b**2) * (var_a + var_b)
    if above != 0:
        return above / (under + _EPSILON)
    return torch.ones_like(above) if under == 0 else torch.zeros_like(above)
