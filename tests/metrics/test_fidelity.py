"""Fidelity against sums done by hand, on tiny random encoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from cntlora_core import mini
from cntlora_core.metrics import (
    Encoders,
    load_encoders,
    measure,
    measure_photos,
    read_pictures,
    read_prompts,
    subject_features,
)
from cntlora_core.metrics.encoders import SMALL, load_clip, load_image_encoder
from cntlora_core.metrics.fidelity import (
    mean_cosine_among,
    mean_paired_cosine,
    mean_pairwise_cosine,
    without_token,
)
from cntlora_core.metrics.view import fidelity_sheet, fidelity_text


@pytest.fixture(scope="module")
def encoders(tiny_encoders: Path) -> Encoders:
    return load_encoders(tiny_encoders / "vision", tiny_encoders / "clip")


def noise(count: int, seed: int, size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    shape = (count, size[1], size[0], 3)
    return [Image.fromarray(a) for a in rng.integers(0, 256, shape, dtype=np.uint8)]


def unit_rows(count: int, seed: int) -> torch.Tensor:
    rows = torch.randn(count, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def naive_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_mean_cosines_are_the_sums_over_pairs() -> None:
    a, b = unit_rows(5, 0), unit_rows(3, 1)
    every = [naive_cosine(x, y) for x in a for y in b]
    assert mean_pairwise_cosine(a, b) == pytest.approx(np.mean(every), abs=1e-7)
    among = [naive_cosine(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    assert mean_cosine_among(a) == pytest.approx(np.mean(among), abs=1e-6)
    assert mean_cosine_among(a[:1]) is None
    paired = [naive_cosine(x, y) for x, y in zip(a[:3], b)]
    assert mean_paired_cosine(a[:3], b) == pytest.approx(np.mean(paired), abs=1e-7)


def test_scores_are_those_of_the_stock_models(encoders: Encoders, tiny_encoders: Path) -> None:
    photos, pictures = noise(3, 1), noise(4, 2)
    prompts = ["a red dog", "a cat", "a red dog", "a cat"]
    vit = ViTModel.from_pretrained(tiny_encoders / "vision", add_pooling_layer=False).float()
    clip = CLIPModel.from_pretrained(tiny_encoders / "clip").float()
    tokenizer = CLIPTokenizer.from_pretrained(tiny_encoders / "clip")

    def pixels(images: list[Image.Image]) -> torch.Tensor:
        stack = np.stack([np.asarray(image, np.float32) for image in images])
        return torch.from_numpy(stack / 127.5 - 1).permute(0, 3, 1, 2)

    def pooled(features: object) -> torch.Tensor:
        return getattr(features, "pooler_output", features)  # pyright: ignore

    with torch.no_grad():
        real, made = (vit(x).last_hidden_state[:, 0] for x in (pixels(photos), pixels(pictures)))
        clip_real, clip_made = (
            pooled(clip.get_image_features(pixel_values=x))
            for x in (pixels(photos), pixels(pictures))
        )
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")["input_ids"]
        texts = pooled(clip.get_text_features(input_ids=tokens))
    found = measure(encoders, subject_features(encoders, photos), pictures, prompts)
    for score, first, second in (
        (found.dino, made, real),
        (found.clip_i, clip_made, clip_real),
    ):
        every = [naive_cosine(x, y) for x in first for y in second]
        assert score == pytest.approx(np.mean(every), abs=1e-5)
    paired = [naive_cosine(x, y) for x, y in zip(clip_made, texts)]
    assert found.clip_t == pytest.approx(np.mean(paired), abs=1e-5)


def test_the_whole_is_the_mean_of_its_prompts(encoders: Encoders) -> None:
    prompts = ["a dog", "a cat", "a dog", "a dog", "a red box"]
    features = subject_features(encoders, noise(2, 3))
    found = measure(encoders, features, noise(5, 4), prompts)
    assert [(row.prompt, row.pictures) for row in found.by_prompt] == [
        ("a dog", 3), ("a cat", 1), ("a red box", 1),
    ]  # fmt: skip
    for name in ("dino", "clip_i", "clip_t"):
        rows = [getattr(row, name) for row in found.by_prompt for _ in range(row.pictures)]
        assert getattr(found, name) == pytest.approx(np.mean(rows), abs=1e-6)
    assert len({row.clip_t for row in found.by_prompt}) == 3


def test_real_pictures_score_one_hundred_against_themselves_only(encoders: Encoders) -> None:
    photos = noise(3, 5)
    features = subject_features(encoders, photos)
    assert measure(
        encoders, subject_features(encoders, photos[:1]), photos[:1], None
    ).dino == pytest.approx(1, abs=1e-6)
    themselves = measure_photos(features)
    assert themselves is not None
    # With itself each photo scores 1, which the mean over different ones leaves out.
    with_itself = measure(encoders, features, photos, None)
    assert with_itself.dino == pytest.approx((2 * themselves.dino + 1) / 3, abs=1e-6)
    assert with_itself.clip_t is None
    assert measure_photos(subject_features(encoders, photos[:1])) is None


def test_pictures_are_cut_to_their_middle_square(encoders: Encoders) -> None:
    (wide,) = noise(1, 6, (48, 16))
    middle = wide.crop((16, 0, 32, 16))
    for encoder in (encoders.dino, encoders.clip):
        torch.testing.assert_close(encoder.encode_images([wide]), encoder.encode_images([middle]))
        assert not torch.allclose(
            encoder.encode_images([wide.crop((0, 0, 16, 16))]), encoder.encode_images([middle])
        )


@pytest.mark.parametrize(
    ("prompt", "token", "read"),
    [
        ("a photo of sks dog", "sks", "a photo of dog"),
        ("SKS dog, sks, asks", "sks", "dog, , asks"),
        ("a photo of sks dog", None, "a photo of sks dog"),
        ("sks", "sks", "sks"),
        ("a <v*> dog", "<v*>", "a dog"),
    ],
)
def test_the_token_is_left_out(prompt: str, token: str | None, read: str) -> None:
    assert without_token(prompt, token) == read


def test_leaving_the_token_out_changes_what_clip_reads(encoders: Encoders) -> None:
    features, pictures = subject_features(encoders, noise(2, 7)), noise(2, 8)
    with_token = measure(encoders, features, pictures, ["a sks dog"] * 2)
    without = measure(encoders, features, pictures, ["a sks dog"] * 2, token="sks")
    plain = measure(encoders, features, pictures, ["a dog"] * 2)
    assert without.clip_t == plain.clip_t
    assert with_token.clip_t != plain.clip_t
    assert without.by_prompt[0].prompt == "a sks dog"


def test_work_is_reported_and_can_be_stopped(encoders: Encoders) -> None:
    seen: list[tuple[int, int]] = []
    encoders.dino.encode_images(
        noise(20, 9), lambda _s, done, total, _v: seen.append((done, total))
    )
    assert seen == [(0, 20), (16, 20), (20, 20)]

    def stop(_stage: str, done: int, _total: int, _values: dict) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(
            encoders, subject_features(encoders, noise(1, 1)), noise(20, 9), None, reporter=stop
        )


def test_what_cannot_be_measured_is_refused_in_words(encoders: Encoders) -> None:
    features = subject_features(encoders, noise(1, 1))
    with pytest.raises(ValueError, match="2 pictures but 1 prompts"):
        measure(encoders, features, noise(2, 1), ["a dog"])
    with pytest.raises(ValueError, match="no generated pictures"):
        measure(encoders, features, [], None)
    with pytest.raises(ValueError, match="no photos of the subject"):
        subject_features(encoders, [])


def test_encoders_of_another_kind_are_refused_in_words(
    tiny_encoders: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is a CLIP model"):
        load_image_encoder(tiny_encoders / "clip")
    with pytest.raises(ValueError, match="kind 'vit'"):
        load_clip(tiny_encoders / "vision")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_clip(tiny_model)
    with pytest.raises(FileNotFoundError, match="cannot be had"):
        load_image_encoder("nobody/no-such-encoder", local_files_only=True)
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_encoders / "vision", pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors"):
        load_image_encoder(pickled)
    (pickled / "model.safetensors").touch()
    (pickled / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="cannot be read as a model's configuration"):
        load_image_encoder(pickled)


def test_the_small_encoders_are_found_by_name(
    tiny_encoders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="there are: clip, vision"):
        mini.encoder_path("dino")
    monkeypatch.setattr(mini, "encoder_path", lambda kind: tiny_encoders / kind)
    assert load_encoders(SMALL, SMALL).sources == {"dino": "small", "clip": "small"}


def save(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        noise(1, i)[0].save(folder / name)
    return folder


def test_prompts_come_from_the_list_the_text_files_or_one_for_all(tmp_path: Path) -> None:
    folder = save(tmp_path / "made", "1.png", "2.png", "10.png")
    assert read_pictures(folder).prompts is None
    assert read_pictures(folder, "a dog").prompts == ("a dog",) * 3
    (folder / "2.txt").write_text("a cat")
    with pytest.raises(ValueError, match=r"1\.png has no prompt, though others have"):
        read_pictures(folder)
    (folder / "prompts.json").write_text(json.dumps({"1.png": "a box", "10.png": "snow"}))
    assert read_pictures(folder).prompts == ("a box", "a cat", "snow")
    (folder / "prompts.json").write_text('["a box"]')
    with pytest.raises(ValueError, match="cannot be read as a JSON file"):
        read_pictures(folder)


def test_prompts_are_filled_in_and_read_from_files(tmp_path: Path) -> None:
    from cntlora_core.data.captions import subject_prompts

    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa {} in the snow\n\n a {class}\n", "utf-8")
    words = subject_prompts("sks", "dog")
    assert read_prompts([str(path), "{token}!"], words) == (
        "a sks dog in the snow",
        "a dog",
        "sks!",
    )
    with pytest.raises(ValueError, match="give a token and a class name"):
        read_prompts(["a {}"], None)
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts([" "], None)


def test_the_sheet_has_a_row_for_each_prompt(encoders: Encoders) -> None:
    photos = noise(2, 1)
    features = subject_features(encoders, photos)
    prompts = ["a dog", "a cat"] * 3
    first = measure(encoders, features, noise(6, 2), prompts, label="first")
    bare = measure(encoders, features, noise(3, 3), None, label="bare")
    few = fidelity_sheet(photos, [first], [(noise(6, 2), prompts)], side=40)
    more = fidelity_sheet(
        photos, [first, bare], [(noise(6, 2), prompts), (noise(3, 3), None)], side=40
    )
    assert more.width > few.width
    assert more.height > few.height
    text = fidelity_text(first)
    assert text == (
        f"DINO {100 * first.dino:.1f}, CLIP-I {100 * first.clip_i:.1f}, "
        f"CLIP-T {100 * float(first.clip_t or 0):.1f}"
    )
    assert "CLIP-T" not in fidelity_text(bare)
