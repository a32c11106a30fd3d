"""Arithmetic on low-rank weight changes: pure functions, no files, no models.

A layer's change of weight is ``delta = alpha / rank * up @ down``. Everything here works on the
two thin factors and never builds the full delta, apart from `LoRALayer.delta`, whose point it is.
Factors are stored in float32; the decompositions run in float64, since they are small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoRALayer:
    """One attachment point's low-rank change of weight.

    ``down``: (r, in), or (r, in, kh, kw) for a convolution. ``up``: (out, r), or (out, r, 1, 1).
    ``mid``: (r, r, kh, kw), only for a convolution in CP form, whose ``down`` is then (r, in, 1,
    1). ``alpha``: the change is ``alpha / r * up @ down``.

    Raises ValueError where the shapes do not belong together.
    """

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    def __post_init__(self) -> None:
        down, up, mid = self.down, self.up, self.mid
        shapes = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
        shapes += f", mid {tuple(mid.shape)}" if mid is not None else ""
        if (
            down.ndim not in (2, 4)
            or up.ndim != down.ndim
            or min(down.shape) < 1
            or min(up.shape) < 1
        ):
            raise ValueError(
                f"a LoRA layer has two matrices or two convolution kernels, got {shapes}"
            )
        if up.shape[1] != down.shape[0]:
            raise ValueError(
                f"the columns of up and the rows of down must agree (the rank), got {shapes}"
            )
        if up.ndim == 4 and tuple(up.shape[2:]) != (1, 1):
            raise ValueError(f"the up kernel of a convolution must be 1x1, got {shapes}")
        if mid is not None:
            rank = down.shape[0]
            fits = mid.ndim == 4 and tuple(mid.shape[:2]) == (rank, rank)
            if not fits or down.ndim != 4 or tuple(down.shape[2:]) != (1, 1):
                raise ValueError(f"mid must be (r, r, kh, kw) between 1x1 kernels, got {shapes}")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The full change of weight: (out, in) or (out, in, kh, kw), float32."""
        layer = without_mid(self)
        product = layer.up.flatten(1).double() @ layer.down.flatten(1).double()
        return (layer.scaling * product).float().reshape(layer.up.shape[0], *layer.down.shape[1:])


LoRALayers = dict[str, LoRALayer]


def alpha_for(scaling: float, rank: int) -> float:
    """``scaling * rank``, without the last digits that dividing and multiplying leave behind."""
    return float(f"{scaling * rank:.12g}")


def without_mid(layer: LoRALayer) -> LoRALayer:
    """The same change, same rank, with mid and down contracted to one (r, in, kh, kw) kernel."""
    if layer.mid is None:
        return layer
    down = torch.einsum("ijhw,jc->ichw", layer.mid.double(), layer.down.flatten(1).double()).float()
    return replace(layer, down=down, mid=None)


def with_alpha(layer: LoRALayer, alpha: float) -> LoRALayer:
    """The same change under another alpha (not zero): the ratio goes into ``up``."""
    if alpha == layer.alpha:
        return layer
    if alpha == 0:
        raise ValueError("alpha 0 switches a layer off; it cannot stand for any other alpha")
    return replace(layer, up=(layer.up.double() * (layer.alpha / alpha)).float(), alpha=alpha)


def subtract_initial(trained: LoRALayer, initial: LoRALayer) -> LoRALayer:
    """``trained - initial`` as one layer of the summed rank: ``[B, -B0] @ [A; A0]``, exact.

    This is what a file for the stock checkpoint must hold when the frozen weight became ``W - s B0
    A0``. The scaling stays as it was, so alpha grows with the rank (doubles, when both ranks are
    equal).

    Raises ValueError where the two layers differ in scaling or in shape.
    """
    trained, initial = without_mid(trained), without_mid(initial)
    same_outside = (
        trained.up.shape[0] == initial.up.shape[0]
        and trained.down.shape[1:] == initial.down.shape[1:]
    )
    if not same_outside:
        raise ValueError(
            f"trained and initial layer are of different weights: "
            f"up {tuple(trained.up.shape)} against {tuple(initial.up.shape)}, "
            f"down {tuple(trained.down.shape)} against {tuple(initial.down.shape)}"
        )
    if abs(trained.scaling - initial.scaling) > 1e-6 * abs(initial.scaling):
        raise ValueError(
            "trained and initial layer differ in scaling: "
            f"{trained.scaling:g} against {initial.scaling:g}"
        )
    return LoRALayer(
        down=torch.cat([trained.down.float(), initial.down.float()], dim=0),
        up=torch.cat([trained.up.float(), -initial.up.float()], dim=1),
        alpha=alpha_for(initial.scaling, trained.rank + initial.rank),
    )


def compress(layer: LoRALayer, rank: int) -> tuple[LoRALayer, float]:
    """The best approximation of rank ``rank`` (Eckart-Young), and its relative Frobenius error.

    QR of both factors and an SVD of the (R, R) core; the delta is never built. Singular values go
    evenly to up and down. The scaling is kept. A layer that has no more than ``rank`` comes back
    as it is, with error 0; the result has less than ``rank`` where the weight itself has fewer
    rows or columns.

    Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if layer.rank <= rank:
        return layer, 0.0
    return _refactored(layer, rank)


def balance(layer: LoRALayer) -> LoRALayer:
    """The same change of weight with factors that half precision rounds least.

    The factors of `subtract_initial` are large and nearly cancel; rounding acts on their size. Here
    up and down carry the square root of the difference's own spectrum each, in descending order.
    """
    return _refactored(layer, layer.rank)[0]


def truncate(balanced: LoRALayer, rank: int) -> LoRALayer:
    """What `compress` gives, of a layer that `balance` has made."""
    kept = min(rank, balanced.rank)
    return LoRALayer(
        down=balanced.down[:kept].contiguous(),
        up=balanced.up[:, :kept].contiguous(),
        alpha=alpha_for(balanced.scaling, kept),
    )


def _refactored(layer: LoRALayer, rank: int) -> tuple[LoRALayer, float]:
    layer = without_mid(layer)
    q_up, r_up = torch.linalg.qr(layer.up.flatten(1).double())
    q_down, r_down = torch.linalg.qr(layer.down.flatten(1).double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    up = q_up @ (left[:, :kept] * root)
    down = (root[:, None] * right[:kept]) @ q_down.T
    energy, lost = values.square().sum(), values[kept:].square().sum()
    compressed = LoRALayer(
        down=down.float().reshape(kept, *layer.down.shape[1:]).contiguous(),
        up=up.float().reshape(layer.up.shape[0], kept, *layer.up.shape[2:]).contiguous(),
        alpha=alpha_for(layer.scaling, kept),
    )
    return compressed, float((lost / energy).sqrt()) if energy > 0 else 0.0


def difference_norm(first: LoRALayer, second: LoRALayer) -> float:
    """Frobenius norm of ``first.delta() - second.delta()``, from the factors, in float64."""
    first, second = without_mid(first), without_mid(second)
    up = [sign * m.scaling * m.up.flatten(1).double() for sign, m in ((1, first), (-1, second))]
    down = torch.cat([first.down.flatten(1).double(), second.down.flatten(1).double()])
    return norm(LoRALayer(down, torch.cat(up, dim=1), alpha=len(down)))


def norm(layer: LoRALayer) -> float:
    """``||delta||`` in the Frobenius norm, from the factors, in float64."""
    return abs(layer.scaling) * float(_core(layer).norm())


def singular_values(layer: LoRALayer) -> Tensor:
    """Singular values of the delta as a matrix (out, in * kh * kw): descending, float64, at most r.

    From the QR of both factors and an SVD of the (r, r) core.
    """
    return abs(layer.scaling) * torch.linalg.svdvals(_core(layer))


def _core(layer: LoRALayer) -> Tensor:
    """A small matrix with the singular values of ``up @ down``."""
    layer = without_mid(layer)
    up, down = layer.up.flatten(1).double(), layer.down.flatten(1).double()
    return torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T


def relative_error(approximation: LoRALayer, exact: LoRALayer) -> float:
    """``||approximation - exact|| / ||exact||`` of the two deltas; 0 where both are zero."""
    difference, size = difference_norm(approximation, exact), norm(exact)
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


def subtract_initial_layers(
    trained: Mapping[str, LoRALayer], initial: Mapping[str, LoRALayer]
) -> LoRALayers:
    """`subtract_initial` for every layer of an adapter.

    Raises ValueError where the two do not name the same layers, or naming the layer that does not
    fit.
    """
    if trained.keys() != initial.keys():
        odd = sorted(trained.keys() ^ initial.keys())
        raise ValueError(
            f"trained and initial adapter name different layers, for example {odd[:3]}"
        )
    result: LoRALayers = {}
    for name, layer in trained.items():
        try:
            result[name] = subtract_initial(layer, initial[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return result


def compress_layers(
    layers: Mapping[str, LoRALayer], rank: int | Mapping[str, int]
) -> tuple[LoRALayers, dict[str, float]]:
    """`compress` for every layer, to one rank or to a rank per layer; also the relative error of
    each layer.

    Raises ValueError where a mapping of ranks lacks a layer.
    """
    result: LoRALayers = {}
    errors: dict[str, float] = {}
    for name, layer in layers.items():
        if not isinstance(rank, int) and name not in rank:
            raise ValueError(f"no rank was given for {name}")
        result[name], errors[name] = compress(layer, rank if isinstance(rank, int) else rank[name])
    return result, errors


def total_relative_error(
    approximation: Mapping[str, LoRALayer], exact: Mapping[str, LoRALayer]
) -> float:
    """Relative error of a whole adapter: all its deltas taken as one long vector."""
    lost = sum(difference_norm(approximation[name], exact[name]) ** 2 for name in exact)
    size = sum(norm(layer) ** 2 for layer in exact.values())
    return (lost / size) ** 0.5 if size > 0 else 0.0
