"""The package's light surface, its subjects, its vocabulary code and the picture composer."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cntlora_core import mini
from cntlora_core.mini.backgrounds import COLOURS, PATTERNS, SCENES
from cntlora_core.mini.compose import Background, Placement, paste, render_background
from cntlora_core.mini.things import HELD_OUT_NAMES, THINGS, trained_things, with_article
from cntlora_core.mini.vocabulary import learn_merges


def test_importing_the_package_does_not_import_torch():
    code = "import sys, cntlora_core.mini as m; m.subjects(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_subject_has_five_pictures_of_each_part():
    assert len(mini.subjects()) >= 8
    for name in mini.subjects():
        subject = mini.subject(name)
        for folder in (subject.photos, subject.held_out):
            pictures = sorted(folder.iterdir())
            assert [path.name for path in pictures] == [f"{i}.png" for i in range(5)]
            for path in pictures:
                with Image.open(path) as picture:
                    assert picture.mode == "RGB"
                    assert picture.size == (128, 128)


def test_no_held_out_picture_is_a_training_picture():
    seen = {}
    for name in mini.subjects():
        subject = mini.subject(name)
        for path in [*subject.photos.iterdir(), *subject.held_out.iterdir()]:
            content = path.read_bytes()
            assert content not in seen, f"{path} repeats {seen.get(content)}"
            seen[content] = path


def test_subjects_are_of_both_kinds_and_their_class_is_known_to_the_model():
    known = {thing.name: thing.kind for thing in trained_things()}
    subjects = [mini.subject(name) for name in mini.subjects()]
    assert {subject.kind for subject in subjects} == {"live", "object"}
    for subject in subjects:
        assert known[subject.class_name] == subject.kind
        assert subject.token not in subject.class_name
        assert f"{subject.token} {subject.class_name}" in subject.instance_prompt
        assert subject.token not in subject.class_prompt


def test_prompts_speak_of_what_training_showed():
    words = {word for phrase in SCENES for word in phrase.split()} | {*COLOURS, *PATTERNS}
    words |= {word for thing in trained_things() for word in thing.name.split()}
    words |= {"a", "an", "and", "with", "wearing", "background", "on", "in"}
    for name in mini.subjects():
        prompts = mini.subject(name).prompts
        assert len(set(prompts)) == len(prompts) == 25
        for prompt in prompts:
            assert prompt.count("{}") == 1
            assert set(prompt.replace("{}", "").split()) <= words, prompt


def test_an_unknown_subject_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"unicycle.*backpack"):
        mini.subject("unicycle")


def test_held_out_names_are_things_but_not_trained():
    names = {thing.name for thing in THINGS}
    assert set(HELD_OUT_NAMES) <= names
    assert not set(HELD_OUT_NAMES) & {thing.name for thing in trained_things()}
    assert len(trained_things()) >= 100


def test_the_manifest_lists_every_drawing():
    path = mini._HERE / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    drawings = {emoji for thing in THINGS for emoji in thing.emoji}
    assert manifest["held_out_names"] == list(HELD_OUT_NAMES)
    for style in ("google", "twitter", "3d"):
        assert set(manifest["sha256"][style]) == drawings
    for package in manifest["packages"].values():
        assert package["picture_licence"] in {"Apache-2.0", "CC-BY-4.0", "MIT"}


@pytest.mark.parametrize(
    ("noun", "phrase"), [("apple", "an apple"), ("dog", "a dog"), ("unicorn", "a unicorn")]
)
def test_articles(noun: str, phrase: str):
    assert with_article(noun) == phrase


@pytest.mark.parametrize("colour", sorted(COLOURS))
def test_a_plain_background_has_the_colour_of_its_name(colour: str):
    image = render_background(Background("plain", colour), np.random.default_rng(3), 32)
    mean = image.mean((0, 1))
    distances = {name: np.linalg.norm(mean - np.float32(rgb)) for name, rgb in COLOURS.items()}
    assert min(distances, key=distances.get) == colour


@pytest.mark.parametrize("scene", sorted(SCENES))
def test_a_scene_is_drawn_in_range_and_repeatably_at_any_size(scene: str):
    for size in (48, 64):
        first = render_background(Background("scene", scene), np.random.default_rng(5), size)
        again = render_background(Background("scene", scene), np.random.default_rng(5), size)
        other = render_background(Background("scene", scene), np.random.default_rng(6), size)
        assert first.shape == (size, size, 3)
        assert first.min() > -1
        assert first.max() < 262
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 1


def test_paste_puts_the_thing_where_it_was_told():
    sprite = Image.new("RGBA", (40, 20), (255, 0, 0, 255)).convert("RGBa")
    image = np.zeros((64, 64, 3), np.float32)
    top, left = paste(image, sprite, Placement(0.5, (0.5, 0.25), 0.0, False))
    rows, columns = np.nonzero(image[..., 0] > 128)
    assert (rows.min(), rows.max() + 1) == (24, 40)
    assert (columns.min(), columns.max() + 1) == (0, 32)
    assert (top, left) == (24, 15)
    assert image[..., 1:].max() == 0


def test_merges_make_whole_words_single_tokens():
    merges = learn_merges({"aab": 10, "ab": 5, "cab": 1}, whole=["cab", "sks"], limit=1)
    assert merges[0] == ("a", "b</w>")
    parts = ["s", "k", "s</w>"]
    for first, second in merges:
        at = 0
        while at + 1 < len(parts):
            if parts[at] == first and parts[at + 1] == second:
                parts[at : at + 2] = [first + second]
            at += 1
    assert parts == ["sks</w>"]
