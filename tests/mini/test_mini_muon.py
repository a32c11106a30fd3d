"""Muon: its iteration against a singular value decomposition, and its step on a simple loss."""

from __future__ import annotations

import pytest
import torch

from cntlora_core.mini.making.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator))[0]
    values = torch.logspace(0, -2, min(shape))  # a hundredfold spread
    found = orthogonalised(7 * left * values @ right.T)
    inner = left.T @ found @ right
    assert 0.6 < inner.diagonal().min() < inner.diagonal().max() < 1.3
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 0.01
    torch.testing.assert_close(left @ inner @ right.T, found, rtol=0, atol=0.01)


def test_a_step_moves_every_direction_alike_and_a_kernel_counts_as_a_matrix():
    kernel = torch.nn.Parameter(torch.zeros(8, 4, 3, 3))
    optimizer = Muon([kernel], lr=0.1, weight_decay=0)
    torch.manual_seed(1)
    kernel.grad = torch.randn_like(kernel)
    optimizer.step()
    moved = torch.linalg.svdvals(kernel.detach().flatten(1)) / (0.1 * 0.2 * 36**0.5)
    assert 0.6 < moved.min() < moved.max() < 1.3
    assert (kernel.detach() * kernel.grad).sum() < 0
