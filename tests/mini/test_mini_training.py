"""The training scripts: a resumed run equals an uninterrupted one, shared work equals one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from cntlora_core import mini
from cntlora_core.mini.making.curves import plot_curves, read_log
from cntlora_core.mini.making.loop import Budget, ExponentialAverage, SharedWork
from cntlora_core.mini.making.train_autoencoder import (
    LATENT_DEVIATION,
    SCALING_FACTOR,
    AutoencoderConfig,
    autoencoder_loss,
    build_autoencoder,
    feature_difference,
    load_vision,
    whiten_latents,
)
from cntlora_core.mini.making.train_clip import ClipConfig, build_clip, clip_loss
from cntlora_core.mini.making.train_diffusion import (
    DiffusionConfig,
    build_scheduler,
    build_text_encoder,
    build_unet,
    diffusion_loss,
    stratified_steps,
    train,
    trained_parameters,
)

SMALL = DiffusionConfig(channels=(16, 16, 16, 16), batch=4, text_width=16, text_layers=1)


def test_two_processes_give_the_gradient_of_one():
    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderConfig(channels=(8, 8, 8)))
    loss = partial(autoencoder_loss, model, AutoencoderConfig(), None)
    parameters = list(model.parameters())
    batch = (torch.rand(4, 3, 64, 64), torch.randn(4, 4, 16, 16), torch.zeros(4, 1, 1, 1))
    value = loss(*batch)
    expected = torch.autograd.grad(value, parameters)
    threads = torch.get_num_threads()
    try:
        shared = SharedWork(2, loss, parameters).backward(batch)
    finally:
        torch.set_num_threads(threads)
    assert shared == pytest.approx(value.item(), rel=1e-5)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A tiny encoded set that borrows the shipped tokenizer."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "tokenizer").symlink_to(mini.model_path() / "tokenizer")
    rng = np.random.default_rng(0)
    np.save(folder / "latents.npy", rng.normal(size=(32, 4, 16, 16)).astype(np.float16))
    covers = rng.integers(256, size=(32, 16, 16), dtype=np.uint8)
    np.save(folder / "covers.npy", covers)
    (folder / "captions.txt").write_text("a dog\na cat\n" * 16)
    (folder / "dataset.json").write_text(json.dumps({"done": 32}))
    return folder


def test_a_resumed_run_equals_an_uninterrupted_one(data: Path, tmp_path: Path):
    config = replace(SMALL, muon=True)  # for matrices; AdamW for all else
    vae = mini.model_path() / "vae"
    threads = torch.get_num_threads()
    try:
        train(data, vae, tmp_path / "whole", config, Budget(1, steps=4), workers=1)
        # A state in the middle, as an interruption leaves it: the learning rate follows the whole
        # budget.
        train(data, vae, tmp_path / "parts", config, _StopAfter(2, steps=4), workers=1, every=0)
        train(data, vae, tmp_path / "parts", config, Budget(1, steps=4), workers=1)
    finally:
        torch.set_num_threads(threads)
    whole, parts = (load_file(tmp_path / n / "state.safetensors") for n in ("whole", "parts"))
    assert any(name.startswith("optimizer/momentum/") for name in whole)
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-6)
    moved = [k for k in whole if k.startswith("model/") and "conv_in.weight" in k]
    assert (whole[moved[0]] - whole[moved[0].replace("model/", "ema/")]).abs().max() > 0


def test_bfloat16_gives_nearly_the_loss_and_gradient_of_float32(data: Path):
    tokenizer = CLIPTokenizer.from_pretrained(data / "tokenizer")
    found = []
    for config in (SMALL, replace(SMALL, bfloat16=True)):
        torch.manual_seed(5)
        unet, words = build_unet(config), build_text_encoder(config, tokenizer)
        latents, noise = torch.randn(2, 4, 4, 16, 16).unbind()
        tokens, covers = torch.randint(500, (4, 77)), torch.rand(4, 1, 16, 16)
        steps, signal = torch.tensor([50, 300, 600, 900]), build_scheduler().alphas_cumprod
        loss = diffusion_loss(unet, words, signal, config, latents, tokens, covers, noise, steps)
        loss.backward()
        assert unet.conv_in.weight.grad is not None
        found.append((loss.detach(), unet.conv_in.weight.grad))
    assert found[0][0] != found[1][0]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0.02, atol=0)
    assert torch.cosine_similarity(found[0][1].flatten(), found[1][1].flatten(), 0) > 0.98


def _autoencoder_case(bfloat16: bool) -> tuple[torch.nn.Parameter, torch.Tensor]:
    config = AutoencoderConfig(channels=(8, 8, 8), bfloat16=bfloat16)
    model = build_autoencoder(config)
    pictures, noise = torch.rand(4, 3, 64, 64) * 2 - 1, torch.randn(4, 4, 16, 16)
    loss = autoencoder_loss(model, config, None, pictures, noise, torch.full((4, 1, 1, 1), 0.1))
    return model.encoder.conv_in.weight, loss


def _clip_case(bfloat16: bool) -> tuple[torch.nn.Parameter, torch.Tensor]:
    tokenizer = CLIPTokenizer.from_pretrained(mini.model_path() / "tokenizer")
    config = ClipConfig(width=40, layers=1, text_width=16, text_layers=1, bfloat16=bfloat16)
    model = build_clip(config, tokenizer)
    nouns, captions = torch.randint(500, (6, 24)), torch.randint(500, (4, 24))
    pictures, same = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 1, 2])
    loss = clip_loss(model, config, nouns, pictures, captions, same, torch.tensor([5, 0, 0, 3]))
    return model.vision_model.embeddings.patch_embedding.weight, loss


@pytest.mark.parametrize("case", [_autoencoder_case, _clip_case])
def test_bfloat16_hardly_changes_what_autoencoder_and_clip_pair_learn(
    case: Callable[[bool], tuple[torch.nn.Parameter, torch.Tensor]],
):
    found = []
    for bfloat16 in (False, True):
        torch.manual_seed(6)
        weight, loss = case(bfloat16)
        loss.backward()
        assert weight.grad is not None
        found.append((loss.detach(), weight.grad.flatten()))
    assert found[0][0] != found[1][0]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0.02, atol=0)
    assert torch.cosine_similarity(found[0][1], found[1][1], 0) > 0.98


def test_a_run_goes_on_from_the_weights_of_a_model(data: Path, tmp_path: Path):
    tokenizer = CLIPTokenizer.from_pretrained(data / "tokenizer")
    torch.manual_seed(5)
    unet, words = build_unet(SMALL), build_text_encoder(SMALL, tokenizer)
    unet.save_pretrained(tmp_path / "model" / "unet")
    words.save_pretrained(tmp_path / "model" / "text_encoder")
    still = replace(SMALL, rate=1e-12)
    threads = torch.get_num_threads()
    try:
        train(
            data,
            mini.model_path() / "vae",
            tmp_path / "run",
            still,
            Budget(1, steps=1),
            workers=1,
            start_from=tmp_path / "model",
        )
    finally:
        torch.set_num_threads(threads)
    state = load_file(tmp_path / "run" / "state.safetensors")
    for name, tensor in trained_parameters(unet, words).items():
        torch.testing.assert_close(state[f"model/{name}"], tensor.detach())


class _StopAfter(Budget):
    """A budget whose run breaks off early."""

    def __init__(self, stop: int, steps: int) -> None:
        super().__init__(1, steps=steps)
        self.stop = stop

    @property
    def progress(self) -> float:
        return 1.0 if self.step >= self.stop else super().progress


def test_the_feature_term_moves_the_decoder_and_not_the_encoder_that_looks():
    torch.manual_seed(3)
    model = build_autoencoder(AutoencoderConfig(channels=(8, 8, 8)))
    vision = load_vision()
    pictures, noise = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 4, 16, 16)
    batch = (pictures, noise, torch.zeros(2, 1, 1, 1))
    config = AutoencoderConfig(feature_weight=0.5, decoder_only=True)
    plain = autoencoder_loss(model, config, None, *batch)
    whole = autoencoder_loss(model, config, vision, *batch)
    assert whole > plain + 0.01
    gradient = torch.autograd.grad(whole - plain, [*model.decoder.parameters()])
    assert sum(g.abs().sum() for g in gradient) > 0
    assert not any(parameter.requires_grad for parameter in vision.parameters())
    states = [torch.randn(2, 5, 4), torch.randn(2, 5, 4)]
    assert feature_difference(states, states) == 0


def test_noise_in_the_latents_is_a_part_of_their_own_deviation():
    torch.manual_seed(4)
    config = AutoencoderConfig(channels=(8, 8, 8))
    model: AutoencoderKL = build_autoencoder(config)
    pictures, noise = torch.rand(4, 3, 64, 64) * 2 - 1, torch.randn(4, 4, 16, 16)
    decoded = []
    model.decoder.register_forward_pre_hook(lambda _module, given: decoded.append(given[0]))
    with torch.no_grad():
        assert model.quant_conv is not None
        model.quant_conv.weight[4:] = 0  # a posterior without spread
        model.quant_conv.bias[4:] = -30
        mean = model.encode(pictures).latent_dist.mean
        for level in (0.0, 0.1):
            autoencoder_loss(model, config, None, pictures, noise, torch.full((4, 1, 1, 1), level))
        assert model.post_quant_conv is not None
        expected = model.post_quant_conv(mean + 0.1 * mean.std((0, 2, 3), keepdim=True) * noise)
        torch.testing.assert_close(decoded[0], model.post_quant_conv(mean), rtol=0, atol=1e-5)
        torch.testing.assert_close(decoded[1], expected, rtol=0, atol=1e-5)


def test_whitening_keeps_reconstructions_and_sets_the_latents_scale():
    torch.manual_seed(1)
    model: AutoencoderKL = build_autoencoder(AutoencoderConfig(channels=(8, 8, 8)))
    pictures = torch.rand(16, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = model.decode(model.encode(pictures).latent_dist.mean).sample
        whiten_latents(model, pictures)
        latents = model.encode(pictures).latent_dist.mean
        after = model.decode(latents).sample
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    spread = (
        torch.cov(latents.transpose(0, 1).flatten(1)) * (SCALING_FACTOR / LATENT_DEVIATION) ** 2
    )
    torch.testing.assert_close(spread, torch.eye(4), rtol=0, atol=0.02)


def test_stratified_steps_cover_every_span_once():
    torch.manual_seed(2)
    steps = stratified_steps(10, 1000)
    assert sorted((steps // 100).tolist()) == list(range(10))


def test_the_rate_warms_up_holds_and_falls():
    budget = Budget(1, steps=100)
    learning_rates = []
    for step in range(100):
        budget.step = step
        learning_rates.append(budget.learning_rate(1.0, warmup_steps=10, decay_from=0.5))
    assert learning_rates[0] == pytest.approx(0.1)
    assert learning_rates[10:50] == [1.0] * 40
    assert all(a >= b for a, b in pairwise(learning_rates[50:]))
    assert learning_rates[-1] < 0.02


def test_the_average_trails_the_weights():
    weight = torch.zeros(3)
    average = ExponentialAverage({"w": weight}, decay=0.5)
    weight += 1
    average.update({"w": weight}, step=1000)
    torch.testing.assert_close(average.shadow["w"], torch.full((3,), 0.5))


def test_a_config_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"groups=16 .* channels"):
        DiffusionConfig(channels=(20, 20, 20, 20))
    with pytest.raises(TypeError):
        DiffusionConfig.from_json({"chanels": [1]})


def test_curves_read_a_resumed_log_once_and_refuse_a_folder_without(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    losses = {25: 3.0, 50: 2.0, 75: 1.0}
    rows = [(25, 3.0), (50, 9.0), (50, 2.0), (75, 1.0)]  # step 50 was done again after a stop
    lines = [{"step": s, "loss": loss, "rate": 1e-3, "seconds": s} for s, loss in rows]
    (run / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    assert {entry["step"]: entry["loss"] for entry in read_log(run)} == losses
    plot_curves([("a", run), ("b", run)], tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height > 100
    with pytest.raises(FileNotFoundError, match="training script"):
        read_log(tmp_path)
