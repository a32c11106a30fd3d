"""Few eigenpairs of a wide moment, and the cheap spectra, against LAPACK's in float64."""

from __future__ import annotations

import pytest
import torch

from cntlora_core.linalg import (
    gram_matrix,
    principal_subspace,
    singular_values,
    subspace_iteration,
    thin_spectrum,
)
from cntlora_core.moments import Moment

WIDTH = 640


def with_spectrum(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """(d, d) float32, symmetric, with these eigenvalues and a mean diagonal of 1."""
    generator = torch.Generator().manual_seed(seed)
    width = len(values)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator).double()).Q
    matrix = (basis * values.double()) @ basis.T
    return (matrix / matrix.diagonal().mean()).float()


def test_few_pairs_of_a_wide_moment_span_what_the_leading_ones_do():
    matrix = with_spectrum(1.0 / torch.arange(1, WIDTH + 1))
    k = 24
    subspace = principal_subspace(Moment(matrix, 10 * WIDTH), k)
    exact = principal_subspace(Moment(matrix, 10 * WIDTH), k, exact=True)
    assert subspace.rank == exact.rank == k
    assert not torch.equal(subspace.vectors, exact.vectors)  # it was another solver
    torch.testing.assert_close(subspace.values, exact.values, rtol=0.05, atol=0)
    torch.testing.assert_close(subspace.values[:12], exact.values[:12], rtol=1e-3, atol=0)
    assert float(subspace.values.sum() / exact.values.sum()) > 0.995
    # Whatever the span, the moment is diagonal within it, and its diagonal is what was returned.
    inner = subspace.vectors.double().T @ matrix.double() @ subspace.vectors.double()
    torch.testing.assert_close(inner, torch.diag(subspace.values), rtol=1e-4, atol=1e-4)
    gram = subspace.vectors.T @ subspace.vectors
    torch.testing.assert_close(gram, torch.eye(k), rtol=0, atol=1e-5)


def test_iteration_gives_up_where_all_eigenvalues_are_nearly_alike():
    # Past a cliff, and on a slope so gentle that the last pairs never settle.
    assert subspace_iteration(with_spectrum(torch.linspace(1, 2, WIDTH)), 16, rounds=2) is None
    steep = with_spectrum(torch.cat([torch.full((16,), 50.0), torch.ones(WIDTH - 16)]))
    found = subspace_iteration(steep, 16)
    assert found is not None
    expected = torch.linalg.eigvalsh(steep).flip(0)[:16]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [3, 77, 120])
def test_few_rows_give_all_their_directions_exactly(rows):
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))
    moment = Moment(x.T @ x / rows, 5 * rows)  # seen five times
    subspace = principal_subspace(moment, 256)
    exact = principal_subspace(moment, 256, exact=True)
    assert subspace.rank == exact.rank == rows
    torch.testing.assert_close(subspace.values, exact.values, rtol=1e-4, atol=1e-4)
    projected = exact.vectors @ (exact.vectors.T @ subspace.vectors)
    torch.testing.assert_close(projected, subspace.vectors, rtol=0, atol=1e-3)


def test_a_large_part_of_a_wide_moment_is_solved_in_full():
    matrix = with_spectrum(1.0 / torch.arange(1, WIDTH + 1))
    subspace = principal_subspace(Moment(matrix, 10 * WIDTH), 300)
    exact = principal_subspace(Moment(matrix, 10 * WIDTH), 300, exact=True)
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
