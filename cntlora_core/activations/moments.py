"""Streaming second moments of activations; knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """The second moment ``C = X.T @ X / N`` of N rows, not centred.

    Attributes:
        matrix: (d, d), float32 or wider, symmetric.
        count: N, how many rows it was taken over.
        rounding: About the Frobenius norm of what rounding made of the matrix while it was summed;
            eigenvalues of this size may be rounding alone. 0 for a matrix that is taken as it is.
    """

    matrix: Tensor
    count: int
    rounding: float = 0.0

    @property
    def width(self) -> int:
        return self.matrix.shape[0]

    def release(self) -> None:
        """Give the matrix's memory back; width and count remain."""
        self.matrix.untyped_storage().resize_(0)


class SecondMoment:
    """Running sum of ``x x.T`` over rows; the rows themselves are never kept.

    The sum is float32 whatever the rows' dtype (float64 rows are summed in float64). How much of it
    is rounding depends on the number of rows and updates, on whether rows repeat, and on the order
    in which a processor adds. It is measured: ``sum x (x.T G)`` for a few random columns G is kept
    as well, in float64, and compared with the final sum times G (docs/method.md).
    """

    def __init__(self, width: int, device: torch.device | str | None = None) -> None:
        self.width = width
        self.count = 0
        self._device = device
        self._sum: Tensor | None = None
        self._probe = _probing_columns(width)
        self._probed = torch.zeros(self._probe.shape[1], width, dtype=torch.float64)

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Add rows (n, width) to the sum.

        Raises:
            ValueError: if the width differs from that of earlier rows.
            FloatingPointError: if a row is not finite.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"expected rows of shape (n, {self.width}), got {tuple(rows.shape)}")
        if rows.shape[0] == 0:
            return
        rows = rows.detach().to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        if self._sum is None:
            self._sum = rows.new_zeros(self.width, self.width, device=self._device)
        total = self._sum
        rows = rows.to(total.device, total.dtype)
        _add_symmetric_product(total, rows)
        # One check of the diagonal finds any non-finite entry of any row: it is a sum of squares.
        if not torch.isfinite(total.diagonal()).all():
            raise FloatingPointError("non-finite activations")
        self._probed += _product_in_blocks(rows @ self._probe.to(rows), rows)
        self.count += rows.shape[0]

    @property
    def probed(self) -> Tensor:
        """``sum (x.T G).T x.T``, (probes, width) float64, on the CPU."""
        return self._probed

    @property
    def total(self) -> Tensor | None:
        """The running sum, (width, width); None before the first row.

        Some of what lies below the diagonal may be missing until `result` fills it in.
        """
        return self._sum

    def add(self, total: Tensor, count: int, probed: Tensor) -> None:
        """Add the sum over ``count`` further rows; ``total`` is taken over, not copied.

        Args:
            total: As :attr:`total`.
            count: How many rows.
            probed: As :attr:`probed`.

        Raises:
            ValueError: if the widths differ.
        """
        if total.shape != (self.width, self.width):
            raise ValueError(f"widths differ: {self.width} and {tuple(total.shape)}")
        self._sum = total if self._sum is None else self._sum.add_(total)
        self.count += count
        self._probed = self._probed + probed

    def result(self) -> Moment:
        """The moment of all rows so far; all zeros where there were none.

        Takes the running sum over instead of copying it: the fitter starts from nothing afterwards.
        """
        total, count, probed = self._sum, self.count, self._probed
        self._sum, self.count, self._probed = None, 0, torch.zeros_like(probed)
        if total is None:
            return Moment(torch.zeros(self.width, self.width, device=self._device), 0)
        matrix = _mirror_upper(total).div_(count)
        probe = self._probe.double()
        found = torch.cat([block.cpu().double() @ probe for block in matrix.split(_LEAF)])
        rounding = float((found - probed.T / count).norm()) / probe.shape[1] ** 0.5
        return Moment(matrix, count, rounding)


_PROBES = 8
_BLOCK = 64


@lru_cache(maxsize=64)
def _probing_columns(width: int) -> Tensor:
    """G, (width, probes) float32: ``|E @ G|^2 / probes`` is ``|E|^2`` for any E, in the mean."""
    if width <= _PROBES:
        return torch.eye(width) * width**0.5
    return torch.randn(width, _PROBES, generator=torch.Generator().manual_seed(width))


def _product_in_blocks(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right`` of a few columns and many, summed in float64 over blocks of rows."""
    whole = left.shape[0] // _BLOCK * _BLOCK
    blocks = torch.bmm(
        left[:whole].reshape(-1, _BLOCK, left.shape[1]).mT,
        right[:whole].reshape(-1, _BLOCK, right.shape[1]),
    )
    rest = left[whole:].T @ right[whole:]
    return blocks.cpu().sum(0, dtype=torch.float64) + rest.cpu()


_LEAF = 512


def _add_symmetric_product(total: Tensor, rows: Tensor) -> None:
    """Add ``rows.T @ rows`` to the blocks of ``total`` on and above its diagonal.

    Halves are halved again down to `_LEAF` columns, so that of a wide product little more than half
    is computed; BLAS's own symmetric update takes longer than that
    (docs/experiments/initialization_speed.md).
    """
    width = rows.shape[1]
    if width <= _LEAF:
        total.addmm_(rows.T, rows)
        return
    half = width // 2
    left, right = rows[:, :half], rows[:, half:]
    total[:half, half:].addmm_(left.T, right)
    _add_symmetric_product(total[:half, :half], left)
    _add_symmetric_product(total[half:, half:], right)


def _mirror_upper(total: Tensor) -> Tensor:
    """Fill the blocks that `_add_symmetric_product` leaves out, in place."""
    width = total.shape[0]
    if width > _LEAF:
        half = width // 2
        total[half:, :half] = total[:half, half:].T
        _mirror_upper(total[:half, :half])
        _mirror_upper(total[half:, half:])
    return total
