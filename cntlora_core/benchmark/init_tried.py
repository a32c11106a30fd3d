"""Alternatives for the sums and the linear algebra of the start: their time and their error.

Rows and matrices have the spectrum ``1 / j`` of activations in random directions. Errors are
relative Frobenius errors against float64: of the moment, or of what the start makes of its
eigenpairs, the operator ``V g(lam) V.T`` with the gain of ``cross``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cntlora_core.benchmark.init import machine
from cntlora_core.benchmark.init_plots import plot_tried
from cntlora_core.benchmark.init_scaling import median_seconds
from cntlora_core.benchmark.init_settings import InitBenchmark
from cntlora_core.console import result_console
from cntlora_core.constraints import cross_gain
from cntlora_core.files import require_writable_folder, write_json_atomic
from cntlora_core.linalg import principal_subspace
from cntlora_core.moments import Moment
from cntlora_core.parallel import map_in_threads
from cntlora_core.progress import Reporter, silent

DAMPING = 1e-2
Pairs = tuple[Tensor, Tensor]
"""Eigenvalues (k,) descending and eigenvectors (d, k)."""


@dataclass(frozen=True)
class Problem:
    """Sizes of one attachment point.

    Attributes:
        rows: Rows of one forward pass.
        width: d_in.
        rank: How many leading directions are wanted.
    """

    rows: int
    width: int
    rank: int

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.width}, {self.rank} directions"


PROBLEMS = (
    Problem(4096, 320, 256),  # Stable Diffusion 1.5 at 512 px, ceiling of rank 128
    Problem(1024, 640, 256),
    Problem(256, 1280, 256),
    Problem(1024, 1024, 32),  # RoBERTa-large, rank 16
    Problem(512, 2048, 32),  # a language model of 1 B parameters, rank 16
)
TINY_PROBLEMS = (Problem(64, 32, 8),)


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


def activation_rows(problem: Problem, seed: int) -> Tensor:
    """(rows, width) float32 with the spectrum ``1 / j``."""
    generator = torch.Generator().manual_seed(seed)
    d = problem.width
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    scales = torch.arange(1, d + 1).rsqrt()
    return torch.randn(problem.rows, d, generator=generator) * scales @ basis


# Sums: each returns X.T @ X.


def _numpy_syrk(rows: Tensor) -> Tensor:
    """numpy sees that both factors are one matrix and calls BLAS's symmetric product."""
    array = rows.numpy()
    return torch.from_numpy(array.T @ array)


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
    """Ways to sum second moments over one batch of rows."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1])
    double = rows.double()
    return [
        Variant("float32, in place", lambda: total.zero_().addmm_(rows.T, rows), used=True),
        Variant("symmetric update, numpy's", lambda: _numpy_syrk(rows)),
        Variant("symmetric update, 2 blocks", lambda: _upper_blocks(rows, 2)),
        Variant("symmetric update, 4 blocks", lambda: _upper_blocks(rows, 4)),
        Variant("bfloat16", lambda: _low_precision(rows, torch.bfloat16)),
        Variant("float16", lambda: _low_precision(rows, torch.float16)),
        Variant("float64", lambda: double.T @ double),
    ]


# Eigenpairs: each returns the k leading ones.


def _eigh(matrix: Tensor, k: int) -> Pairs:
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
        Variant("eigh, float64", lambda: _eigh(double, k)),
        Variant("eigh, float32", lambda: _eigh(single, k)),
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
            solved = [_eigh(matrix, k) for matrix in matrices]
            return solved[0]
        finally:
            torch.set_num_threads(threads)

    def batched() -> Pairs:
        values, vectors = torch.linalg.eigh(matrices)
        return values[0].flip(0)[:k], vectors[0].flip(1)[:, :k]

    return [
        Variant(
            "one a thread, all threads",
            lambda: map_in_threads(lambda m: _eigh(m, k), list(matrices))[0],
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


def _svd(matrix: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left * values) @ right


def factor_variants(matrix: Tensor) -> list[Variant]:
    """Ways to the thin SVD of a (d_out, k) matrix."""
    return [
        Variant("svd, float32", lambda: _svd(matrix), used=True),
        Variant("QR, then svd, float32", lambda: _qr_svd(matrix)),
        Variant("eigh of M.T M, float64", lambda: _gram_svd(matrix)),
    ]


def operator_error(pairs: Pairs, reference: Pairs) -> float:
    """Relative error of ``V g(lam) V.T``, both (d, d), without building either."""
    (values, vectors), (true_values, true_vectors) = (
        (v.double(), u.double()) for v, u in (pairs, reference)
    )
    gains, true_gains = cross_gain(values, DAMPING), cross_gain(true_values, DAMPING)
    cross = (vectors * gains).T @ (true_vectors * true_gains)
    inner = float((cross * (vectors.T @ true_vectors)).sum())
    gram = (vectors.T @ vectors).square()
    own = float((gram * gains[:, None] * gains).sum())
    size = float(true_gains.square().sum())
    return (max(own - 2 * inner + size, 0.0) / size) ** 0.5


def _measure(
    what: str,
    problem: Problem,
    variants: Sequence[Variant],
    repeats: int,
    error: Callable[[Any], float],
) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for variant in variants:
        entry: dict[str, Any] = {
            "what": what,
            "problem": str(problem),
            "variant": variant.name,
            "used": variant.used,
        }
        try:
            entry["error"] = error(variant.run())
            entry["seconds"] = median_seconds(variant.run, repeats)
        except ImportError as missing:
            entry["skipped"] = f"not measured: {missing}"
        except (RuntimeError, ValueError) as refused:
            entry["skipped"] = f"refused: {str(refused).splitlines()[0][:120]}"
        entries.append(entry)
    used = next(entry["seconds"] for entry in entries if entry["used"])
    for entry in entries:
        if "seconds" in entry:
            entry["over_used"] = entry["seconds"] / used
    return entries


def measure_problem(problem: Problem, repeats: int, many: int, seed: int) -> list[dict[str, Any]]:
    """All alternatives at one size."""
    rows = activation_rows(problem, seed)
    exact = rows.double().T @ rows.double()
    moment = Moment((exact / problem.rows).float(), problem.rows)
    mean = exact.diagonal().mean()
    k = min(problem.rank, problem.width, problem.rows)
    reference = _eigh(exact / mean, k)
    values, vectors = reference
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(problem.width, problem.width, generator=generator)
    factor = weight @ vectors.float() * cross_gain(values, DAMPING).float()

    def moment_error(found: Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    def pairs_error(found: Pairs) -> float:
        return operator_error(found, reference)

    def factor_error(found: Tensor) -> float:
        return float((found.double() - factor.double()).norm() / factor.double().norm())

    same = (exact / mean).expand(many, -1, -1).contiguous()
    return [
        *_measure("sum of one batch", problem, sum_variants(rows), repeats, moment_error),
        *_measure("eigenpairs", problem, eigen_variants(moment, k), repeats, pairs_error),
        *_measure(f"{many} eigenproblems", problem, many_variants(same, k), repeats, pairs_error),
        *_measure("thin SVD", problem, factor_variants(factor), repeats, factor_error),
    ]


def run_tried(settings: InitBenchmark, reporter: Reporter = silent) -> dict[str, Any]:
    """Measure all alternatives; writes ``tried.json`` and ``tried.png``, returns the former's.

    Raises:
        OSError: the output folder cannot be written to.
    """
    folder = require_writable_folder(settings.output)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    problems = TINY_PROBLEMS if settings.quick else PROBLEMS
    entries: list[dict[str, Any]] = []
    reporter("measuring alternatives", 0, len(problems), {})
    for done, problem in enumerate(problems, 1):
        entries += measure_problem(problem, settings.repeats, 4, settings.seed)
        result = {"machine": machine(), "repeats": settings.repeats, "tried": entries}
        write_json_atomic(folder / "tried.json", result)
        reporter("measuring alternatives", done, len(problems), {"note": str(problem)})
    plot_tried(result, folder / "tried.png")
    return result


def show_tried(result: dict[str, Any], console: Console | None = None) -> None:
    """Print all alternatives as a table."""
    table = Table("what", "variant", "seconds", "over what is used", "relative error")
    group = None
    for entry in result["tried"]:
        title = f"{entry['what']}, {entry['problem']}"
        if title != group:
            table.add_section()
        name = entry["variant"] + (" (used)" if entry["used"] else "")
        numbers = [entry.get("skipped", ""), "", ""]
        if "seconds" in entry:
            numbers = [
                f"{entry['seconds']:.4f}",
                f"{entry['over_used']:.2f}",
                f"{entry['error']:.1e}",
            ]
        table.add_row(title if title != group else "", name, *numbers)
        group = title
    (console or result_console()).print(table)
