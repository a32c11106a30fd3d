"""What each initialisation should be, worked out naively in float64 and compared."""

from __future__ import annotations

import pytest
import torch
from peft import EvaConfig, LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from cntlora_core.methods import Limits, NotConvergedError, initialize_adapter

RANK, SCALING = 3, 2.0


class Net(nn.Module):
    """A linear layer and GPT-2's transposed one, which read known inputs."""

    def __init__(self, d_in: int = 10, d_out: int = 8) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.plain = nn.Linear(d_in, d_out)
        self.turned = Conv1D(d_out, d_in)
        nn.init.normal_(self.turned.weight, std=0.3)

    def forward(self, x):
        return self.plain(x) + self.turned(x)


def weights(net) -> dict[str, torch.Tensor]:
    """(d_out, d_in), float64."""
    return {
        "plain": net.plain.weight.detach().double(),
        "turned": net.turned.weight.detach().double().T,
    }


def batches(count=4, samples=6, tokens=5, width=10):
    generator = torch.Generator().manual_seed(2)
    scale = torch.linspace(2.0, 0.2, width)
    return [
        torch.randn(samples, tokens, width, generator=generator) * scale + 0.5 for _ in range(count)
    ]


def config(**options):
    options = {"r": RANK, "lora_alpha": SCALING * RANK, "target_modules": ["plain", "turned"]} | (
        options
    )
    return LoraConfig(**options)


def initialized(method, data=None, net=None, lora_config=None, **options):
    net = net or Net()
    adapter = initialize_adapter(net, lora_config or config(), method, data, **options)
    assert adapter.plan is not None
    return adapter


def best_approximation(matrix, rank=RANK):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def close(actual, expected, tolerance=1e-3):
    assert (actual.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(("method", "slack"), [("pissa", 1.0001), ("pissa_niter_20", 1.05)])
def test_pissa_is_the_best_approximation_of_the_weight(method, slack):
    expected = weights(Net())
    for name, factors in initialized(method).plan.factors.items():
        best = (expected[name] - best_approximation(expected[name])).norm()
        assert (expected[name] - factors.delta().double()).norm() < slack * best
        close(factors.down @ factors.down.T, (factors.up.T @ factors.up).double())


def test_olora_has_orthonormal_ups_and_spans_the_first_rows():
    expected = weights(Net())
    for name, factors in initialized("olora").plan.factors.items():
        q, r = torch.linalg.qr(expected[name])
        close(factors.up.T @ factors.up, torch.eye(RANK).double())
        close(factors.up @ factors.down, q[:, :RANK] @ r[:RANK])


def test_orthogonal_factors_cancel_though_neither_is_zero():
    for factors in initialized("lora_orthogonal", lora_config=config(r=4)).plan.factors.values():
        assert factors.up.norm() > 0.1
        assert factors.delta().norm() < 1e-5 * factors.up.norm() * factors.down.norm()


@pytest.mark.parametrize(("method", "std"), [("lora", (3 * 10) ** -0.5), ("lora_gaussian", 1 / 64)])
def test_plain_initialisations_have_the_spread_that_they_should(method, std):
    adapter = initialized(method, lora_config=config(r=64))
    for factors in adapter.plan.factors.values():
        assert factors.down.std().item() == pytest.approx(std, rel=0.1)
        assert not factors.up.any()


def test_eva_reads_along_the_principal_components():
    data = batches()
    rows = torch.cat([batch.reshape(-1, 10) for batch in data]).double()
    values, vectors = torch.linalg.eigh((rows - rows.mean(0)).T @ (rows - rows.mean(0)))
    expected = vectors.flip(1).T
    adapter = initialized("eva", data, lora_config=config(eva_config=EvaConfig(tau=0.999)))
    for factors in adapter.plan.factors.values():
        close(factors.down @ factors.down.T, torch.eye(factors.rank).double())
        cosines = (factors.down.double() * expected[: factors.rank]).sum(1).abs()
        assert (cosines > 0.98).all()
    assert sum(adapter.plan.ranks.values()) == 2 * RANK
    assert values[-1] > 2 * values[0]


def test_eva_ends_where_every_batch_has_fewer_rows_than_components():
    data = [row[None] for row in batches(count=1, samples=30, tokens=2)[0]]
    adapter = initialized("eva", data)
    assert set(adapter.plan.factors) == {"plain", "turned"}
    # A turn sees a whole pass; the first looks for shared inputs, the third finds no change.
    assert adapter.report.notes[-1].startswith("90 forward passes")
    # A whole pass over two rows is not enough for six components either.
    few = initialized("eva", data[:1], limits=Limits(max_passes=20))
    assert int(few.report.notes[-1].split()[0]) % 3 == 0


@pytest.mark.parametrize("held", [0, 2000, 4000])
def test_eva_finds_the_same_where_memory_is_short(held):
    whole = initialized("eva", batches()).plan
    short = initialized("eva", batches(), limits=Limits(held_bytes=held)).plan
    assert short.ranks == whole.ranks
    for name, factors in whole.factors.items():
        cosines = (factors.down * short.factors[name].down).sum(1).abs()
        assert (cosines > 0.95).all()


def test_eva_shares_ranks_out_and_may_leave_a_layer_without():
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rich = nn.Linear(10, 6)
            self.poor = nn.Linear(10, 6)

        def forward(self, pair):
            return self.rich(pair[0]) + self.poor(pair[1])

    generator = torch.Generator().manual_seed(0)
    steep = torch.tensor([9.0, 8.0, 7.0, 6.0] + [0.01] * 6)
    data = []
    for _ in range(3):
        even = torch.randn(400, 10, generator=generator)
        data.append({"pair": (torch.randn(400, 10, generator=generator) * steep, even)})
    lora_config = LoraConfig(r=2, lora_alpha=4, target_modules=["rich", "poor"])
    adapter = initialized("eva", data, net=Uneven(), lora_config=lora_config)
    assert adapter.plan.ranks == {"rich": 4}
    assert any("1 attachment points got rank 0" in note for note in adapter.report.notes)
    assert [n for n, m in adapter.model.named_modules() if n.endswith("base_layer")] == [
        "base_model.model.rich.base_layer"
    ]
    assert {round(f.scaling, 6) for f in adapter.plan.factors.values()} == {2.0}
    fixed = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["rich", "poor"],
        eva_config=EvaConfig(rho=1.0),
    )
    assert initialized("eva", data, net=Uneven(), lora_config=fixed).plan.ranks == {
        "rich": 2,
        "poor": 2,
    }
    kept = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["rich", "poor"],
        eva_config=EvaConfig(adjust_scaling_factors=False),
    )
    for factors in initialized("eva", data, net=Uneven(), lora_config=kept).plan.factors.values():
        assert factors.scaling * factors.rank == pytest.approx(4)


def test_eva_gives_up_at_its_limits_and_says_what_to_do():
    never = config(eva_config=EvaConfig(tau=1.0))
    short = Limits(max_passes=5, held_bytes=0)
    with pytest.raises(NotConvergedError, match=r"not converged after 5\.2 passes.*'plain'.*tau"):
        initialized("eva", batches(), lora_config=never, limits=short)
    with pytest.raises(NotConvergedError, match="max_seconds 1e-06"):
        initialized("eva", batches(), lora_config=never, limits=Limits(max_seconds=1e-6))
    with pytest.raises(ValueError, match="max_passes must be at least 1"):
        Limits(max_passes=0)
    with pytest.raises(ValueError, match="held_bytes must be at least 0"):
        Limits(held_bytes=-1)
    with pytest.raises(ValueError, match="max_seconds must be a positive number"):
        Limits(max_seconds=float("nan"))


def test_eva_lowers_rho_for_narrow_layers_and_refuses_whitening():
    adapter = initialized("eva", batches(), lora_config=config(r=6))
    assert any("rho was lowered from 2 to 1.66667" in note for note in adapter.report.notes)
    with pytest.raises(ValueError, match="use whiten=False"):
        initialized("eva", batches(), lora_config=config(eva_config=EvaConfig(whiten=True)))


@pytest.mark.parametrize("method", ["corda_ipm", "corda_kpm"])
@pytest.mark.parametrize("samples", [1, 6])
def test_corda_decomposes_the_weight_along_the_covariance(method, samples):
    data = batches(samples=samples)
    covariance = torch.zeros(10, 10, dtype=torch.float64)
    for batch in data:
        rows = batch.reshape(-1, 10).double()
        rows = rows / rows.max()
        covariance += rows.T @ rows / len(data)
    covariance += 0.01 * covariance.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    chosen = slice(0, RANK) if method == "corda_ipm" else slice(-RANK, None)
    expected = weights(Net())
    for name, factors in initialized(method, data).plan.factors.items():
        left, values, right = torch.linalg.svd(expected[name] @ covariance, full_matrices=False)
        right = right @ covariance.inverse()
        close(factors.delta(), (left[:, chosen] * values[chosen]) @ right[chosen], 1e-2)


def test_corda_takes_a_single_row_and_refuses_layers_that_read_zeros():
    data = [torch.ones(1, 10) * torch.linspace(1, 2, 10) for _ in range(3)]
    assert set(initialized("corda_ipm", data).plan.factors) == {"plain", "turned"}
    with pytest.raises(ValueError, match="reads nothing but zeros"):
        initialized("corda_ipm", [torch.zeros(4, 10)])


def test_lora_ga_initialises_along_the_gradient_of_the_weights():
    data = batches()

    def loss(model, batch):
        return (model(batch) - batch[..., :8].sin()).square().mean()

    net = Net()
    for batch in data:
        loss(net, batch).backward()
    gradients = {
        "plain": net.plain.weight.grad.double() / len(data),
        "turned": net.turned.weight.grad.double().T / len(data),
    }
    for name, factors in initialized("lora_ga", data, loss_fn=loss).plan.factors.items():
        left, _, right = torch.linalg.svd(gradients[name], full_matrices=False)
        # Down takes the leading right vectors, up the next left ones (direction ArB2r).
        cosines = (factors.down.double() * right[:RANK]).sum(1).abs()
        assert (cosines > 0.99).all()
        ups = nn.functional.normalize(factors.up.double(), dim=0)
        assert ((ups * left[:, RANK : 2 * RANK]).sum(0).abs() > 0.99).all()


def test_activations_and_losses_that_are_not_finite_are_named():
    bad = batches()
    bad[2][0, 0, 0] = float("nan")
    for method in ("eva", "corda_ipm"):
        with pytest.raises(FloatingPointError, match=r"'plain' is not finite in batch 2"):
            initialized(method, bad)
    with pytest.raises(FloatingPointError, match="loss of batch 3 is nan"):
        initialized("lora_ga", bad, loss_fn=lambda model, batch: model(batch).mean())
    with pytest.raises(ValueError, match="scalar tensor"):
        initialized("lora_ga", batches(), loss_fn=lambda model, batch: model(batch))


def test_a_generator_of_batches_is_gone_through_as_often_as_needed():
    from_list = initialized("eva", batches()).plan
    from_generator = initialized("eva", (batch for batch in batches())).plan
    for name, factors in from_list.factors.items():
        assert torch.equal(factors.down, from_generator.factors[name].down)
