"""Three small convolutions against one with the materialised sum of rank-1 tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from cntlora_core.lava import LavaConfig, LavaLayer
from cntlora_core.lava.functional import delta

CONVOLUTIONS = [
    (nn.Conv2d, {"kernel_size": 1}),
    (nn.Conv2d, {"kernel_size": 1, "stride": 2, "padding": 1}),
    (nn.Conv2d, {"kernel_size": 1, "padding": 1, "padding_mode": "replicate", "groups": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    (nn.Conv2d, {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2)}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "same"}),
    (nn.Conv2d, {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 2)}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "valid", "dilation": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "same", "dilation": 2, "padding_mode": "circular"}),
    (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 2, "padding_mode": "replicate"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 2}),
    (nn.Conv2d, {"kernel_size": (3, 2), "padding": 2, "stride": 2, "groups": 6, "dilation": 2}),
    (nn.Conv1d, {"kernel_size": 1}),
    (nn.Conv1d, {"kernel_size": 4, "padding": "same"}),
    (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}),
    (nn.Conv1d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 3}),
]


def name_of(case):
    kind, options = case
    return kind.__name__ + "," + ",".join(f"{k}={v}" for k, v in options.items())


def adapted(module: nn.Module, rank: int = 4, **options) -> LavaLayer:
    """A module in float64 with an adapter, none of whose factors is zero."""
    config = LavaConfig(r=rank, lava_alpha=3, target_modules=["0"], init_weights=False, **options)
    model = get_peft_model(nn.Sequential(module.double()), config)
    return model.base_model.model[0].double()


def summed(factors: list[torch.Tensor]) -> torch.Tensor:
    """The sum of outer products, one at a time."""
    letters = "oihw"[: len(factors)]
    terms = [
        torch.einsum(",".join(letters) + "->" + letters, *(f[:, r] for f in factors))
        for r in range(factors[0].shape[1])
    ]
    return torch.stack(terms).sum(0)


@pytest.mark.parametrize("rank", [2, 4])  # below and above the width of a group
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=name_of)
def test_output_and_gradients_are_those_of_the_materialised_kernel(case, rank):
    kind, options = case
    torch.manual_seed(0)
    conv = kind(6, 12, **options)
    reference = copy.deepcopy(conv).double()
    layer = adapted(conv, rank)
    scaling = 3 / rank
    shape = (2, 6, 7, 8) if kind is nn.Conv2d else (2, 6, 9)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    got = layer(x)
    factors = list(layer.factors("default").values())
    kernel = reference.weight.detach() + scaling * summed(factors)
    wanted = reference._conv_forward(x, kernel, reference.bias)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    probe = torch.randn_like(got)
    inputs = [x, *factors]
    got_gradients = torch.autograd.grad((got * probe).sum(), inputs)
    wanted_gradients = torch.autograd.grad((wanted * probe).sum(), inputs)
    for ours, theirs in zip(got_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(x[0]), got[0], rtol=1e-10, atol=1e-10)
    assert layer(x[:0]).shape == (0, *got.shape[1:])
    torch.testing.assert_close(
        layer.get_delta_weight("default"), scaling * summed(factors).detach(), rtol=0, atol=1e-12
    )


def largest_made(layer: LavaLayer, x: torch.Tensor) -> int:
    """How many numbers the largest tensor has that a pass forwards and backwards makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.found = max(self.found, tensor.numel())
            return out

    base = layer.get_base_layer()
    layer.base_layer = nn.Identity()  # leaves the adapter's own change
    layer.get_base_layer = lambda: base
    with Largest() as mode:
        layer(x).square().sum().backward()
    assert layer.lava_U["default"].grad.abs().sum() > 0
    return mode.found


@pytest.mark.parametrize("module", [nn.Linear(5, 7), Conv1D(7, 5)], ids=["Linear", "Conv1D"])
def test_matrices(module):
    reference = copy.deepcopy(module).double()
    layer = adapted(module)
    u, v = layer.factors("default").values()
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    got = layer(x)
    wanted = reference(x) + 0.75 * x @ (u @ v.T).T
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), [x, u, v]),
        torch.autograd.grad(wanted.square().sum(), [x, u, v]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_forward_pass_builds_nothing_as_large_as_the_kernel():
    """Neither forwards nor backwards: the largest tensor made is an activation."""
    torch.manual_seed(0)
    layer = adapted(nn.Conv2d(64, 64, 3, padding=1), rank=2)
    assert largest_made(layer, torch.randn(1, 64, 4, 4, dtype=torch.float64)) == 64 * 4 * 4


def test_a_depthwise_convolution_is_not_widened():
    torch.manual_seed(0)
    layer = adapted(nn.Conv2d(8, 8, 7, padding=3, groups=8), rank=4)
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64)
    assert largest_made(layer, x) == x.numel()


@pytest.mark.parametrize(
    ("shape", "rank"), [((8, 4, 3, 2), 3), ((8, 4, 3), 5), ((8, 4), 1), ((8, 2, 3, 3), 4)]
)
def test_parameters_are_the_sum_of_the_weight_s_sides_times_the_rank(shape, rank):
    options = {"kernel_size": shape[2:], "groups": 2 if shape[1] == 2 else 1}
    kinds = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}
    channels = shape[1] * (options["groups"] if len(shape) > 2 else 1)
    module = kinds[len(shape)](channels, shape[0], **(options if len(shape) > 2 else {}))
    model = get_peft_model(nn.Sequential(module), LavaConfig(r=rank, target_modules=["0"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(shape) * rank
    assert len(trained) == len(shape)


def test_delta_takes_any_number_of_dimensions():
    factors = [torch.randn(n, 3, dtype=torch.float64) for n in (4, 5, 2, 3)]
    for count in (2, 3, 4):
        chosen = factors[:count]
        torch.testing.assert_close(delta(chosen[0], chosen[1], chosen[2:]), summed(chosen))
