"""Canonical polyadic (CP) decomposition by alternating least squares.

A delta that is known as ``left @ right`` is compressed to the spans of its factors first, which
changes no distance, so that the work does not grow with the number of channels. The initialisation
is made of singular vectors, split again and again until each is a product of vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Decomposition:
    """``sum_r factors[0][:, r] o factors[1][:, r] o ...``

    Attributes:
        factors: (n_k, R) float64 for each dimension of the tensor. All columns but the second
            factor's have length 1; that one carries the sizes.
        error: Frobenius error relative to the tensor's norm.
        errors: The same after each iteration, the initialisation's first.
    """

    factors: tuple[Tensor, ...]
    error: float
    errors: tuple[float, ...]


def decompose(
    left: Tensor,
    right: Tensor,
    rank: int,
    *,
    orthonormal: bool = False,
    iterations: int = 200,
    tolerance: float = 1e-5,
) -> Decomposition:
    """The rank-1 terms of ``left @ right``; of a matrix, its truncated SVD.

    Args:
        left: (n_0, k).
        right: (k, n_1, ...).
        rank: R. At most k and n_0 with ``orthonormal``.
        orthonormal: Keep the first factor's columns orthonormal. The best such approximation always
            exists; without it, terms may grow and cancel (there is a best one for matrices only).
        iterations: At most so many.
        tolerance: End when an iteration lowers the error by less than this part of it.
    """
    left, right = left.double(), right.double()
    basis, triangle = torch.linalg.qr(left)
    core = torch.einsum("ij,j...->i...", triangle, right)
    size = core.norm()
    if size == 0:
        zero = tuple(core.new_zeros(n, rank) for n in (left.shape[0], *right.shape[1:]))
        return Decomposition(zero, 0.0, (0.0,))
    if core.ndim == 2:
        return _of_matrix(basis, core, rank)
    inner = None
    unfolded = core.movedim(1, 0).flatten(1)
    if unfolded.shape[0] > unfolded.shape[1]:
        inner, small = torch.linalg.qr(unfolded)
        core = small.unflatten(1, (core.shape[0], *core.shape[2:])).movedim(0, 1)
    factors = _initial_factors(core, rank, one_each=orthonormal)
    unfoldings = [core.movedim(n, 0).flatten(1).contiguous() for n in range(core.ndim)]
    errors = [_error(unfoldings[0], factors)]
    for _ in range(iterations):
        for mode in range(core.ndim):
            factors[mode] = _updated(unfoldings[mode], factors, mode, orthonormal and mode == 0)
        errors.append(_error(unfoldings[0], factors))
        if errors[-2] - errors[-1] <= tolerance * errors[-1] or errors[-1] < 1e-9:
            break
    factors[0] = basis @ factors[0]
    if inner is not None:
        factors[1] = inner @ factors[1]
    return Decomposition(tuple(_sized(factors)), errors[-1], tuple(errors))


def _of_matrix(basis: Tensor, core: Tensor, rank: int) -> Decomposition:
    u, values, right = torch.linalg.svd(core, full_matrices=False)
    kept = min(rank, len(values))
    factors = [u.new_zeros(basis.shape[0], rank), u.new_zeros(core.shape[1], rank)]
    factors[0][:, :kept] = basis @ u[:, :kept]
    factors[1][:, :kept] = right[:kept].T * values[:kept]
    error = float(values[kept:].norm() / values.norm())
    return Decomposition(tuple(factors), error, (error,))


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Columns of all products, (n_1 n_2 ..., R), the last factor's index running fastest."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None] * factor).flatten(0, 1)
    return product


def _updated(unfolding: Tensor, factors: list[Tensor], mode: int, orthonormal: bool) -> Tensor:
    """The factor of least squares, the others being given (Kolda and Bader, SIAM Review 2009)."""
    others = factors[:mode] + factors[mode + 1 :]
    products = unfolding @ khatri_rao(others)
    if orthonormal:  # the nearest matrix of orthonormal columns (Procrustes)
        u, _, right = torch.linalg.svd(products, full_matrices=False)
        return u @ right
    gram = torch.stack([f.T @ f for f in others]).prod(0)
    return products @ torch.linalg.pinv(gram, hermitian=True)


def _error(unfolding: Tensor, factors: list[Tensor]) -> float:
    approximation = factors[0] @ khatri_rao(factors[1:]).T
    return float((unfolding - approximation).norm() / unfolding.norm())


def _initial_factors(core: Tensor, rank: int, one_each: bool) -> list[Tensor]:
    """Terms from singular vectors, the largest ``rank`` of all that splitting twice gives.

    Args:
        core: The tensor.
        rank: How many terms.
        one_each: One term for each first vector, so that these are orthonormal.
    """
    u, values, right = torch.linalg.svd(core.flatten(1), full_matrices=False)
    terms: list[tuple[float, list[Tensor]]] = []
    for j in range(len(values)):
        rest = right[j].reshape(core.shape[1:])
        second, sizes, tails = torch.linalg.svd(rest.flatten(1), full_matrices=False)
        for m in range(1 if one_each else len(sizes)):
            size, vectors = _product(tails[m].reshape(rest.shape[1:]))
            terms.append((float(values[j] * sizes[m] * size), [u[:, j], second[:, m], *vectors]))
    terms.sort(key=lambda term: -term[0])
    # Where an initialisation has fewer terms than asked for, the rest begins as small copies, not
    # as zeros, from which least squares could not move them.
    chosen = [terms[i % len(terms)] for i in range(rank)]
    generator = torch.Generator().manual_seed(0)
    columns = []
    for i, (size, vectors) in enumerate(chosen):
        if i >= len(terms):
            size, vectors = 0.01 * size, [_jittered(v, generator) for v in vectors]
        root = max(size, 1e-12) ** (1 / len(vectors))
        columns.append([root * v for v in vectors])
    factors = [torch.stack(vectors, dim=1) for vectors in zip(*columns, strict=True)]
    if one_each:
        lengths = factors[0].norm(dim=0)
        factors[0], factors[1] = factors[0] / lengths, factors[1] * lengths
    return factors


def _product(tensor: Tensor) -> tuple[float, list[Tensor]]:
    """A product of unit vectors near a tensor, with its size: leading singular vectors in turn."""
    if tensor.ndim == 1:
        size = tensor.norm()
        return float(size), [tensor / size.clamp_min(1e-300)]
    u, values, right = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
    size, vectors = _product(right[0].reshape(tensor.shape[1:]))
    return float(values[0]) * size, [u[:, 0], *vectors]


def _jittered(vector: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(vector.shape, generator=generator, dtype=vector.dtype)
    return torch.nn.functional.normalize(vector + noise * len(vector) ** -0.5, dim=0)


def _sized(factors: list[Tensor]) -> list[Tensor]:
    """The same terms with all sizes in the second factor."""
    second = factors[1]
    for n, factor in enumerate(factors):
        if n != 1:
            lengths = factor.norm(dim=0)
            factors[n] = factor / lengths.clamp_min(1e-300)
            second = second * lengths
    factors[1] = second
    return factors
