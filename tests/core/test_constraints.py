"""The closed forms against the demands they were derived from, in float64 (docs/method.md)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core.config import CNTLoRAConfig
from cntlora_core.constraints import PointDelta
from cntlora_core.factorization import factorize
from cntlora_core.linalg import principal_subspace
from cntlora_core.moments import Moment, SecondMoment


@pytest.fixture(autouse=True)
def same_weights() -> None:
    """A square weight may be singular to working precision, one time in many."""
    torch.manual_seed(0)


def target_rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Correlated rows whose second moment has mean diagonal 1, as the method normalises it."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing
    return rows / rows.square().mean().sqrt()


def moment_of(rows: torch.Tensor) -> Moment:
    fitter = SecondMoment(rows.shape[1])
    fitter.update(rows)
    return fitter.result()


def full_delta(rows, weight, config):
    subspace = principal_subspace(moment_of(rows))
    vectors = torch.linalg.eigh(moment_of(rows).matrix)[1].flip(1)  # float64, unlike the library's
    subspace = type(subspace)(vectors, subspace.values)
    return PointDelta(weight, subspace, config).spectrum().delta()


@pytest.mark.parametrize(("d_out", "d_in"), [(5, 8), (8, 8), (11, 6)])
@pytest.mark.parametrize("constraint", ["cross", "self", "shift"])
def test_adapted_layer_gives_on_target_what_the_base_gave_on_source(constraint, d_out, d_in):
    n = 200
    x_tar = target_rows(n, d_in)
    weight = torch.randn(d_out, d_in, dtype=torch.float64)
    c = x_tar.T @ x_tar / n
    eye = torch.eye(d_in, dtype=torch.float64)
    k = torch.randn(d_in, d_in, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(c)
    inverse_root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    # Source rows that satisfy the second constraint (F2) by construction.
    x_src = {
        "cross": x_tar @ torch.linalg.inv(c),
        "self": x_tar @ inverse_root,
        "shift": x_tar + x_tar @ torch.linalg.inv(c) @ k.T,
    }[constraint]
    second = {
        "cross": (x_src.T @ x_tar / n, eye),
        "self": (x_src.T @ x_src / n, eye),
        "shift": ((x_src - x_tar).T @ x_tar / n, k),
    }[constraint]
    torch.testing.assert_close(*second, rtol=1e-8, atol=1e-8)

    config = CNTLoRAConfig(
        constraint=constraint,
        damping=0.0,
        subspace="full",
        shift=k if constraint == "shift" else 1.0,
    )
    delta = full_delta(x_tar, weight, config)
    # F1: what the adapted layer gives on target rows is what the base gave on source rows.
    torch.testing.assert_close(x_tar @ (weight + delta).T, x_src @ weight.T, rtol=1e-6, atol=1e-6)


def test_principal_delta_acts_within_the_leading_eigenvectors_only():
    rows = target_rows(300, 12)
    weight = torch.randn(7, 12)
    subspace = principal_subspace(moment_of(rows), 4)
    delta = PointDelta(weight, subspace, CNTLoRAConfig()).spectrum().delta()
    outside = torch.linalg.qr(torch.cat([subspace.vectors, torch.randn(12, 8)], 1)).Q[:, 4:]
    assert (delta @ outside).norm() < 1e-5 * delta.norm()
    assert torch.linalg.matrix_rank(delta) == 4
    gain = 1 / (subspace.values.float() + 1e-2) - 1
    expected = weight @ subspace.vectors * gain @ subspace.vectors.T
    torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 50), scale=st.sampled_from([1e-3, 0.5, 7.0, 1e3]))
@settings(max_examples=20, deadline=None)
def test_scaling_the_inputs_does_not_matter(seed, scale):
    rows, weight = target_rows(60, 6, seed).float(), torch.randn(4, 6)
    deltas = [
        PointDelta(weight, principal_subspace(moment_of(r), 3), CNTLoRAConfig()).spectrum().delta()
        for r in (rows, rows * scale)
    ]
    torch.testing.assert_close(*deltas, rtol=1e-3, atol=1e-3)


@given(seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_permuting_features_permutes_the_delta(seed):
    rows, weight = target_rows(80, 6, seed).float(), torch.randn(4, 6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    plain = PointDelta(weight, principal_subspace(moment_of(rows), 3), CNTLoRAConfig()).spectrum()
    permuted = PointDelta(
        weight[:, order], principal_subspace(moment_of(rows[:, order]), 3), CNTLoRAConfig()
    ).spectrum()
    torch.testing.assert_close(permuted.delta(), plain.delta()[:, order], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"split": p} for p in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)] + [{"factorization": "qr"}],
)
@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("rank", [2, 5])
def test_factors_are_the_best_approximation_of_their_rank(options, scaling, rank):
    rows, weight = target_rows(100, 9).float(), torch.randn(6, 9)
    config = CNTLoRAConfig(**options)
    spectrum = PointDelta(weight, principal_subspace(moment_of(rows), 5), config).spectrum()
    factors = factorize(spectrum, rank, scaling, config)
    left, values, right = torch.linalg.svd(spectrum.delta().double())
    best = left[:, :rank] * values[:rank] @ right[:rank]
    torch.testing.assert_close(factors.delta().double(), best, rtol=1e-4, atol=1e-3)
    assert factors.filled == 0
    if options.get("factorization") == "qr":
        torch.testing.assert_close(factors.up.T @ factors.up, torch.eye(rank), atol=1e-5, rtol=0)


def test_split_says_which_factor_carries_the_spectrum():
    rows, weight = target_rows(100, 9).float(), torch.randn(6, 9)
    norms = {}
    for split in (0.0, 0.5, 1.0):
        config = CNTLoRAConfig(split=split)
        spectrum = PointDelta(weight, principal_subspace(moment_of(rows), 4), config).spectrum()
        factors = factorize(spectrum, 4, 1.0, config)
        norms[split] = (factors.up.norm(dim=0), factors.down.norm(dim=1))
    torch.testing.assert_close(norms[0.0][0], torch.ones(4))
    torch.testing.assert_close(norms[1.0][1], torch.ones(4))
    torch.testing.assert_close(norms[0.5][0], norms[0.5][1])


def test_directions_that_the_data_lacks_start_as_plain_lora():
    rows = target_rows(3, 9).float()
    config = CNTLoRAConfig()
    spectrum = PointDelta(
        torch.randn(6, 9), principal_subspace(moment_of(rows), 5), config
    ).spectrum()
    factors = factorize(spectrum, 5, 2.0, config)
    assert factors.filled == 2
    assert factors.up[:, 3:].abs().max() == 0
    bound = 1 / 9**0.5
    assert 0 < factors.down[3:].abs().max() <= bound
    torch.testing.assert_close(factors.delta(), spectrum.delta(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [torch.zeros(0, 5), torch.zeros(20, 5)])
def test_no_data_and_constant_zero_inputs_give_a_plain_start(rows):
    config = CNTLoRAConfig()
    spectrum = PointDelta(
        torch.randn(4, 5), principal_subspace(moment_of(rows), 3), config
    ).spectrum()
    factors = factorize(spectrum, 3, 2.0, config)
    assert factors.filled == 3
    assert factors.up.abs().max() == 0


def test_duplicated_rows_and_features_do_not_invent_directions():
    rows = target_rows(4, 6).float().repeat(500, 1)
    assert principal_subspace(moment_of(rows), 6).rank == 4
    doubled = torch.cat([target_rows(50, 3)] * 2, dim=1).float()
    assert principal_subspace(moment_of(doubled), 6).rank == 3


def test_normal_shift_is_seeded():
    rows, weight = target_rows(100, 9).float(), torch.randn(6, 9)
    subspace = principal_subspace(moment_of(rows), 4)

    def delta(seed):
        config = CNTLoRAConfig(constraint="shift", shift="normal", seed=seed)
        return PointDelta(weight, subspace, config).spectrum().delta()

    torch.testing.assert_close(delta(1), delta(1))
    assert (delta(1) - delta(2)).norm() > 0.1 * delta(1).norm()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"constraint": "diagonal"}, "cross, self, shift"),
        ({"split": 1.5}, "between 0 and 1"),
        ({"factorization": "qr", "split": 0.75}, "split=0.75 has no effect"),
        ({"constraint": "shift", "shift": 0.0}, "other than 0"),
        ({"constraint": "shift", "shift": "uniform"}, "normal"),
        ({"damping": -1.0}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"min_rank": 0}, "min_rank"),
        ({"rho": 0.5}, "rho"),
        ({"rank_budget": "all"}, "fixed, ranks, parameters"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        CNTLoRAConfig(**options)


def test_a_shift_without_its_constraint_is_refused_when_it_is_used():
    with pytest.raises(ValueError, match="belongs to constraint='shift'"):
        CNTLoRAConfig(shift=10.0).require_consistent()
    CNTLoRAConfig(constraint="shift", shift=10.0).require_consistent()


def test_settings_travel_through_json():
    config = CNTLoRAConfig(constraint="shift", shift="normal", rank_budget="parameters", seed=3)
    assert CNTLoRAConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="dampening"):
        CNTLoRAConfig.from_dict({"dampening": 0.1})
