"""Batches of one shape and of several: the same loss, and gradients where a mask allows them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

from cntlora_core.data.photos import photos_from_images
from cntlora_core.diffusion.batches import _generator, _shuffled_items, draw_batch
from cntlora_core.diffusion.objective import training_target
from cntlora_core.diffusion.pipeline import load_stable_diffusion
from cntlora_core.diffusion.settings import AdapterSettings, SubjectSettings, TrainingSettings
from cntlora_core.diffusion.stages import (
    encode_class_images,
    encode_subject,
    plan_initialization,
    read_subject,
    training_data,
)
from cntlora_core.diffusion.trainer import SubjectTrainer

SQUARE, WIDE, TALL = (48, 48), (64, 40), (36, 64)


def picture(i, size):
    image = Image.new("RGB", size, (40 * i, 90, 200 - 30 * i))
    ImageDraw.Draw(image).ellipse((4 + i, 6, 30, 34), fill=(230, 60 * i, 20))
    return image


def left_half(size):
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


@pytest.fixture(scope="module")
def trainer_of(tiny_model, tmp_path_factory):
    """Makes a trainer on pictures of given sizes, with four square class images."""
    cache = tmp_path_factory.mktemp("cache")

    def make(sizes, masked=False, method="lora", unmasked_weight=0.1, prior=0.5, **training):
        parts = load_stable_diffusion(str(tiny_model), device=torch.device("cpu"))
        photos = photos_from_images(
            [picture(i, size) for i, size in enumerate(sizes)],
            masks=[left_half(size) for size in sizes] if masked else None,
        )
        settings = SubjectSettings(
            "", token="sks", class_name="dog", unmasked_weight=unmasked_weight
        )
        subject = read_subject(settings, photos)
        encoded = encode_subject(parts, subject, cache=cache)
        others = photos_from_images([picture(9 + i, SQUARE) for i in range(4)])
        others = encode_class_images(parts, subject, others, cache=cache)
        adapter = AdapterSettings(method=method, rank=2, init_passes=1)
        plan = plan_initialization(parts, encoded, adapter).plan
        trainer = SubjectTrainer(
            parts.networks, parts.family, parts.noise_scheduler, plan,
            training_data(encoded, others), adapter=adapter,
            training=TrainingSettings(**{"steps": 3, "device": "cpu", **training}),
            prior_weight=prior,
        )  # fmt: skip
        return SimpleNamespace(trainer=trainer, encoded=encoded, subject=subject)

    return make


def plain_loss(trainer, step, prior_weight):
    """The loss of squares as one stack: what a step was before there were shapes."""
    size, data, seed = trainer.training.batch_size, trainer.data, trainer.training.seed
    generator = _generator(seed, 1, step, 0)
    photos = _shuffled_items(len(data.photos), step * size, size, seed, 2)
    latents = [data.photos.sample(i, generator) for i in photos]
    tokens = [data.photo_tokens[i] for i in photos]
    others = _shuffled_items(len(data.class_images), step * size, size, seed, 3)
    latents = torch.stack(latents + [data.class_images.sample(i, generator) for i in others])
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (len(latents),), generator=generator)
    noised = trainer._batch_loss._scheduler.add_noise(latents, noise, timesteps)
    target = training_target(trainer._batch_loss._scheduler, latents, noise, timesteps)
    unique, inverse = torch.stack(tokens + [data.class_tokens[0]] * size).unique(
        dim=0, return_inverse=True
    )
    states = trainer.networks["text_encoder"](unique)[0][inverse]
    prediction = trainer.unet(noised, timesteps, encoder_hidden_states=states).sample
    errors = (prediction - target).square().flatten(1).mean(1)
    return errors[:size].mean() + prior_weight * errors[size:].mean()


def test_squares_give_the_very_loss_and_gradient_of_one_stack(trainer_of):
    trainer = trainer_of([SQUARE] * 3, batch_size=2).trainer
    trainer.step = 1
    parameters = list(trainer.parameters.values())
    batch = trainer._batch(0)
    assert len(batch.shapes) == 1
    loss, *_ = trainer._loss(batch)
    expected = plain_loss(trainer, 1, 0.5)
    assert torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, gradients, torch.autograd.grad(expected, parameters)))


def test_a_batch_of_several_shapes_is_the_mean_over_its_samples(trainer_of):
    made = trainer_of([TALL, SQUARE, WIDE], batch_size=3)
    trainer = made.trainer
    sizes = [part.size for part in made.encoded.frames]
    assert sizes == [(24, 44), (32, 32), (40, 24)]
    trainer.unet.eval()
    trainer.networks["text_encoder"].eval()
    batch = trainer._batch(0)
    assert sorted(len(shape.items) for shape in batch.shapes) == [1, 1, 4]
    assert sorted(torch.cat([shape.items for shape in batch.shapes]).tolist()) == list(range(6))
    total, instance, prior = trainer._loss(batch)
    one_by_one: dict[int, float] = {}
    conditioning = trainer._batch_loss.conditioning(batch)
    for shape in batch.shapes:
        for row, item in enumerate(shape.items.tolist()):
            alone = dataclasses.replace(
                shape,
                items=torch.tensor([item]),
                latents=shape.latents[row : row + 1],
                noise=shape.noise[row : row + 1],
            )
            error = trainer._batch_loss.errors(alone, batch.timesteps, conditioning)
            one_by_one[item] = float(error.detach())
    mean = [sum(one_by_one[i] for i in part) / 3 for part in (range(3), range(3, 6))]
    assert float(instance.detach()) == pytest.approx(mean[0], rel=1e-5)
    assert float(prior.detach()) == pytest.approx(mean[1], rel=1e-5)
    assert float(total.detach()) == pytest.approx(mean[0] + 0.5 * mean[1], rel=1e-5)


def test_the_losses_and_gradients_of_a_batch_s_parts_add_up_to_those_of_the_whole(trainer_of):
    trainer = trainer_of([TALL, SQUARE, WIDE], masked=True, batch_size=3, min_snr_gamma=5).trainer
    trainer.unet.eval()
    parameters = list(trainer.parameters.values())
    whole = trainer._batch(0)
    expected = trainer._loss(whole)
    parts = [trainer._loss(whole.part(places)) for places in ([0, 4], [1, 2, 3], [5])]
    for value, terms in zip(expected, zip(*parts, strict=True), strict=True):
        assert float(value.detach()) == pytest.approx(float(sum(terms).detach()), rel=1e-5)
    summed = torch.autograd.grad(sum(total for total, *_ in parts), parameters)
    for got, gradient in zip(summed, torch.autograd.grad(expected[0], parameters), strict=True):
        assert torch.allclose(got, gradient, rtol=1e-3, atol=1e-6)


def test_a_step_s_batch_follows_from_seed_and_step_alone(trainer_of):
    data = trainer_of([TALL, SQUARE, WIDE]).trainer.data
    training = TrainingSettings(steps=9, batch_size=2, seed=5)

    def drawn(step):
        return draw_batch(data, training, step, 0, with_class_images=True, horizon=1000)

    in_order = [drawn(step) for step in range(6)]
    for step in (4, 1, 5):
        again = drawn(step)
        assert torch.equal(again.timesteps, in_order[step].timesteps)
        for one, other in zip(again.shapes, in_order[step].shapes, strict=True):
            assert torch.equal(one.latents, other.latents)
            assert torch.equal(one.noise, other.noise)
    seen = {tuple(shape.latents.shape[2:]) for batch in in_order for shape in batch.shapes}
    assert seen == {(16, 16), (22, 12), (12, 20)}


def test_offset_noise_is_a_constant_for_each_sample_and_channel(trainer_of):
    data = trainer_of([SQUARE, WIDE]).trainer.data
    plain = TrainingSettings(batch_size=2, seed=5)
    offset = TrainingSettings(batch_size=2, seed=5, noise_offset=0.1)
    draws = [
        draw_batch(data, t, 3, 0, with_class_images=True, horizon=1000) for t in (plain, offset)
    ]
    constants = []
    for before, after in zip(*(batch.shapes for batch in draws), strict=True):
        added = after.noise - before.noise
        torch.testing.assert_close(added, added.mean((2, 3), keepdim=True).expand_as(added))
        constants += (added.mean((2, 3)) / 0.1).flatten().tolist()
        assert torch.equal(before.latents, after.latents)
    assert torch.equal(draws[0].timesteps, draws[1].timesteps)
    assert len({round(c, 3) for c in constants}) == 4 * 4
    assert 0.3 < torch.tensor(constants).std() < 2


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_background_gives_the_gradient_that_its_weight_says(trainer_of, floor):
    """At the denoiser's output, where the loss says what each latent should become."""
    trainer = trainer_of([WIDE], masked=True, unmasked_weight=floor, prior=0.0).trainer
    outputs = []
    handle = trainer.unet.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    loss, *_ = trainer._loss(trainer._batch(0))
    handle.remove()
    prediction = outputs[0].sample
    gradient = torch.autograd.grad(loss, prediction)[0]
    target = trainer._batch(0).shapes[0].noise
    per_error = gradient / (prediction - target) * gradient.numel() / 2
    inside, outside = per_error[..., :10], per_error[..., 10:]
    high = 2 / (1 + floor)  # weights of mean 1 on two halves
    assert torch.allclose(inside, torch.full_like(inside, high), rtol=1e-3)
    assert torch.allclose(outside, torch.full_like(outside, floor * high), rtol=1e-3)
    if floor == 0:
        assert gradient[..., 10:].abs().max() == 0


def test_class_images_are_not_masked_and_masks_reach_a_gradient_initialisation(trainer_of):
    trainer = trainer_of([SQUARE], masked=True, batch_size=1).trainer
    (shape,) = trainer._batch(0).shapes
    assert torch.equal(shape.weights[1], torch.ones(16, 16))
    assert shape.weights[0].mean() == pytest.approx(1)
    assert shape.weights[0].max() > 1.5
    masked, plain = (
        trainer_of([WIDE, TALL], masked=masked, method="lora_ga").trainer.plan.factors
        for masked in (True, False)
    )
    assert any(not torch.equal(masked[name].down, plain[name].down) for name in plain)
