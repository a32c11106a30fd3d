"""What is recorded of a training, against direct calculation."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cntlora_core.dynamics import DynamicsRecorder, group_of, read_dynamics

from ..methods import true_classes as true

LAYERS = ("vision_tower", "projector", "language_model")


def adapted(name: str = "llava") -> nn.Module:
    """A model whose adapters act, so that all of them get gradients."""
    targets = r".*vision_tower.*layers\.[01]\..*\.[qkv]_proj|.*projector\.linear_1|"
    targets += r".*language_model.*_proj"
    if name != "llava":
        targets = true.TRUE_CLASSES[name].targets
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    return get_peft_model(true.TRUE_CLASSES[name].model(), config)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, recorder=None, steps: int = 5, micro: int = 2) -> list[float]:
    """Losses of a short training with gradient accumulation."""
    optimizer, batches, losses = optimizer_of(model), true.TRUE_CLASSES["llava"].batches(), []
    model.train()
    for step in range(steps):
        if recorder is not None:
            recorder.begin_step()
        loss = torch.zeros(())
        for i in range(micro):
            part = true.loss(model, batches[(step + i) % len(batches)]) / micro
            part.backward()
            loss = loss + part.detach()
        if recorder is not None:
            recorder.gradients()
        optimizer.step()
        optimizer.zero_grad()
        if recorder is not None:
            recorder.end_step(loss)
        losses.append(loss.item())
    return losses


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def trained(model: nn.Module, word: str) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if p.requires_grad and word in n]


def test_norms_and_update_ratios_are_those_of_a_direct_calculation(tmp_path):
    model, batch = adapted(), true.TRUE_CLASSES["llava"].batches()[0]
    optimizer = optimizer_of(model)
    with DynamicsRecorder({"": model}, tmp_path / "d.jsonl") as recorder:
        recorder.begin_step()
        loss = true.loss(model.train(), batch)
        loss.backward()
        recorder.gradients()
        groups = {word: trained(model, word) for word in LAYERS}
        gradients = {
            word: torch.nn.utils.get_total_norm([p.grad for p in found]).item()
            for word, found in groups.items()
        }
        before = {word: [p.detach().clone() for p in found] for word, found in groups.items()}
        optimizer.step()
        recorder.end_step(loss)
    (record,) = read_dynamics(tmp_path / "d.jsonl")
    names = dict(zip(LAYERS, ("vision", "projector", "language"), strict=True))
    assert record["step"] == 1
    assert record["loss"] == loss.item()
    assert record["grad_norms"] == pytest.approx(
        {names[word]: norm for word, norm in gradients.items()}, rel=1e-6
    )
    everything = [p.grad for p in trained(model, "lora_")]
    assert record["grad_norm"] == pytest.approx(
        torch.nn.utils.get_total_norm(everything).item(), rel=1e-6
    )
    for word, weights in before.items():
        moved = [p.detach() - w for p, w in zip(groups[word], weights, strict=True)]
        ratio = torch.cat([m.flatten() for m in moved]).norm()
        ratio /= torch.cat([w.flatten() for w in weights]).norm()
        assert record["update_ratios"][names[word]] == pytest.approx(ratio.item(), rel=1e-5)


def seen_inputs(model: nn.Module, batch: true.Batch) -> dict[str, torch.Tensor]:
    """What each adapted layer reads, by its path in the base model."""
    found, handles = {}, []
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, name=name: found.update({name: args[0].detach().double()})
                )
            )
    model(**batch)
    for handle in handles:
        handle.remove()
    return found


def moments(model: nn.Module, batch: true.Batch, path, image_token=None):
    recorder = DynamicsRecorder({"": model}, path, image_token=image_token)
    recorder.begin_step()
    true.loss(model, batch).backward()
    recorder.gradients()
    recorder.end_step(None)
    recorder.close()
    return read_dynamics(path)[0]["second_moments"]


def test_second_moments_of_visual_and_text_tokens_are_those_of_a_direct_calculation(tmp_path):
    model, batch = adapted().train(), true.TRUE_CLASSES["llava"].batches()[0]
    inputs = seen_inputs(model, batch)
    found = moments(model, batch, tmp_path / "d.jsonl", true.IMAGE_TOKEN)
    assert found.keys() == inputs.keys()
    image = batch["input_ids"] == true.IMAGE_TOKEN
    text = ~image & batch["attention_mask"].bool()
    assert 0 < text.sum() < (~image).sum()  # there is padding
    for name, x in inputs.items():
        expected = {"visual": x.square().mean().item()}
        if "language_model" in name:
            expected = {
                "visual": x[image].square().mean().item(),
                "text": x[text].square().mean().item(),
            }
        assert found[name] == pytest.approx(expected, rel=1e-5)


def test_what_a_cross_attention_reads_of_an_image_is_visual(tmp_path):
    model, batch = adapted("mllama").train(), true.TRUE_CLASSES["mllama"].batches()[0]
    inputs = seen_inputs(model, batch)
    found = moments(model, batch, tmp_path / "d.jsonl", true.IMAGE_TOKEN)
    kinds = {name.partition("layers.")[2]: set(kinds) for name, kinds in found.items()
             if "language_model" in name}  # fmt: skip
    assert kinds["1.cross_attn.q_proj"] == {"visual", "text"}
    assert kinds["1.cross_attn.k_proj"] == kinds["1.cross_attn.v_proj"] == {"visual"}
    name = next(name for name in inputs if name.endswith("1.cross_attn.k_proj"))
    expected = inputs[name].square().mean().item()
    assert found[name]["visual"] == pytest.approx(expected, rel=1e-5)


def test_second_moments_of_a_model_without_images_leave_padding_out(tmp_path):
    model, batch = adapted("llama").train(), true.TRUE_CLASSES["llama"].batches()[0]
    inputs = seen_inputs(model, batch)
    counts = batch["attention_mask"].bool()
    found = moments(model, batch, tmp_path / "d.jsonl")
    for name, x in inputs.items():
        assert found[name] == pytest.approx({"all": x[counts].square().mean().item()}, rel=1e-5)


def test_convolutions_and_flat_rows_are_measured_as_they_are(tmp_path):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.flat = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.flat(self.conv(x).permute(0, 2, 3, 1).reshape(-1, 4))

    config = LoraConfig(r=2, target_modules=["conv", "flat"], init_lora_weights=False)
    model, x = get_peft_model(Mixed(), config), torch.randn(2, 3, 8, 8)
    with DynamicsRecorder({"net": model}, tmp_path / "d.jsonl") as recorder:
        recorder.begin_step()
        model(x).square().mean().backward()
        recorder.gradients()
        recorder.end_step(None)
    found = read_dynamics(recorder.path)[0]["second_moments"]
    assert found["net.conv"]["all"] == pytest.approx(x.square().mean().item(), rel=1e-5)
    assert found.keys() == {"net.conv", "net.flat"}


def test_recording_changes_no_loss_and_leaves_no_hook(tmp_path):
    plain = train(stock := adapted())
    model = adapted()
    with DynamicsRecorder({"": model}, tmp_path / "d.jsonl", every=2, image_token=59) as recorder:
        recorder.begin_step()
        assert hooks_of(model) > 20
        assert train(model, recorder) == plain
    assert hooks_of(model) == hooks_of(stock)  # transformers has a few of its own
    records = read_dynamics(tmp_path / "d.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["loss"] for record in records] == plain
    assert ["second_moments" in record for record in records] == [True, False, True, False, True]


def test_an_error_within_a_step_leaves_no_hook_and_keeps_the_records(tmp_path):
    model = adapted()
    train(model, steps=1)
    hooks = hooks_of(model)
    recorder = DynamicsRecorder({"": model}, tmp_path / "d.jsonl")

    def fail() -> None:
        with recorder:
            train(model, recorder, steps=3)
            recorder._fetch_every = 10  # as on a GPU
            train(model, recorder, steps=2)
            recorder.begin_step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert hooks_of(model) == hooks
    assert len(read_dynamics(tmp_path / "d.jsonl")) == 5


def test_going_on_drops_what_comes_after_the_step_and_a_line_that_was_cut(tmp_path):
    path = tmp_path / "d.jsonl"
    model = adapted()
    with DynamicsRecorder({"": model}, path) as recorder:
        train(model, recorder, steps=4)
    whole = read_dynamics(path)
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert read_dynamics(path) == whole
    with DynamicsRecorder({"": model}, path, step=3) as recorder:
        train(model, recorder, steps=2)
    records = read_dynamics(path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert records[:3] == whole[:3]
    with DynamicsRecorder({"": model}, path):  # from the first step on
        pass
    assert read_dynamics(path) == []


def test_numbers_that_are_not_finite_are_null(tmp_path):
    model = adapted()
    with DynamicsRecorder({"": model}, tmp_path / "d.jsonl") as recorder:
        recorder.begin_step()
        for parameter in recorder.parameters:
            parameter.grad = torch.full_like(parameter, float("inf"))
        recorder.gradients()
        recorder.end_step(torch.tensor(float("nan")))
    record = json.loads((tmp_path / "d.jsonl").read_text())
    assert record["loss"] is record["grad_norm"] is record["grad_norms"]["vision"] is None


def test_nothing_is_fetched_from_the_device_within_a_step(tmp_path):
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.language_model = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask):
            return self.language_model(self.embed(input_ids)) * attention_mask[..., None]

    config = LoraConfig(r=2, target_modules=["language_model"], init_lora_weights=False)
    model = get_peft_model(Text(), config).to("meta")  # a device without values to fetch
    recorder = DynamicsRecorder({"": model}, tmp_path / "d.jsonl", image_token=3)
    optimizer, ids = optimizer_of(model), torch.ones(2, 5, dtype=torch.long, device="meta")
    recorder.begin_step()
    loss = model(input_ids=ids, attention_mask=ids).square().mean()
    loss.backward()
    recorder.gradients()
    optimizer.step()
    recorder.end_step(loss)
    with pytest.raises(NotImplementedError, match="meta"):
        recorder.flush()


def test_what_cannot_be_recorded_is_refused(tmp_path):
    path = tmp_path / "d.jsonl"
    with pytest.raises(ValueError, match="every must be at least 1"):
        DynamicsRecorder({"": adapted()}, path, every=0)
    with pytest.raises(ValueError, match="no parameter"):
        DynamicsRecorder({"": adapted().requires_grad_(False)}, path)
    path.write_text("[]\n")
    with pytest.raises(ValueError, match=r"d\.jsonl cannot be read as training dynamics"):
        DynamicsRecorder({"": adapted()}, path, step=1)


def test_names_tell_the_groups():
    names = {
        "unet.down_blocks.0.attn1.to_q.lora_A.default.weight": "UNet",
        "text_encoder.text_model.encoder.layers.0.q_proj": "text encoder",
        "text_encoder_2.text_model.encoder.layers.0.q_proj": "text encoder 2",
        "model.visual.blocks.0.attn.qkv": "vision",
        "model.visual.merger.mlp.0": "projector",
        "model.multi_modal_projector.linear_1": "projector",
        "model.language_model.layers.0.self_attn.q_proj": "language",
        "classifier.modules_to_save.default.weight": "modules_to_save",
        "bert.encoder.layer.0.attention.self.query": "rest",
    }
    assert {name: group_of(name) for name in names} == names
