"""Every method of the registry on a tiny transformer: it does what its record says."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from peft import LoftQConfig, LoraConfig, PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from cntlora_core import CNTLoRAConfig
from cntlora_core.adapter.inject import adapter_layers
from cntlora_core.layers.attachment import find_attachment_points
from cntlora_core.methods import (
    METHODS,
    InitializationRequest,
    Limits,
    get_method,
    initialize_adapter,
)

CAN_QUANTISE = find_spec("bitsandbytes") is not None
RUNNABLE = [name for name in METHODS if name != "loftq" or CAN_QUANTISE]
STEPS = 10


@pytest.fixture
def initialize(make_base, make_config, make_data):
    def run(method, **options):
        config = options.pop("lora_config", None) or make_config()
        base = options.pop("model", None) or make_base()
        data = options.pop("data", None) or make_data()
        return initialize_adapter(base, config, method, data, steps=STEPS, **options)

    return run


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def frozen_weights(model) -> dict[str, torch.Tensor]:
    """By the base model's own names, whatever wraps it."""
    names = (
        (n.replace("base_model.model.", "").replace(".base_layer", ""), p)
        for n, p in model.named_parameters()
    )
    own = ("lora_", "vera_", "ranknum")
    return {n: p.detach().clone() for n, p in names if not any(word in n for word in own)}


def up_matrices(model, peft_type):
    if peft_type == "VERA":
        return [model.base_model.vera_B["default"]]
    return [p for n, p in model.named_parameters() if "lora_B" in n]


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_method_initialises_as_its_record_says(name, initialize, make_base, make_data):
    method = get_method(name)
    batch = make_data()[0]
    stock = make_base()
    expected, weights = logits(stock, batch), frozen_weights(stock)
    initialized = initialize(name)
    error = (logits(initialized.model, batch) - expected).norm() / expected.norm()
    assert (error < 1e-4) == method.preserves_output
    after = frozen_weights(initialized.model)
    assert after.keys() == weights.keys()
    changed = {n for n in weights if (after[n] - weights[n]).norm() > 1e-3 * weights[n].norm()}
    targeted = {n for n in weights if any(f"{t}.weight" in n for t in TARGETED)}
    assert changed == (targeted if method.rewrites_base else set())
    if method.peft_type is not None:
        ups = up_matrices(initialized.model, method.peft_type)
        assert ups
        assert all(not up.any() for up in ups) == method.b_initialized_to_zero
        assert initialized.model.peft_config["default"].peft_type == method.peft_type
    if initialized.plan is not None:
        assert initialized.plan.rewrites_base == method.rewrites_base
        assert initialized.report.ranks == initialized.plan.ranks
    assert name in initialized.report.summary()


TARGETED = ["query", "key", "value", "intermediate.dense"]


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_step_trains_the_adapter_alone_and_what_is_saved_fits_the_stock_base(
    name, initialize, make_base, make_data, tmp_path
):
    data = make_data()
    initialized = initialize(name)
    model = initialized.model
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    before = logits(model, data[0])
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    model.train()
    losses = []
    for step in range(1, STEPS + 1):
        loss = model(**data[0]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        initialized.after_step(step)
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    after = logits(model, data[0])
    assert (after - before).norm() > 1e-3 * before.norm()
    if name in ("full", "bitfit", "loftq"):
        with pytest.raises(ValueError, match="save"):
            initialized.save_pretrained(tmp_path)
        return
    parameters = [p.detach().clone() for p in trained]
    initialized.save_pretrained(tmp_path / "adapter")
    assert all(torch.equal(p, q) for p, q in zip(trained, parameters, strict=True))
    stock = PeftModel.from_pretrained(make_base(), tmp_path / "adapter")
    assert (logits(stock, data[0]) - after).norm() < 1e-4 * after.norm()


@pytest.mark.skipif(CAN_QUANTISE, reason="it has what it needs")
def test_loftq_says_what_it_lacks(initialize):
    with pytest.raises(ValueError, match=r"loftq.*pip install bitsandbytes.*pissa"):
        initialize("loftq")


@pytest.mark.skipif(not CAN_QUANTISE, reason="it needs bitsandbytes")
def test_loftq_makes_up_for_a_part_of_what_rounding_loses(
    initialize, make_base, make_config, make_data
):
    batch, weights = make_data()[0], frozen_weights(make_base())
    expected = logits(make_base(), batch)
    model = initialize("loftq").model
    with model.disable_adapter():
        rounded = (logits(model, batch) - expected).norm()
    assert (logits(model, batch) - expected).norm() < 0.9 * rounded
    layers = adapter_layers(model)
    assert layers
    for name, layer in layers.items():
        error = weights[f"{name}.weight"] - layer.get_base_layer().weight
        best = torch.linalg.svdvals(error)[4:].norm()  # rank 4 of it is in the adapter
        left = (error - layer.get_delta_weight("default")).norm()
        assert left.item() == pytest.approx(best.item(), rel=1e-3)
    transposed = nn.Sequential(Conv1D(64, 32))  # (d_out, d_in); its weight is (d_in, d_out)
    weight = transposed[0].weight.detach().clone()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], fan_in_fan_out=True)
    layer = adapter_layers(initialize("loftq", model=transposed, lora_config=config).model)["0"]
    found = layer.get_base_layer().weight + layer.get_delta_weight("default")
    assert (found - weight).norm() < (layer.get_base_layer().weight - weight).norm()
    for wrong in ({"loftq_bits": 8}, {"loftq_iter": 0}):
        asked = make_config(init_lora_weights="loftq", loftq_config=LoftQConfig(**wrong))
        with pytest.raises(ValueError, match="4 bits, in one iteration or more"):
            initialize("loftq", lora_config=asked)
    tied = make_base()
    attention = tied.get_submodule("bert.encoder.layer.0.attention.self")
    attention.query.weight = attention.key.weight
    names = [name for name, _ in tied.named_modules()]
    with pytest.raises(ValueError, match="tied"):
        initialize("loftq", model=tied)
    assert [name for name, _ in tied.named_modules()] == names, "it is not wrapped"


@pytest.mark.parametrize("name", [n for n in RUNNABLE if METHODS[n].peft_type])
def test_a_seed_gives_the_same_initialisation_and_the_global_generator_stays(
    name, initialize, make_base, make_config, make_data
):
    def factors():
        model = initialize(name, seed=5).model
        return [
            p.detach().clone() for n, p in model.named_parameters() if "lora" in n or "vera" in n
        ]

    first, second = factors(), factors()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    base, config = make_base(), make_config()
    torch.manual_seed(99)
    expected = torch.rand(2)
    torch.manual_seed(99)
    initialize_adapter(base, config, name, make_data(), steps=STEPS)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("name", [n for n in RUNNABLE if METHODS[n].plan is not None])
def test_planning_leaves_the_model_as_it_was(name, make_base, make_config, make_data):
    base = make_base()
    base.bert.encoder.layer[0].train()
    base.bert.pooler.requires_grad_(False)
    base.classifier.weight.grad = torch.ones_like(base.classifier.weight)

    def state():
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return (
            {n: (m.training, set(m.__dict__)) for n, m in base.named_modules()},
            {n: [len(getattr(m, h)) for h in hooks] for n, m in base.named_modules()},
            {n: (p.requires_grad, p.grad is None) for n, p in base.named_parameters()},
            {n: p.sum().item() for n, p in base.named_parameters()},
        )

    before = state()
    points = find_attachment_points(base, make_config())
    plan = METHODS[name].plan
    plan(InitializationRequest(base, points, 4, 2.0, make_data()))
    assert state() == before
    # Neither does it where the data turns out to be bad.
    if METHODS[name].needs == "nothing":
        return
    bad = make_data()
    bad[1] = {"input_ids": bad[1]["input_ids"] + 1000}
    with pytest.raises(IndexError):
        plan(InitializationRequest(base, points, 4, 2.0, bad, limits=Limits(1)))
    assert state() == before


@pytest.mark.parametrize("name", [n for n in RUNNABLE if METHODS[n].needs == "activations"])
def test_padding_changes_nothing(name, initialize, make_data):
    first, second = (
        initialize(name, data=make_data(padding_token=token)).plan.factors for token in (0, 3)
    )
    for point in first:
        torch.testing.assert_close(
            first[point].delta(), second[point].delta(), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(first[point].down, second[point].down, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in RUNNABLE if METHODS[n].plan is not None])
def test_half_precision_bases_keep_float32_factors(name, dtype, initialize, make_base):
    initialized = initialize(name, model=make_base(dtype))
    for layer in adapter_layers(initialized.model).values():
        assert layer.lora_A["default"].weight.dtype == torch.float32
        assert layer.get_base_layer().weight.dtype == dtype
    assert (initialized.report.rounding > 0) == METHODS[name].rewrites_base


def test_misuse_is_refused_in_words(initialize, make_base, make_config, make_data):
    with pytest.raises(ValueError, match=r"no method 'peva'.*Did you mean 'eva'"):
        initialize("peva")
    for name, needs in (("eva", "activations"), ("lora_ga", "gradients")):
        with pytest.raises(ValueError, match=f"reads {needs}: give a dataloader"):
            initialize_adapter(make_base(), make_config(), name)
    with pytest.raises(ValueError, match="no effect on method 'eva'"):
        initialize("eva", cntlora_config=CNTLoRAConfig())
    with pytest.raises(ValueError, match="disagree: leave init_lora_weights out"):
        initialize("eva", lora_config=make_config(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="use method='dora'"):
        initialize("eva", lora_config=make_config(use_dora=True))
    with pytest.raises(ValueError, match="leave rank_pattern and alpha_pattern out"):
        initialize("pissa", lora_config=make_config(rank_pattern={"query": 2}))
    with pytest.raises(ValueError, match="disagree: give the method alone"):
        initialize("cross", cntlora_config=CNTLoRAConfig(constraint="self"))
    with pytest.raises(ValueError, match="needs an even rank"):
        initialize("lora_orthogonal", lora_config=make_config(r=3))
    for name in ("pissa", "olora", "corda_ipm", "eva"):
        with pytest.raises(ValueError, match="use a rank of at most 24"):
            initialize(name, lora_config=make_config(r=25))
    with pytest.raises(ValueError, match="use a rank of at most 12"):
        initialize("lora_ga", lora_config=make_config(r=13))
    with pytest.raises(ValueError, match="give steps"):
        initialize_adapter(make_base(), make_config(), "adalora")
    unlabelled = [{k: v for k, v in b.items() if k != "labels"} for b in make_data()]
    with pytest.raises(ValueError, match="give loss_fn"):
        initialize("lora_ga", data=unlabelled)
    for name in ("eva", "corda_ipm", "lora_ga"):
        with pytest.raises(ValueError, match="no batches"):
            initialize_adapter(make_base(), make_config(), name, [])


def test_a_layer_that_reads_nothing_is_named(make_config, make_data):
    class Detour(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = torch.nn.Linear(6, 6)
            self.unused = torch.nn.Linear(6, 6)

        def forward(self, x):
            return self.used(x)

    data = [torch.randn(8, 6)]
    for name in ("eva", "corda_kpm", "lora_ga"):
        options = {"loss_fn": lambda model, x: model(x).square().mean()} if "ga" in name else {}
        with pytest.raises(ValueError, match=r"'unused'.*leave it out"):
            initialize_adapter(
                Detour(),
                make_config(r=2, target_modules=["used", "unused"]),
                name,
                copy.deepcopy(data),
                **options,
            )
