"""The dynamics of transformers' Trainer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from cntlora_core import load_initialized
from cntlora_core.dynamics import DynamicsCallback, read_dynamics

from ..core import trainer_run as run
from ..methods import true_classes as true

STEPS = 6


class Watch(TrainerCallback):
    """The gradients that reach the optimizer, and the weights around its steps."""

    def __init__(self) -> None:
        self.norms, self.weights = [], []

    def _trained(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad]

    def on_pre_optimizer_step(self, args, state, control, model=None, **_kwargs):
        found = self._trained(model)
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in found]).item())
        self.weights.append(torch.cat([p.detach().flatten() for p in found]))

    def on_optimizer_step(self, args, state, control, model=None, **_kwargs):
        before = self.weights.pop()
        after = torch.cat([p.detach().flatten() for p in self._trained(model)])
        self.weights.append(((after - before).norm() / before.norm()).item())


def trainer(folder, model=None, callbacks=(), **options) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_steps": 3,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    model = model or run.initialised("cross")
    return Trainer(model, args, train_dataset=run.examples(), callbacks=list(callbacks))  # pyright: ignore[reportArgumentType]


def logged(trained: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


def hooks_of(model: nn.Module) -> int:
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return modules + sum(bool(p._post_accumulate_grad_hooks) for p in model.parameters())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run whose gradients are clipped at most steps: its trainer, what was watched, its file."""
    folder = tmp_path_factory.mktemp("recorded")
    watch = Watch()
    trained = trainer(folder, callbacks=[DynamicsCallback(every=2), watch], max_grad_norm=0.5)
    trained.train()
    return trained, watch, folder / "dynamics.jsonl"


def test_loss_and_gradient_norm_are_those_that_the_trainer_logs(recorded):
    trained, watch, path = recorded
    records = read_dynamics(path)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    losses = [record["loss"] for record in records]
    assert losses == pytest.approx(logged(trained, "loss"), rel=1e-5, abs=1e-4)
    norms = [record["grad_norm"] for record in records]
    assert norms == pytest.approx(logged(trained, "grad_norm"), rel=1e-5)
    assert any(norm > 1.01 * clipped for norm, clipped in zip(norms, watch.norms, strict=True))
    assert all(set(record["grad_norms"]) == {"rest", "modules_to_save"} for record in records)


def test_update_ratios_are_those_of_the_weights(recorded):
    _, watch, path = recorded
    for record, whole in zip(read_dynamics(path), watch.weights, strict=True):
        ratios = record["update_ratios"].values()
        assert min(ratios) <= whole * (1 + 1e-5)
        assert max(ratios) >= whole * (1 - 1e-5)


def test_second_moments_are_those_of_all_layers_at_every_second_step(recorded):
    trained, _, path = recorded
    found = [record.get("second_moments") for record in read_dynamics(path)]
    assert [moments is not None for moments in found] == [True, False] * (STEPS // 2)
    assert len(found[0]) == len(trained.model.cntlora_plan.factors)
    assert all(name.startswith("bert.encoder.layer") for name in found[0])


def test_a_picture_is_plotted_at_the_end_and_no_hook_stays(recorded):
    trained, _, path = recorded
    with Image.open(path.with_suffix(".png")) as image:
        assert image.width > 500
    plain = trainer(path.parent / "plain", max_grad_norm=0.5)
    plain.train()
    assert hooks_of(trained.model) == hooks_of(plain.model)
    assert logged(trained, "loss") == logged(plain, "loss")  # recording has changed nothing
    assert logged(trained, "grad_norm") == logged(plain, "grad_norm")


@pytest.mark.thorough
def test_a_run_that_resumes_goes_on_with_the_file(recorded, tmp_path):
    _, _, path = recorded
    folder = path.parent
    whole = read_dynamics(path)
    model = load_initialized(run.base(), folder / "checkpoint-3", is_trainable=True)
    again = trainer(folder, model, [DynamicsCallback(every=2)], max_grad_norm=0.5)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    found = read_dynamics(path)
    assert [record["step"] for record in found] == [record["step"] for record in whole]
    assert found[:3] == whole[:3]


def test_a_training_that_fails_can_be_closed(tmp_path):
    class Fails(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    callback = DynamicsCallback(tmp_path / "other.jsonl", plot=False)
    failing = trainer(tmp_path, callbacks=[callback, Fails()])
    hooks = hooks_of(failing.model)
    with pytest.raises(KeyboardInterrupt):
        failing.train()
    callback.close()
    assert hooks_of(failing.model) == hooks
    assert len(read_dynamics(tmp_path / "other.jsonl")) == 2


@pytest.mark.thorough
def test_the_loops_of_the_docs_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    docs = Path(__file__).parents[2] / "docs" / "dynamics.md"
    trainers, loop = re.findall(r"```python\n(.*?)```", docs.read_text("utf-8"), re.DOTALL)
    model = run.initialised("cross")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    names = {"model": model, "optimizer": optimizer, "batches": run.batches()}
    exec(compile(loop, str(docs), "exec"), names)
    assert len(read_dynamics("dynamics.jsonl")) == len(run.batches())
    assert Path("dynamics.png").is_file()
    args = TrainingArguments("out", max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True)
    names |= {"args": args, "train": run.examples()}
    exec(compile(trainers, str(docs), "exec"), names)
    assert len(read_dynamics("out/dynamics.jsonl")) == 2


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_kwargs. is deprecated")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_image_token_is_the_configuration_s_and_checkpointed_layers_count_once(name, tmp_path):
    asked = true.TRUE_CLASSES[name]
    found = []
    for checkpointing in (False, True):
        config = LoraConfig(r=4, target_modules=asked.targets, init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(asked.model(), config)
        args = TrainingArguments(
            str(tmp_path / str(checkpointing)),
            max_steps=2,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        )
        Trainer(
            model,
            args,
            train_dataset=asked.batches(),  # pyright: ignore[reportArgumentType]
            data_collator=lambda batches: batches[0],
            callbacks=[DynamicsCallback(plot=False)],
        ).train()
        found.append(read_dynamics(tmp_path / str(checkpointing) / "dynamics.jsonl"))
    plain, checkpointed = found
    assert set(plain[0]["grad_norms"]) == {"vision", "language"}
    for layer, moments in plain[0]["second_moments"].items():
        assert set(moments) == ({"visual", "text"} if "language" in layer else {"visual"})
        assert checkpointed[0]["second_moments"][layer] == pytest.approx(moments, rel=1e-5)
    assert checkpointed[1]["grad_norms"] == pytest.approx(plain[1]["grad_norms"], rel=1e-4)
