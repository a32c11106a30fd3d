"""Alternatives for the sums and the linear algebra of the start: their time and their error.

Rows and matrices have the spectrum ``1 / j`` of activations in random directions. Errors are
relative Frobenius errors against float64: of the moment, or of what the start makes of its
eigenpairs, the operator ``V g(lam) V.T`` with the gain of ``cross``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cntlora_core.activations.moments import Moment
from cntlora_core.benchmark.init import machine
from cntlora_core.benchmark.init_alternatives import (
    BATCHES,
    Pairs,
    Variant,
    eigen_variants,
    eigh_leading,
    factor_variants,
    many_variants,
    sum_variants,
)
from cntlora_core.benchmark.init_plots import plot_tried
from cntlora_core.benchmark.init_scaling import median_seconds
from cntlora_core.benchmark.init_settings import InitBenchmark
from cntlora_core.closed_form.constraints import gains
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.runtime.console import result_console
from cntlora_core.runtime.files import require_writable_folder, write_json_atomic
from cntlora_core.runtime.progress import Reporter, silent

_LONG_SECONDS = 5.0


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


def activation_rows(problem: Problem, seed: int) -> Tensor:
    """(rows, width) float32 with the spectrum ``1 / j``."""
    generator = torch.Generator().manual_seed(seed)
    d = problem.width
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    scales = torch.arange(1, d + 1).rsqrt()
    return torch.randn(problem.rows, d, generator=generator) * scales @ basis


def identity_gains(values: Tensor) -> Tensor:
    """What the start of an identity weight does along each direction, under ``cross``."""
    return gains(values, torch.ones_like(values), CNTLoRAConfig())


def operator_error(pairs: Pairs, reference: Pairs) -> float:
    """Relative error of ``V g(lam) V.T``, both (d, d), without building either."""
    (values, vectors), (true_values, true_vectors) = (
        (v.double(), u.double()) for v, u in (pairs, reference)
    )
    found, expected = identity_gains(values), identity_gains(true_values)
    cross = (vectors * found).T @ (true_vectors * expected)
    inner = float((cross * (vectors.T @ true_vectors)).sum())
    gram = (vectors.T @ vectors).square()
    own = float((gram * found[:, None] * found).sum())
    size = float(expected.square().sum())
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
            start = time.perf_counter()
            entry["error"] = error(variant.run())
            once = time.perf_counter() - start
            slow = once > _LONG_SECONDS  # one look at it is enough
            entry["seconds"] = once if slow else median_seconds(variant.run, repeats)
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
    reference = eigh_leading(exact / mean, k)
    values, vectors = reference
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(problem.width, problem.width, generator=generator)
    factor = weight @ vectors.float() * identity_gains(values).float()

    def moment_error(found: Tensor) -> float:
        return float((found.double() / BATCHES - exact).norm() / exact.norm())

    def pairs_error(found: Pairs) -> float:
        return operator_error(found, reference)

    def factor_error(found: Tensor) -> float:
        return float((found.double() - factor.double()).norm() / factor.double().norm())

    same = (exact / mean).expand(many, -1, -1).contiguous()
    return [
        *_measure(f"sum of {BATCHES} batches", problem, sum_variants(rows), repeats, moment_error),
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
