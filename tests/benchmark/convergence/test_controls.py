"""The controls keep what they say, and nothing else."""

from __future__ import annotations

import pytest
import torch

from cntlora_core.benchmark.convergence.controls import (
    LORA_ROW_NORM,
    plain_norms,
    random_directions,
)
from cntlora_core.closed_form.factorization import Factors, plain_factors


@pytest.fixture
def factors() -> Factors:
    generator = torch.Generator().manual_seed(0)
    return Factors(
        torch.randn(3, 8, generator=generator), torch.randn(5, 3, generator=generator), 2.0
    )


def test_random_directions_keep_the_norms_and_are_orthogonal(factors):
    found = random_directions(factors, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.down.norm(dim=1), factors.down.norm(dim=1))
    torch.testing.assert_close(found.up.norm(dim=0), factors.up.norm(dim=0))
    for rows in (found.down, found.up.T):
        gram = rows @ rows.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-5, rtol=0)
    cosines = torch.cosine_similarity(found.down, factors.down, dim=1)
    assert cosines.abs().max() < 0.95
    assert found.scaling == factors.scaling


def test_plain_norms_keep_the_directions_and_start_at_zero(factors):
    found = plain_norms(factors)
    torch.testing.assert_close(
        torch.cosine_similarity(found.down, factors.down, dim=1), torch.ones(3)
    )
    assert not found.up.any()
    plain, _ = plain_factors(500, 64, 8, torch.Generator().manual_seed(0))
    mean_square = plain.square().sum(1).mean()
    torch.testing.assert_close(mean_square, torch.tensor(LORA_ROW_NORM**2), rtol=0.02, atol=0)
    torch.testing.assert_close(found.down.norm(dim=1), torch.full((3,), LORA_ROW_NORM))
