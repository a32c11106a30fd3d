"""Which eigenvalues are the data's and which are rounding, however the rows were added up.

Processors differ in the order in which they add: rows are summed here in many orders.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cntlora_core.activations.moments import Moment, SecondMoment
from cntlora_core.closed_form.constraints import PointDelta
from cntlora_core.closed_form.spectra import principal_subspace
from cntlora_core.config import CNTLoRAConfig

# In one product, row by row, in batches that repeat, in uneven ones.
CHUNKS = st.sampled_from([10**9, 1, 77, 1024])


def few_distinct_rows(width: int, rank: int, condition: float, seed: int) -> Tensor:
    """(rank, width) float64, independent; their squared lengths fall over ``condition`` decades."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, rank, generator=generator).double()).Q
    return torch.logspace(0, -condition / 2, rank).double()[:, None] * basis.T


def summed(rows: Tensor, chunk: int) -> Moment:
    fitter = SecondMoment(rows.shape[1])
    for part in rows.split(chunk):
        fitter.update(part)
    return fitter.result()


def true_moment(rows: Tensor) -> Tensor:
    double = rows.double()
    return double.T @ double / len(rows)


@settings(max_examples=20, deadline=None)
@given(
    width=st.sampled_from([6, 40, 160]),
    repeats=st.sampled_from([1, 40, 300]),
    rank=st.integers(1, 5),
    condition=st.sampled_from([0.0, 2.0, 4.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    chunk=CHUNKS,
    shuffle=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_repeated_rows_give_their_own_directions_and_no_others(
    width, repeats, rank, condition, dtype, chunk, shuffle, seed
):
    rows = few_distinct_rows(width, rank, condition, seed).to(dtype).repeat(repeats, 1)
    if shuffle:
        generator = torch.Generator().manual_seed(seed)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        rows = rows[:, torch.randperm(width, generator=generator)]
    moment = summed(rows, chunk)
    found = principal_subspace(moment, width).rank
    assert found <= rank
    exact = true_moment(rows)
    lost = float((moment.matrix.double() - exact).norm())
    values = torch.linalg.eigvalsh(exact)
    clear = values > 6 * lost + 1e-5 * values[-1]
    assert found >= int(clear.sum())


@settings(max_examples=10, deadline=None)
@given(chunk=CHUNKS, n=st.sampled_from([50, 800]), half=st.integers(1, 60), seed=st.integers(0, 99))
def test_duplicated_features_add_no_direction(chunk, n, half, seed):
    rows = torch.randn(n, half, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([rows, rows.flip(1)], dim=1)
    assert principal_subspace(summed(both, chunk), 2 * half).rank == min(n, half)


def orders(rows: Tensor) -> Iterator[Moment]:
    for chunk in (10**9, 1, 7, 100):
        for permuted in (rows, rows.flip(1), rows.flip(0)):
            yield summed(permuted, chunk)


def test_no_order_of_adding_invents_directions():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    rows = torch.randn(4, 6, generator=generator, dtype=torch.float64) @ mixing
    found = [principal_subspace(m, 6).rank for m in orders(rows.float().repeat(500, 1))]
    assert found == [4] * len(found)


def test_the_delta_does_not_hang_on_the_order_of_adding():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 6, generator=generator).repeat(500, 1)
    weight = torch.randn(5, 6, generator=generator)
    for unit in ("least-change", "mean"):
        deltas = [
            PointDelta(weight, principal_subspace(summed(rows, c), 6), CNTLoRAConfig(unit=unit))
            .spectrum()
            .delta()
            for c in (10**9, 1, 7)
        ]
        for delta in deltas[1:]:
            assert float((delta - deltas[0]).norm()) < 1e-2 * float(deltas[0].norm())


@pytest.mark.parametrize("width", [6, 8, 9, 320, 640])
@pytest.mark.parametrize("chunk", [1, 77, 10**9])
def test_the_measured_rounding_is_that_of_the_sum(width, chunk):
    base = torch.randn(77, width, generator=torch.Generator().manual_seed(1))
    base[:, 0] += 5
    moment = summed(base.repeat(8, 1), chunk)
    lost = float((moment.matrix.double() - true_moment(base)).norm())
    assert lost > 0
    assert lost / 3 < moment.rounding < 3 * lost + 1e-6 * float(moment.matrix.norm())


def test_rounding_is_that_of_all_parts_that_were_added_up():
    rows = torch.randn(300, 20, generator=torch.Generator().manual_seed(2))
    whole, one, two = (SecondMoment(20) for _ in range(3))
    for part in rows.split(10):
        whole.update(part)
    for i, part in enumerate(rows.split(10)):
        (one if i % 2 else two).update(part)
    one.add(two.total, two.count, two.probed)
    merged, moment = one.result(), whole.result()
    assert 0 < merged.rounding < 4 * moment.rounding
    lost = float((merged.matrix.double() - true_moment(rows)).norm())
    assert lost / 3 < merged.rounding < 3 * lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_a_wide_matrix_has_the_rank_that_it_was_made_with(dtype, spread):
    width, rank = 700, 300
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(width, rank, generator=generator).double()).Q
    matrix = (basis * torch.logspace(0, -spread, rank).double()) @ basis.T
    moment = Moment(((matrix + matrix.T) / 2).to(dtype), 10**6)
    assert principal_subspace(moment).rank == rank
