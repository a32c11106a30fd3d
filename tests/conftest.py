"""Shared fixtures: a tiny random model of SD1.5's make, as a diffusers folder, and photos."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Models of a few thousand weights: more threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from PIL import Image, ImageDraw

WORDS = ["sks", "dog", "cat", "a", "photo", "of", "red", "the", "in", "snow", "on", "box"]


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer that knows every byte and a few whole words."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    pieces = symbols + [s + "</w>" for s in symbols]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merged = parts[-2] + parts[-1]
            merges.append(f"{parts[-2]} {parts[-1]}")
            if merged not in pieces:
                pieces.append(merged)
            parts = [*parts[:-2], merged]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    lines = ["#version: 0.2", *dict.fromkeys(merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 77,
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
            }
        )
    )


@pytest.fixture(autouse=True)
def few_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run draws its plots where a test looks at them: they are a third of a tiny run's time."""
    job = sys.modules.get("cntlora_core.diffusion.job")
    if job is not None and request.node.get_closest_marker("plots") is None:
        monkeypatch.setattr(job, "plot_loss", lambda *_: None)
        monkeypatch.setattr(job, "plot_ranks", lambda *_: None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of SD1.5's classes, two levels of its four: widths 32, images of 32 px."""
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("tiny model")
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(str(folder))
    return folder


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """Four different square pictures of 48 pixels."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    for i in range(4):
        image = Image.new("RGB", (48, 48), (40 * i, 90, 200 - 30 * i))
        ImageDraw.Draw(image).ellipse((5 + i, 6, 30, 40 - 2 * i), fill=(230, 60 * i, 20))
        image.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``vision`` and ``clip``: tiny random encoders of the kinds that judge pictures."""
    import transformers
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTextConfig,
        CLIPTokenizer,
        CLIPVisionConfig,
        ViTConfig,
        ViTModel,
    )

    # transformers 4 has the Pillow ones under the plain names
    clip_processor, vit_processor = (
        getattr(transformers, f"{kind}ImageProcessorPil", None)
        or getattr(transformers, f"{kind}ImageProcessor")
        for kind in ("CLIP", "ViT")
    )
    base = tmp_path_factory.mktemp("tiny encoders")
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    grey = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    torch.manual_seed(1)
    vit = ViTModel(ViTConfig(image_size=16, patch_size=8, **shape), add_pooling_layer=False)
    vit.half().save_pretrained(base / "vision")
    vit_processor(size={"height": 16, "width": 16}, **grey).save_pretrained(base / "vision")
    write_tokenizer(base / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(str(base / "clip"))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **shape)
    both = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    CLIPModel(both).half().save_pretrained(base / "clip")
    clip_processor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, **grey
    ).save_pretrained(base / "clip")
    return base


def prediction(unet, text_encoder) -> torch.Tensor:
    """What text encoder and UNet make of fixed tokens and latents."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    tokens = torch.randint(5, 200, (2, 77), generator=generator)
    with torch.no_grad():
        states = text_encoder(tokens)[0]
        return unet(latents, torch.tensor([30, 700]), encoder_hidden_states=states).sample


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture
def train(tiny_model: Path, photo_folder: Path, tmp_path: Path, monkeypatch):
    """Train with given settings; returns the job's result, and what was kept of the training.

    Kept are the ``trainer``, the ``exact`` layers that its file stands for, and the ``prediction``
    of its models before they were unwrapped.
    """
    from cntlora_core.diffusion import export, job, settings

    kept = {}
    finish = job._finish

    def keep(trainer, *rest):
        kept["prediction"] = prediction(*trainer.networks.values())
        kept["trainer"] = trainer
        kept["exact"] = export.trained_layers(trainer.networks, trainer.plan)[0]
        return finish(trainer, *rest)

    monkeypatch.setattr(job, "_finish", keep)

    def run(
        adapter: settings.AdapterSettings, steps: int = 3, reporter=None, resume=False, **output
    ):
        exact_file = {"file_precision": "float32", "compress": False}
        asked = settings.JobSettings(
            model=str(tiny_model),
            subject=settings.SubjectSettings(
                images=str(photo_folder), token="sks", class_name="dog"
            ),
            output=settings.OutputSettings(
                **{"output": str(tmp_path / "out"), **exact_file, **output}
            ),
            prior=settings.PriorSettings(prior_weight=0.0, cache=str(tmp_path / "cache")),
            adapter=adapter,
            training=settings.TrainingSettings(steps=steps, learning_rate=3e-3, device="cpu"),
        )
        given = {} if reporter is None else {"reporter": reporter}
        return job.personalise(asked, resume=resume, **given), kept

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is no part of the installed package, its measurements and the making of the small model,
    is tested apart.
    """
    for item in items:
        if {"benchmark", "mini"} & set(item.path.relative_to(Path(__file__).parent).parts):
            item.add_marker(pytest.mark.thorough)
