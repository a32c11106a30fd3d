"""Canonical polyadic decomposition against what is known of it."""

from __future__ import annotations

import pytest
import torch

from cntlora_core.lava.cp import _updated, decompose, khatri_rao


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outer(factors):
    letters = "abcd"[: len(factors)]
    return torch.einsum(",".join(x + "r" for x in letters) + "->" + letters, *factors)


def of_tensor(tensor, rank, **options):
    return decompose(torch.eye(tensor.shape[0]), tensor, rank, **options)


@pytest.mark.parametrize("sides", [(9, 7, 3, 3), (6, 11, 3), (12, 40, 3, 2)])
def test_a_sum_of_few_terms_is_found_again(sides):
    factors = [normal(n, 2, seed=i) for i, n in enumerate(sides)]
    found = of_tensor(outer(factors), 2, iterations=500, tolerance=0)
    assert found.error < 1e-6
    torch.testing.assert_close(outer(found.factors), outer(factors), rtol=1e-4, atol=1e-4)


def test_the_error_is_the_true_one_and_never_grows():
    left, right = normal(10, 4), normal(4, 6, 3, 3, seed=1)
    whole = torch.einsum("ij,j...->i...", left, right)
    last = 1.0
    for rank in (1, 2, 4, 8):
        found = decompose(left, right, rank)
        true = (outer(found.factors) - whole).norm() / whole.norm()
        assert found.error == pytest.approx(float(true), rel=1e-8)
        for before, after in zip(found.errors, found.errors[1:]):
            assert after <= before + 1e-10
        assert found.errors[-1] < found.errors[0]  # better than singular vectors
        assert found.error < last
        last = found.error


def test_compressing_to_the_span_changes_nothing():
    # 50 channels of input, 12 = 3 x 2 x 2 directions in them.
    left, right = normal(20, 3), normal(3, 50, 2, 2, seed=1)
    found = decompose(left, right, 3, iterations=300, tolerance=0)
    direct = of_tensor(torch.einsum("ij,j...->i...", left, right), 3, iterations=300, tolerance=0)
    assert found.error == pytest.approx(direct.error, abs=1e-5)


def test_an_update_is_the_least_squares_solution():
    tensor = normal(5, 4, 3, 2)
    factors = [normal(n, 3, seed=9 + n) for n in tensor.shape]
    for mode in range(4):
        others = factors[:mode] + factors[mode + 1 :]
        unfolding = tensor.movedim(mode, 0).flatten(1)
        wanted = torch.linalg.lstsq(khatri_rao(others), unfolding.T).solution.T
        torch.testing.assert_close(_updated(unfolding, factors, mode, False), wanted)


def test_of_a_matrix_it_is_the_truncated_svd():
    left, right = normal(8, 5), normal(5, 6, seed=1)
    found = decompose(left, right, 2)
    values = torch.linalg.svdvals(left @ right)
    assert found.error == pytest.approx(float(values[2:].norm() / values.norm()))
    u, v = found.factors
    torch.testing.assert_close(u.T @ u, torch.eye(2, dtype=u.dtype))
    assert (u @ v.T - left @ right).norm() == pytest.approx(float(values[2:].norm()))
    assert decompose(left, right, 7).error < 1e-12
    assert decompose(left, right, 7).factors[0].shape == (8, 7)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_orthonormal_first_factors(rank):
    left, right = normal(10, 5), normal(5, 6, 3, 3, seed=1)
    found = decompose(left, right, rank, orthonormal=True)
    u = found.factors[0]
    torch.testing.assert_close(u.T @ u, torch.eye(rank, dtype=u.dtype))
    free = decompose(left, right, rank)
    assert free.error <= found.error + 1e-6
    # With a given orthonormal U, each term is the best product for its slice: none can do better
    # than the singular values of the unfolded tensor allow.
    values = torch.linalg.svdvals(left @ right.flatten(1))
    assert found.error >= float(values[rank:].norm() / values.norm()) - 1e-9
    assert found.error < 1


def test_more_terms_than_singular_vectors_give():
    tensor = normal(2, 2, 2)
    found = of_tensor(tensor, 6, iterations=500)
    assert found.error < 0.05
    assert all(f.shape == (2, 6) for f in found.factors)


def test_zeros():
    found = decompose(torch.zeros(4, 2), normal(2, 3, 3, 3), 2)
    assert found.error == 0
    assert all(not f.any() for f in found.factors)
