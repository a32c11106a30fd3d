"""The orthogonality term: its value, its gradient, and three kinds of trainer."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from cntlora_core.lava import (
    LavaConfig,
    OrthogonalityLoss,
    get_mixed_model,
    orthogonality_loss,
    with_orthogonality,
)

from .conftest import NAMES


def wrapped(net, **options):
    return get_peft_model(net, LavaConfig(r=3, target_modules=NAMES, init_weights=False, **options))


def factors_named(model, *names):
    """By their paths, without the machinery under test."""
    return {
        n: p for n, p in model.named_parameters() if any(f".lava_{f}.default" in n for f in names)
    }


def test_gradient_is_the_papers(net):
    model = wrapped(net.double(), orthogonality=0.3).double()
    term = orthogonality_loss(model)
    us = factors_named(model, "U")
    assert len(us) == 6
    with torch.no_grad():
        for u in us.values():
            u += 0.3 * torch.randn_like(u)
    term = orthogonality_loss(model)
    expected = sum(0.3 * (u.T @ u - torch.eye(3)).square().sum() for u in us.values())
    torch.testing.assert_close(term, expected, rtol=1e-12, atol=0)
    term.backward()
    for name, parameter in model.named_parameters():
        if name in us:
            u = parameter.detach()
            closed_form = 4 * 0.3 * u @ (u.T @ u - torch.eye(3, dtype=u.dtype))
            torch.testing.assert_close(parameter.grad, closed_form, rtol=1e-10, atol=1e-12)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("chosen", [[], ["V"], ["Y", "X"], ["X", "U", "V", "Y"]])
def test_any_factors_can_be_chosen(net, chosen):
    model = wrapped(net, orthogonal_factors=chosen)
    expected = sum(
        (
            0.1 * ((f.T @ f - torch.eye(3)).square().sum() - max(0, 3 - len(f)))
            for f in factors_named(model, *chosen).values()
        ),
        torch.zeros(()),
    )
    torch.testing.assert_close(orthogonality_loss(model), expected)
    assert len(OrthogonalityLoss(model).deviations()) == len(factors_named(model, *chosen))


@pytest.mark.parametrize("rows", [2, 5])
def test_more_ranks_than_rows_have_the_same_gradient_and_zero_within_reach(rows):
    model = get_peft_model(
        nn.Sequential(nn.Linear(3, rows)),
        LavaConfig(r=5, target_modules=["0"], init_weights=False, orthogonality=1.0),
    ).double()
    u = model.base_model.model[0].lava_U["default"]
    assert u.shape == (rows, 5)
    assert orthogonality_loss(model) < 1e-9  # rows orthonormal
    with torch.no_grad():
        u += 0.3 * torch.randn_like(u)
    orthogonality_loss(model).backward()
    closed_form = 4 * u @ (u.T @ u - torch.eye(5, dtype=u.dtype))
    torch.testing.assert_close(u.grad, closed_form.detach(), rtol=1e-10, atol=1e-12)


def test_an_adapter_that_is_not_there_is_an_error(net):
    with pytest.raises(ValueError, match="no LAVA adapter 'defualt'; there are: default"):
        orthogonality_loss(wrapped(net), "defualt")


def test_layers_may_have_ranks_and_shapes_of_their_own(net):
    model = wrapped(net, rank_pattern={"first": 5, "second": 3}, orthogonality=1.0)
    expected = sum(
        (u.T @ u - torch.eye(u.shape[1])).square().sum() for u in factors_named(model, "U").values()
    )
    torch.testing.assert_close(orthogonality_loss(model), expected)


def test_only_active_adapters_count(net):
    model = wrapped(net)
    model.add_adapter("other", LavaConfig(r=2, target_modules=["head"], init_weights=False))
    with torch.no_grad():
        model.base_model.model.head.lava_U["other"].mul_(3)
    first = orthogonality_loss(model)
    other = orthogonality_loss(model, "other")
    model.set_adapter("other")
    torch.testing.assert_close(orthogonality_loss(model), other)
    assert other > 10
    assert first < 1e-9


def test_a_model_without_any_gives_zero(net):
    assert orthogonality_loss(net) == 0
    assert orthogonality_loss(wrapped(net, orthogonality=0.0)) == 0


def test_in_half_precision_the_term_is_computed_in_float32(net):
    model = wrapped(net).bfloat16()
    u = factors_named(model, "U")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = orthogonality_loss(model)
    expected = sum(
        0.1 * (f.float().T @ f.float() - torch.eye(3)).square().sum() for f in u.values()
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-7)


def test_a_plain_loop_drives_columns_towards_orthonormal_ones(net, x):
    from peft import LoraConfig

    model = get_mixed_model(
        net,
        {
            "lava": LavaConfig(r=3, target_modules=["first", "second"], orthogonality=1.0),
            "lora": LoraConfig(r=2, target_modules=["head"]),
        },
    )
    with torch.no_grad():
        model.base_model.model.second.lava_U["lava"].mul_(0.3)
    term = OrthogonalityLoss(model)
    before = sum(term.deviations().values())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(100):
        (0.01 * model(x).square().mean() + term()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(term.deviations().values()) < 0.1 * before


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"input_ids": torch.arange(6) + i, "labels": torch.tensor(i % 2)}


@pytest.mark.parametrize("how", ["default", "loss function", "accumulated"])
def test_in_transformers_trainer_the_term_counts_once_a_step(how, tmp_path):
    def gradients(trainer_class, strength):
        torch.manual_seed(0)
        shape = BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        )
        model = get_peft_model(
            BertForSequenceClassification(shape),
            LavaConfig(r=2, target_modules=["query"], orthogonality=strength, init_weights=False),
        )
        u = model.base_model.model.bert.encoder.layer[0].attention.self.query.lava_U["default"]
        with torch.no_grad():
            u.mul_(1.5)
        options = {}
        if how == "loss function":
            options["compute_loss_func"] = lambda outputs, labels, num_items_in_batch: (
                nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
                / num_items_in_batch
            )
        trainer = trainer_class(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=1,
                per_device_train_batch_size=4 if how == "default" else 2,
                gradient_accumulation_steps=1 if how == "default" else 2,
                max_grad_norm=0,
                optim="sgd",
                learning_rate=1.0,
                lr_scheduler_type="constant",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                save_strategy="no",
                seed=1,
            ),
            train_dataset=Sentences(),
            **options,
        )
        before = u.detach().clone()
        trainer.train()
        evaluated = trainer.evaluate(Sentences())["eval_loss"]
        batch = torch.utils.data.default_collate(list(map(Sentences().__getitem__, range(4))))
        with torch.no_grad():
            bare = model(**batch).loss.item()
        assert orthogonality_loss(model) > 0.1
        assert evaluated == pytest.approx(bare, rel=1e-4)  # the term is left out
        return before, before - u.detach()

    u, plain = gradients(Trainer, 0.2)
    _, with_term = gradients(with_orthogonality(Trainer), 0.2)
    closed_form = 4 * 0.2 * u @ (u.T @ u - torch.eye(2))
    torch.testing.assert_close(with_term - plain, closed_form, rtol=1e-3, atol=1e-5)
