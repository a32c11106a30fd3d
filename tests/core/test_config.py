"""Settings: what is refused in words, and a shift that is a matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

from cntlora_core import CNTLoRAConfig, get_cntlora_model
from cntlora_core.activations.moments import Moment
from cntlora_core.closed_form.constraints import PointDelta
from cntlora_core.closed_form.spectra import principal_subspace
from cntlora_core.diffusion.settings import AdapterSettings


def shifted(shift, **options):
    return CNTLoRAConfig(constraint="shift", shift=shift, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank_budget": "fixed", "min_rank": 2}, "min_rank=2 has no effect"),
        ({"rank_budget": "fixed", "rho": 3.0}, "rho=3.0 has no effect"),
        ({"split": "0.5"}, "split must be a number"),
        ({"damping": True}, "damping must be a number"),
        ({"solver": "slow"}, "solver must be one of exact, fast; got 'slow'"),
        ({"unit": "median"}, "unit must be one of least-change, mean; got 'median'"),
        ({"min_rank": 1.5}, "min_rank must be a whole number"),
        ({"seed": "7"}, "seed must be a whole number"),
        ({"max_unfolded_width": 0}, "max_unfolded_width must be at least 1"),
        ({"preserve_output": "false"}, "preserve_output must be True or False"),
        ({"constraint": "shift", "shift": [[1.0]]}, "tensor, got a list"),
        ({"constraint": "shift", "shift": torch.zeros(3, 4)}, r"got one of shape \(3, 4\)"),
        ({"constraint": "shift", "shift": torch.tensor(2.0)}, r"got one of shape \(\)"),
        ({"constraint": "shift", "shift": torch.zeros(3, 3)}, "largest entry is 0"),
        ({"constraint": "shift", "shift": torch.eye(2) * float("nan")}, "largest entry is nan"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        CNTLoRAConfig(**options)


def test_a_matrix_compares_by_value_and_has_no_json_form():
    k = torch.randn(4, 4)
    config = shifted(k)
    assert config == shifted(k.clone())
    assert config != shifted(k + 1)
    assert config != shifted(1.0)
    assert hash(config) == hash(shifted(k.clone()))
    for write in (config.to_json, config.to_dict):
        with pytest.raises(ValueError, match="matrix of 4 x 4, which has no JSON form"):
            write()
    assert config.describe()["shift"] == "matrix of 4 x 4"
    assert shifted(np.float32(2.0)) == shifted(2.0)
    with pytest.raises(ValueError, match="no JSON form"):
        AdapterSettings(method="shift", cntlora=config)


def test_a_matrix_without_its_constraint_is_refused():
    with pytest.raises(ValueError, match="belongs to constraint='shift'"):
        CNTLoRAConfig(shift=torch.eye(3)).require_consistent()


@pytest.mark.parametrize("as_type", [lambda k: k, lambda k: k.numpy(), lambda k: k.double()])
def test_a_multiple_of_the_identity_is_that_number(as_type):
    rows, weight = torch.randn(60, 6), torch.randn(5, 6)
    subspace = principal_subspace(Moment(rows.T @ rows / 60, 60), 3)
    number = PointDelta(weight, subspace, shifted(2.5)).spectrum().delta()
    matrix = PointDelta(weight, subspace, shifted(as_type(torch.eye(6) * 2.5))).spectrum().delta()
    torch.testing.assert_close(matrix, number, rtol=1e-4, atol=1e-5)


def test_a_matrix_acts_within_the_principal_subspace():
    rows, weight, k = torch.randn(60, 6), torch.randn(5, 6), torch.randn(6, 6)
    subspace = principal_subspace(Moment(rows.T @ rows / 60, 60), 3)
    delta = PointDelta(weight, subspace, shifted(k, unit="mean")).spectrum().delta()
    v = subspace.vectors
    gain = 1 / (subspace.values.float() + 1e-2)
    torch.testing.assert_close(
        delta, weight @ v @ (v.T @ k @ v) @ torch.diag(gain) @ v.T, rtol=1e-4, atol=1e-4
    )


def test_the_normal_shift_of_a_smaller_rank_is_the_leading_block_of_a_larger_one():
    width = 30
    subspace = principal_subspace(Moment(torch.diag(torch.arange(width, 0, -1.0)), 99), width)
    eye = torch.eye(width)

    def block(rank):
        config = shifted("normal", seed=4, unit="mean", damping=0.0)
        delta = PointDelta(eye, subspace.leading(rank), config).spectrum().delta()
        v = subspace.vectors[:, :rank]
        return v.T @ delta @ v * subspace.values[:rank].float() * rank**0.5

    torch.testing.assert_close(block(25)[:9, :9], block(9), rtol=1e-3, atol=1e-3)
    assert 0.7 < block(25).std() < 1.3


def test_seeds_of_any_size_are_taken():
    config = shifted("normal", seed=2**64 - 1)
    net = nn.Sequential(nn.Linear(5, 4))
    model = get_cntlora_model(
        net, LoraConfig(r=2, target_modules=["0"]), config, [torch.randn(3, 5)]
    )
    assert model.cntlora_report.points == 1


def test_a_matrix_of_another_width_names_the_point_before_anything_is_read():
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    config = shifted(torch.eye(6))

    def unread():
        raise AssertionError("read the data before refusing")
        yield

    with pytest.raises(ValueError, match="matrix of 6 x 6, but '1' reads 5 features"):
        get_cntlora_model(net, LoraConfig(r=2, target_modules=["0", "1"]), config, unread())
    model = get_cntlora_model(
        net, LoraConfig(r=2, target_modules=["0"]), config, [torch.randn(9, 6)]
    )
    assert model.cntlora_report.to_dict()["config"]["shift"] == "matrix of 6 x 6"
