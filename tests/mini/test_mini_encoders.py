"""The small encoders that come along: they tell the embedded subjects, never shown, apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from cntlora_core import mini
from cntlora_core.data.photos import load_photos
from cntlora_core.diffusion.sampler import sample
from cntlora_core.diffusion.settings import SamplingSettings
from cntlora_core.metrics import Encoders, load_encoders, measure, subject_features
from cntlora_core.metrics.encoders import SMALL
from cntlora_core.metrics.pictures import write_prompts
from cntlora_core.mini.making.collage import every_background
from cntlora_core.mini.making.compose import render_background
from cntlora_core.mini.making.evaluate import (
    CLASSIFIED_NAMES,
    as_batch,
    classify,
    classify_folder,
    load_classifier,
    on_plain,
    prompts_to_classify,
    right_backgrounds,
)
from cntlora_core.mini.making.object_classes import with_article

SHARE = 0.9  # of the pictures; the card has those of 200

Generated = tuple[list[tuple[str, str, str]], list[Image.Image]]


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return load_encoders(SMALL, SMALL)


@pytest.fixture(scope="module")
def generated() -> Generated:
    """A picture of each object, two thirds on plain backgrounds and scenes, and what was asked."""
    rows = prompts_to_classify(3 * len(CLASSIFIED_NAMES), seed=1)[1::3]
    settings = SamplingSettings(steps=8, guidance=2.5, seed=1, batch_size=20, scheduler="unipc")
    prompts = [prompt for prompt, _, _ in rows]
    return rows, sample(str(mini.model_path()), prompts, (), settings, device="cpu")


def pictures(folder: Path) -> list:
    return [photo.image for photo in load_photos(folder, read_captions=False).photos]


def test_held_out_pictures_are_nearest_to_the_photos_of_their_subject(encoders: Encoders) -> None:
    subjects = [mini.subject(name) for name in mini.subjects()]
    photos = [encoders.dino.encode_images(pictures(s.photos)).mean(0) for s in subjects]
    held_out = torch.cat([encoders.dino.encode_images(pictures(s.held_out)) for s in subjects])
    nearest = (held_out @ torch.stack(photos).T).argmax(1)
    own = torch.arange(len(subjects)).repeat_interleave(len(held_out) // len(subjects))
    assert (nearest == own).float().mean() > 0.75  # 0.86; chance: 0.1


def test_a_generated_image_is_nearest_to_its_name_and_to_its_whole_prompt(
    encoders: Encoders, generated: Generated
) -> None:
    rows, pictures = generated
    images = encoders.clip.encode_images(pictures)
    names, notes = encoders.clip.encode_prompts(
        [f"a photo of {with_article(name)}" for _, name, _ in rows]
    )
    assert notes == ()
    own = torch.arange(len(rows))
    assert ((images @ names.T).argmax(1) == own).float().mean() >= SHARE
    prompts, _ = encoders.clip.encode_prompts([prompt for prompt, _, _ in rows])
    assert ((images @ prompts.T).argmax(1) == own).float().mean() >= SHARE


def test_a_subject_scores_more_with_itself_than_with_others(encoders: Encoders) -> None:
    penguin, tent = mini.subject("penguin"), mini.subject("tent")
    features = subject_features(encoders, pictures(penguin.photos))
    prompts = ["a photo of a penguin"] * 5
    own = measure(encoders, features, pictures(penguin.held_out), prompts)
    other = measure(encoders, features, pictures(tent.held_out), prompts)
    assert own.dino > other.dino
    assert own.clip_i > other.clip_i
    assert (own.clip_t or 0) > (other.clip_t or 0)


def test_the_classifier_finds_object_and_background_in_what_the_model_generates(
    generated: Generated,
) -> None:
    rows, pictures = generated
    classifier = load_classifier()
    objects, backgrounds = classify(classifier, as_batch(pictures), rows)
    assert objects.float().mean() >= SHARE
    assert backgrounds.float().mean() >= SHARE
    shuffled = rows[1:] + rows[:1]  # a classifier that says yes to everything would pass the above
    assert classify(classifier, as_batch(pictures), shuffled)[0].float().mean() < 0.2


def test_a_folder_is_classified_by_its_prompts(generated: Generated, tmp_path: Path) -> None:
    rows, pictures = generated
    at = next(i for i, (_, name, _) in enumerate(rows) if name == "penguin")
    for name in ("right", "wrong", "other"):
        pictures[at].save(tmp_path / f"{name}.png")
    wrong = "on a red background" if rows[at][2] != "on a red background" else "in space"
    prompts = {
        "right.png": f"a sks penguin {rows[at][2]}",
        "wrong.png": f"a sks penguin {wrong}",
        "other.png": "a sks penguin and an apple on a white background",  # not classified
    }
    write_prompts(tmp_path, prompts)
    found = classify_folder(load_classifier(), tmp_path, "penguin")
    assert found == {"pictures": 2, "things": 1.0, "backgrounds": 0.5}
    with pytest.raises(ValueError, match="knows no 'zebra'"):
        classify_folder(load_classifier(), tmp_path, "zebra")


def test_a_pattern_is_told_from_others_and_from_plain_backgrounds() -> None:
    phrases = ["on green stripes", "on blue dots", "on purple checks", "on a green background"]
    backgrounds = [found for found in every_background() if found.phrase in phrases]
    drawn = [
        Image.fromarray(
            render_background(b, np.random.default_rng(i), 64).clip(0, 255).astype("u1")
        )
        for i, b in enumerate(backgrounds * 5)
    ]
    prompts = [f"a sks cat {b.phrase}" for b in backgrounds] * 5
    assert (right_backgrounds(drawn, prompts, "cat") or 0) >= 0.8
    assert right_backgrounds(drawn, prompts[1:] + prompts[:1], "cat") == 0
    assert right_backgrounds(drawn[:1], ["a sks cat wearing a hat on green stripes"], "cat") is None
    plain = [b.kind == "plain" for b in backgrounds] * 5
    assert on_plain(load_classifier(), as_batch(drawn)).tolist() == plain


def test_all_weights_together_are_at_most_40_mb_of_float16() -> None:
    root = Path(mini.__file__).parent
    weights = [
        *(root / "model").rglob("*.safetensors"),
        *(root / "encoders").rglob("*.safetensors"),
    ]
    assert len(weights) == 3 + 3
    assert sum(path.stat().st_size for path in weights) <= 40e6
    for path in weights:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, path
