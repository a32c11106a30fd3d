"""The closed forms against the demands they were derived from, in float64 (docs/method.md)."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core.activations.moments import Moment, SecondMoment
from cntlora_core.closed_form.constraints import PointDelta, gains
from cntlora_core.closed_form.equation import delta
from cntlora_core.closed_form.factorization import factorize
from cntlora_core.closed_form.spectra import PrincipalSubspace, principal_subspace
from cntlora_core.config import CNTLoRAConfig


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


def naive_scale(target, inverse):
    """Of c in ``c * target @ inverse``, by least squares towards ``target``, as one long vector."""
    moved = (target @ inverse).flatten()
    return float(torch.linalg.lstsq(moved[:, None], target.flatten()[:, None]).solution)


@pytest.mark.parametrize(("d_out", "d_in"), [(5, 8), (8, 8), (11, 6)])
@pytest.mark.parametrize("unit", ["least-change", "mean"])
@pytest.mark.parametrize("constraint", ["cross", "self", "shift"])
def test_adapted_layer_gives_on_target_what_the_base_gave_on_source(constraint, unit, d_out, d_in):
    n = 200
    x_tar = target_rows(n, d_in)
    weight = torch.randn(d_out, d_in, dtype=torch.float64)
    c = x_tar.T @ x_tar / n
    eye = torch.eye(d_in, dtype=torch.float64)
    k = torch.randn(d_in, d_in, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(c)
    inverse = torch.linalg.inv(c)
    inverse_root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    target, moved = {
        "cross": (weight, inverse),
        "self": (weight, inverse_root),
        "shift": (weight @ k, inverse),
    }[constraint]
    scale = 1.0 if unit == "mean" else naive_scale(target, moved)
    # Source rows that satisfy the second constraint (F2) by construction, in the unit.
    x_src = {
        "cross": scale * x_tar @ inverse,
        "self": scale * x_tar @ inverse_root,
        "shift": x_tar + scale * x_tar @ inverse @ k.T,
    }[constraint]
    second = {
        "cross": (x_src.T @ x_tar / n, scale * eye),
        "self": (x_src.T @ x_src / n, scale**2 * eye),
        "shift": ((x_src - x_tar).T @ x_tar / n, scale * k),
    }[constraint]
    torch.testing.assert_close(*second, rtol=1e-8, atol=1e-8)

    config = CNTLoRAConfig(
        constraint=constraint,
        unit=unit,
        damping=0.0,
        subspace="full",
        shift=k if constraint == "shift" else 1.0,
    )
    adapted = weight + delta(weight, moment_of(x_tar), config)
    # F1: what the adapted layer gives on target rows is what the base gave on source rows.
    torch.testing.assert_close(x_tar @ adapted.T, x_src @ weight.T, rtol=1e-8, atol=1e-8)


SPECTRA = {
    "flat": lambda k: torch.ones(k),
    "nearly flat": lambda k: torch.linspace(1.1, 0.9, k),
    "power law": lambda k: 1.0 / torch.arange(1, k + 1),
    "nearly one direction": lambda k: torch.cat(
        [torch.tensor([120.0]), 0.5 * torch.logspace(0, -4, k - 1)]
    ),
    "condition 1e6": lambda k: torch.logspace(0, -6, k),
}
WEIGHTS = {
    "any": lambda w, v: w,
    "blind to the last directions": lambda w, v: w - w @ v[:, -2:] @ v[:, -2:].T * (1 - 1e-7),
    "blind to all but the first": lambda w, v: w @ v[:, :1] @ v[:, :1].T + 1e-6 * w,
    "huge": lambda w, v: 1e8 * w,
    "zero": lambda w, v: 0 * w,
}


def pairs_of(values, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(width, width, generator=generator).double()).Q
    return PrincipalSubspace(vectors[:, : len(values)], values.double())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("look", WEIGHTS)
@pytest.mark.parametrize("constraint", ["cross", "self", "shift", "normal", "matrix"])
@pytest.mark.parametrize(
    "k",
    [pytest.param(1, marks=pytest.mark.thorough), pytest.param(2, marks=pytest.mark.thorough), 12],
)
def test_the_delta_is_never_larger_than_the_weight(spectrum, look, constraint, k):
    width = 20
    generator = torch.Generator().manual_seed(k)
    subspace = pairs_of(SPECTRA[spectrum](k), width)
    weight = torch.randn(15, width, generator=generator).double()
    weight = WEIGHTS[look](weight, subspace.vectors).float()
    shift = torch.randn(width, width, generator=generator) if constraint == "matrix" else constraint
    options: dict = {"constraint": constraint}
    if constraint in ("normal", "matrix"):
        options = {"constraint": "shift", "shift": shift}
    found = PointDelta(weight, subspace, CNTLoRAConfig(**options)).spectrum().delta()
    vectors = subspace.vectors.float()
    target = weight @ vectors
    if constraint == "matrix":
        target = target @ vectors.T @ shift @ vectors
    bound = float(target.norm())
    if constraint == "normal":  # the block is drawn within the span: its length is not known here
        bound *= 5
    assert float(found.norm()) <= bound * (1 + 1e-5)
    assert torch.isfinite(found).all()


def fast_delta(weight, moment, config, rank=None):
    subspace = principal_subspace(moment, rank, solver=config.solver)
    return PointDelta(weight, subspace, config).spectrum().delta().double()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("constraint", ["cross", "self", "shift", "normal", "matrix"])
@pytest.mark.parametrize("unit", ["least-change", "mean"])
def test_the_fast_code_computes_the_equation_for_every_spectrum(spectrum, constraint, unit):
    generator = torch.Generator().manual_seed(1)
    pairs = pairs_of(SPECTRA[spectrum](7), 12)
    moment = Moment((pairs.vectors * pairs.values) @ pairs.vectors.T, 1000)
    options: dict = {"constraint": constraint, "shift": 0.7 if constraint == "shift" else 1.0}
    if constraint in ("normal", "matrix"):
        matrix = torch.randn(12, 12, generator=generator)
        options = {"constraint": "shift", "shift": constraint if constraint == "normal" else matrix}
    config = CNTLoRAConfig(unit=unit, damping=0.3, seed=5, **options)
    for _ in range(2):  # the unit is each weight's own, though they read one input
        weight = torch.randn(9, 12, generator=generator).double()
        expected = delta(weight, moment, config)
        error = (fast_delta(weight, moment, config) - expected).norm()
        assert error <= 1e-5 * max(expected.norm(), weight.norm())


def test_the_documentation_quotes_the_equation():
    document = Path(__file__).parents[2] / "docs" / "method.md"
    quoted = document.read_text("utf-8").partition("```python\n")[2].partition("```")[0]
    assert textwrap.indent(quoted, "    ") in inspect.getsource(delta)


@pytest.mark.parametrize(
    ("width", "rank"),
    [
        (9, 4),
        (600, 100),
        pytest.param(900, 12, marks=pytest.mark.thorough),
        pytest.param(1000, 500, marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("constraint", ["cross", "self", "shift"])
@pytest.mark.parametrize("solver", ["fast", "exact"])
def test_the_fast_code_computes_the_equation_at_the_widths_where_it_is_fast(
    width, rank, constraint, solver
):
    pairs = pairs_of(1.0 / torch.arange(1, width + 1), width)
    moment = Moment(((pairs.vectors * pairs.values) @ pairs.vectors.T).float(), 10 * width)
    weight = torch.randn(40, width, generator=torch.Generator().manual_seed(2))
    config = CNTLoRAConfig(constraint=constraint, solver=solver)
    expected = delta(weight, moment, config, rank)
    error = (fast_delta(weight, moment, config, rank) - expected).norm()
    assert error <= (1e-5 if solver == "exact" or width <= 512 else 1e-2) * expected.norm()


@pytest.mark.parametrize("constraint", ["cross", "self"])
def test_no_other_unit_changes_the_weight_less(constraint):
    subspace = pairs_of(SPECTRA["power law"](8), 14)
    weight = torch.randn(9, 14).double()
    norms = (weight @ subspace.vectors).square().sum(0)
    least = gains(subspace.values, norms, CNTLoRAConfig(constraint=constraint))
    h = subspace.values ** (-0.5 if constraint == "self" else -1.0)
    for scale in torch.logspace(-3, 3, 200).tolist():
        assert (norms * least**2).sum() <= (norms * (scale * h - 1) ** 2).sum()


def test_ten_times_the_shift_is_ten_times_the_delta():
    rows, weight = target_rows(60, 6).float(), torch.randn(5, 6)
    subspace = principal_subspace(moment_of(rows), 3)
    for k in (0.3, torch.randn(6, 6)):
        one, ten = (
            PointDelta(weight, subspace, CNTLoRAConfig(constraint="shift", shift=shift))
            for shift in (k, 10 * k)
        )
        torch.testing.assert_close(10 * one.spectrum().delta(), ten.spectrum().delta())


@pytest.mark.parametrize("constraint", ["cross", "self"])
@pytest.mark.parametrize("values", [torch.tensor([3.0]), torch.ones(4)])
def test_where_nothing_need_change_the_initialisation_is_plain_lora_s(constraint, values):
    config = CNTLoRAConfig(constraint=constraint)
    found = PointDelta(torch.randn(6, 9), pairs_of(values, 9), config)
    assert found.singular_values().numel() == 0
    factors = factorize(found.spectrum(), 3, 2.0, config)
    assert factors.filled == 3
    assert factors.up.abs().max() == 0
    assert factors.down.norm(dim=1).min() > 0.1


def test_principal_delta_acts_within_the_leading_eigenvectors_only():
    rows = target_rows(300, 12)
    weight = torch.randn(7, 12)
    subspace = principal_subspace(moment_of(rows), 4)
    found = PointDelta(weight, subspace, CNTLoRAConfig(unit="mean")).spectrum().delta()
    outside = torch.linalg.qr(torch.cat([subspace.vectors, torch.randn(12, 8)], 1)).Q[:, 4:]
    assert (found @ outside).norm() < 1e-5 * found.norm()
    assert torch.linalg.matrix_rank(found) == 4


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


def test_directions_that_the_data_lacks_are_initialised_as_plain_lora():
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
def test_no_data_and_constant_zero_inputs_give_a_plain_initialisation(rows):
    config = CNTLoRAConfig()
    spectrum = PointDelta(
        torch.randn(4, 5), principal_subspace(moment_of(rows), 3), config
    ).spectrum()
    factors = factorize(spectrum, 3, 2.0, config)
    assert factors.filled == 3
    assert factors.up.abs().max() == 0


def test_normal_shift_is_seeded():
    rows, weight = target_rows(100, 9).float(), torch.randn(6, 9)
    subspace = principal_subspace(moment_of(rows), 4)

    def seeded(seed):
        config = CNTLoRAConfig(constraint="shift", shift="normal", seed=seed)
        return PointDelta(weight, subspace, config).spectrum().delta()

    torch.testing.assert_close(seeded(1), seeded(1))
    assert (seeded(1) - seeded(2)).norm() > 0.1 * seeded(1).norm()


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
