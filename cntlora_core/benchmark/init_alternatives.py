"""Ways to the sums and the linear algebra of the start, ours among them, to be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cntlora_core.activations.moments import Moment, SecondMoment
from cntlora_core.closed_form.linalg import principal_subspace, thin_spectrum
from cntlora_core.runtime.thread_pool import map_in_threads

Pairs = tuple[Tensor, Tensor]
"""Eigenvalues (k,) descending and eigenvectors (d, k)."""


@dataclass(frozen=True)
class Variant:
    """One way to do it.

    Attributes:
        name: For people.
        run: Does it.
        used: Whether it is what the package does.
    """

    name: str
    run: Callable[[], Any]
    used: bool = False


# Sums: each returns X.T @ X, summed over BATCHES batches.

BATCHES = 8


def _numpy_syrk(rows: Tensor) -> Tensor:
    """numpy sees that both factors are one matrix and calls BLAS's symmetric product."""
    array = rows.numpy()
    return torch.from_numpy(array.T @ array)


def _by_halves(rows: Tensor) -> Tensor:
    moment = SecondMoment(rows.shape[1])
    for _ in range(BATCHES):
        moment.update(rows)
    return moment.result().matrix * (BATCHES * len(rows))


def _in_place(rows: Tensor) -> Tensor:
    total = rows.new_zeros(rows.shape[1], rows.shape[1])
    for _ in range(BATCHES):
        total.addmm_(rows.T, rows)
    return total


def _summed(product: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    total = product(rows)
    for _ in range(BATCHES - 1):
        total.add_(product(rows))
    return total


def _upper_blocks(rows: Tensor, blocks: int) -> Tensor:
    """The blocks on and above the diagonal only; those below are copied."""
    d = rows.shape[1]
    total = rows.new_empty(d, d)
    edges = [round(i * d / blocks) for i in range(blocks + 1)]
    for i in range(blocks):
        a, b = edges[i], edges[i + 1]
        total[a:b, a:] = rows[:, a:b].T @ rows[:, a:]
        total[b:, a:b] = total[a:b, b:].T
    return total


def _low_precision(rows: Tensor, dtype: torch.dtype) -> Tensor:
    low = rows.to(dtype)
    return (low.T @ low).float()


def sum_variants(rows: Tensor) -> list[Variant]:
    """Ways to sum second moments over batches of rows."""
    double = rows.double()
    return [
        Variant("symmetric update, by halves", lambda: _by_halves(rows), used=True),
        Variant("float32, in place", lambda: _in_place(rows)),
        Variant("symmetric update, numpy's", lambda: _summed(_numpy_syrk, rows)),
        Variant("symmetric update, 2 blocks", lambda: _summed(lambda x: _upper_blocks(x, 2), rows)),
        Variant("symmetric update, 4 blocks", lambda: _summed(lambda x: _upper_blocks(x, 4), rows)),
        Variant("bfloat16", lambda: _summed(lambda x: _low_precision(x, torch.bfloat16), rows)),
        Variant("float16", lambda: _summed(lambda x: _low_precision(x, torch.float16), rows)),
        Variant("float64", lambda: _in_place(double)),
    ]


# Eigenpairs: each returns the k leading ones.


def eigh_leading(matrix: Tensor, k: int) -> Pairs:
    """By the full eigenproblem."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:k], vectors.flip(1)[:, :k]


def _subspace_iteration(matrix: Tensor, k: int, extra: int, iterations: int) -> Pairs:
    """Randomised subspace iteration with a Rayleigh-Ritz step (arXiv 0909.4061, algorithm 4.4)."""
    d = matrix.shape[0]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(d, min(d, k + extra), generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, small = torch.linalg.eigh(basis.T @ (matrix @ basis))
    return values.flip(0)[:k], (basis @ small).flip(1)[:, :k]


def _svd_lowrank(matrix: Tensor, k: int) -> Pairs:
    left, values, _ = torch.svd_lowrank(matrix, q=min(matrix.shape[0], k + 16), niter=4)
    return values[:k], left[:, :k]


def _lobpcg(matrix: Tensor, k: int) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[0], k, generator=generator, dtype=matrix.dtype)
    values, vectors = torch.lobpcg(matrix, X=start, niter=40, tol=1e-4, largest=True)
    return values, vectors


def _scipy_subset(matrix: Tensor, k: int) -> Pairs:
    from scipy.linalg import eigh  # pyright: ignore[reportMissingImports]

    d = matrix.shape[0]
    values, vectors = eigh(matrix.numpy(), subset_by_index=(d - k, d - 1))
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy())


def _scipy_eigsh(matrix: Tensor, k: int) -> Pairs:
    from scipy.sparse.linalg import eigsh  # pyright: ignore[reportMissingImports]

    values, vectors = eigsh(matrix.numpy(), k=k, which="LA")
    order = values.argsort()[::-1]
    return torch.from_numpy(values[order].copy()), torch.from_numpy(vectors[:, order].copy())


def _as_used(moment: Moment, k: int) -> Pairs:
    subspace = principal_subspace(moment, k)
    return subspace.values, subspace.vectors


def eigen_variants(moment: Moment, k: int) -> list[Variant]:
    """Ways to the k leading eigenpairs of a normalised moment."""
    single = moment.matrix / moment.matrix.diagonal().mean()
    double = single.double()
    return [
        Variant("as used", lambda: _as_used(moment, k), used=True),
        Variant("eigh, float64", lambda: eigh_leading(double, k)),
        Variant("eigh, float32", lambda: eigh_leading(single, k)),
        Variant(
            "subspace iteration, float32, 2 rounds", lambda: _subspace_iteration(single, k, 16, 2)
        ),
        Variant(
            "subspace iteration, float32, 6 rounds", lambda: _subspace_iteration(single, k, 32, 6)
        ),
        Variant("torch.svd_lowrank, float32", lambda: _svd_lowrank(single, k)),
        Variant("torch.lobpcg, float64", lambda: _lobpcg(double, k)),
        Variant("scipy eigh, subset, float64", lambda: _scipy_subset(double, k)),
        Variant("scipy eigh, subset, float32", lambda: _scipy_subset(single, k)),
        Variant("scipy eigsh, float64", lambda: _scipy_eigsh(double, k)),
    ]


# Many equal problems: each returns the eigenvectors of the first.


def many_variants(matrices: Tensor, k: int) -> list[Variant]:
    """Ways to solve several eigenproblems of one size (n, d, d), in float64."""
    threads = torch.get_num_threads()

    def one_after_the_other(count: int) -> Pairs:
        torch.set_num_threads(count)
        try:
            solved = [eigh_leading(matrix, k) for matrix in matrices]
            return solved[0]
        finally:
            torch.set_num_threads(threads)

    def batched() -> Pairs:
        values, vectors = torch.linalg.eigh(matrices)
        return values[0].flip(0)[:k], vectors[0].flip(1)[:, :k]

    return [
        Variant(
            "one a thread, all threads",
            lambda: map_in_threads(lambda m: eigh_leading(m, k), list(matrices))[0],
            used=True,
        ),
        Variant("in turn, all threads each", lambda: one_after_the_other(threads)),
        Variant("in turn, one thread", lambda: one_after_the_other(1)),
        Variant("one batched call", batched),
    ]


# Thin SVDs of M = W V g (d_out, k): each returns M's best product again.


def _gram_svd(matrix: Tensor) -> Tensor:
    double = matrix.double()
    squares, right = torch.linalg.eigh(double.T @ double)
    values = squares.clamp_min(0).sqrt()
    left = double @ right / values.clamp_min(1e-12 * float(values.max()))
    return (left * values) @ right.T


def _qr_svd(matrix: Tensor) -> Tensor:
    q, r = torch.linalg.qr(matrix)
    left, values, right = torch.linalg.svd(r)
    return (q @ left * values) @ right


def _spectrum(matrix: Tensor) -> Tensor:
    return thin_spectrum(matrix, torch.eye(matrix.shape[1])).delta()


def _svd(matrix: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left * values) @ right


def factor_variants(matrix: Tensor) -> list[Variant]:
    """Ways to the thin SVD of a (d_out, k) matrix."""
    return [
        Variant("as used", lambda: _spectrum(matrix), used=True),
        Variant("svd, float32", lambda: _svd(matrix)),
        Variant("QR, then svd, float32", lambda: _qr_svd(matrix)),
        Variant("eigh of M.T M, float64", lambda: _gram_svd(matrix)),
    ]
