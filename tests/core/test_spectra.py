"""Few eigenpairs of a wide moment, and the cheap spectra, against LAPACK's in float64."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from peft import LoraConfig
from torch import nn

from cntlora_core import get_cntlora_model
from cntlora_core.activations.moments import Moment
from cntlora_core.closed_form.constraints import PointDelta
from cntlora_core.closed_form.spectra import (
    gram_matrix,
    principal_subspace,
    singular_values,
    thin_spectrum,
)
from cntlora_core.config import CNTLoRAConfig

WIDTH = 640


@lru_cache
def basis_of(width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator).double()).Q


def with_spectrum(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """(d, d) float32, symmetric, with these eigenvalues and a mean diagonal of 1."""
    basis = basis_of(len(values), seed)
    matrix = (basis * values.double()) @ basis.T
    return (matrix / matrix.diagonal().mean()).float()


SPECTRA = {
    "slow": lambda d: torch.arange(1, d + 1) ** -0.5,
    "1/j": lambda d: 1.0 / torch.arange(1, d + 1),
    "steep": lambda d: torch.arange(1, d + 1) ** -2.0,
    "outliers": lambda d: torch.cat(
        [torch.tensor([120.0, 30.0, 10.0]), 1 / torch.arange(1, d - 2)]
    ),
}


def delta_of(subspace, constraint):
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(48, subspace.vectors.shape[0], generator=generator)
    return PointDelta(weight, subspace, CNTLoRAConfig(constraint=constraint)).spectrum().delta()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("width", "k"), [(320, 128), (640, 128), (768, 256), (1024, 32)])
def test_the_fast_delta_is_the_exact_one_at_real_widths(width, k, spectrum):
    moment = Moment(with_spectrum(SPECTRA[spectrum](width)), 10**6)
    fast, exact = (principal_subspace(moment, k, solver=s) for s in ("fast", "exact"))
    assert fast.rank == exact.rank == k
    assert exact.error == 0
    assert (fast.error == 0) == (width <= 512)
    assert torch.equal(fast.vectors, exact.vectors) == (width <= 512)
    for constraint in ("cross", "self", "shift"):
        wanted = delta_of(exact, constraint)
        error = float((delta_of(fast, constraint) - wanted).norm() / wanted.norm())
        # Of eigenvalues that float32 hardly tells apart, the report must say so.
        assert error < 2.5 * fast.error + 5e-3
        if width == 1024 or spectrum in ("slow", "1/j"):
            assert error < 1.5e-2
    if width == 1024:  # what is reported is the angle to the true eigenvectors
        inside = (exact.vectors.double().T @ fast.vectors.double()).square().sum(0)
        angle = float((1 - inside).clamp_min(0).mean().sqrt())
        assert angle / 3 - 1e-3 < fast.error < 3 * angle + 1e-3


def test_few_of_the_widest_are_found_without_the_full_problem():
    moment = Moment(low_rank_plus_slope(2048), 10**6)
    subspace = principal_subspace(moment, 32)
    inner = subspace.vectors.double().T @ moment.matrix.double() @ subspace.vectors.double()
    inner = inner / moment.matrix.double().diagonal().mean()
    torch.testing.assert_close(inner, torch.diag(subspace.values), rtol=1e-4, atol=1e-4)
    gram = subspace.vectors.T @ subspace.vectors
    torch.testing.assert_close(gram, torch.eye(32), rtol=0, atol=1e-5)
    assert 0 < subspace.error < 1e-2


def low_rank_plus_slope(width: int) -> torch.Tensor:
    """(d, d) of a known slope without a wide QR: a reflected diagonal."""
    normal = torch.randn(width, generator=torch.Generator().manual_seed(0)).double()
    normal /= normal.norm()
    matrix = torch.diag(1.0 / torch.arange(1, width + 1).double())
    matrix = matrix - 2 * torch.outer(normal, normal @ matrix)
    return (matrix - 2 * torch.outer(matrix @ normal, normal)).float()


@pytest.mark.parametrize("rows", [3, 77, 120])
def test_few_rows_give_all_their_directions_exactly(rows):
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))
    moment = Moment(x.T @ x / rows, 5 * rows)  # seen five times
    subspace = principal_subspace(moment, 256)
    exact = principal_subspace(moment, 256, solver="exact")
    assert subspace.rank == exact.rank == rows
    torch.testing.assert_close(subspace.values, exact.values, rtol=1e-4, atol=1e-4)
    projected = exact.vectors @ (exact.vectors.T @ subspace.vectors)
    torch.testing.assert_close(projected, subspace.vectors, rtol=0, atol=1e-3)


def test_a_large_part_of_a_wide_moment_is_solved_in_full():
    matrix = with_spectrum(1.0 / torch.arange(1, WIDTH + 1))
    subspace = principal_subspace(Moment(matrix, 10 * WIDTH), 300)
    exact = principal_subspace(Moment(matrix, 10 * WIDTH), 300, solver="exact")
    torch.testing.assert_close(subspace.values, exact.values, rtol=1e-4, atol=1e-5)
    assert principal_subspace(Moment(matrix, 10 * WIDTH)).rank == WIDTH


def test_a_moment_in_float64_is_solved_in_float64():
    x = torch.randn(2000, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    moment = Moment(x.T @ x / 2000, 2000)
    values = principal_subspace(moment).values
    normalised = moment.matrix / moment.matrix.diagonal().mean()
    torch.testing.assert_close(
        values, torch.linalg.eigvalsh(normalised).flip(0), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
@pytest.mark.parametrize("dependent", [False, True])
def test_spectra_without_an_svd_equal_the_svd(shape, dependent):
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(shape, generator=generator)
    if dependent:
        matrix[:, -1] = matrix[:, 0]
    expected = torch.linalg.svdvals(matrix.double())
    values = singular_values(gram_matrix(matrix))
    torch.testing.assert_close(values, expected[: len(values)], rtol=1e-6, atol=1e-6)
    assert (expected[len(values) :] < 1e-6).all()
    basis = torch.linalg.qr(torch.randn(12, shape[1], generator=generator)).Q
    spectrum = thin_spectrum(matrix, basis)
    torch.testing.assert_close(spectrum.delta(), matrix @ basis.T, rtol=1e-5, atol=1e-5)
    kept = spectrum.rank
    assert kept == min(shape) - (1 if dependent and shape[1] <= shape[0] else 0)
    torch.testing.assert_close(spectrum.left.T @ spectrum.left, torch.eye(kept), rtol=0, atol=1e-5)
    torch.testing.assert_close(spectrum.values.double(), expected[:kept], rtol=1e-5, atol=1e-6)


def test_directions_of_a_tiny_gain_stay_orthonormal():
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(40, 8, generator=generator) * torch.logspace(0, -5.5, 8)
    spectrum = thin_spectrum(matrix, torch.eye(8))
    assert spectrum.rank == 8
    gram = spectrum.left.T @ spectrum.left
    torch.testing.assert_close(gram, torch.eye(8), rtol=0, atol=1e-4)


def test_the_report_says_which_solver_was_used_and_how_far_off_it_may_be():
    rows = torch.randn(1500, 1024, generator=torch.Generator().manual_seed(5))
    rows = rows * torch.arange(1, 1025).rsqrt()
    reports = {}
    for solver in ("fast", "exact"):
        net = nn.Sequential(nn.Linear(1024, 8))
        config = CNTLoRAConfig(rank_budget="fixed", solver=solver)
        lora = LoraConfig(r=8, target_modules=["0"])
        reports[solver] = get_cntlora_model(net, lora, config, [rows]).cntlora_report
    assert 0 < reports["fast"].solver_error < 0.05
    assert reports["exact"].solver_error == 0
    assert "(solver fast, directions off by " in reports["fast"].summary()
    assert "(solver exact)" in reports["exact"].summary()
    assert reports["fast"].to_dict()["solver_error"] == reports["fast"].solver_error
