"""The package's light surface, its subjects, its vocabulary code and the picture composer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cntlora_core import mini
from cntlora_core.mini.making.backgrounds import COLOURS, PATTERNS, SCENES
from cntlora_core.mini.making.compose import (
    Background,
    ComposeConfig,
    Composer,
    Placement,
    paste,
    render_background,
)
from cntlora_core.mini.making.make_subjects import SUBJECTS
from cntlora_core.mini.making.near_doubles import NEAR, nearest
from cntlora_core.mini.making.object_classes import (
    CORE_NAMES,
    HELD_OUT_NAMES,
    KEPT_OUT_3D,
    MODEL_CLASSES,
    OBJECT_CLASSES,
    trained_classes,
    with_article,
)
from cntlora_core.mini.making.sprites import STYLES, SpriteSource
from cntlora_core.mini.making.train_clip import ClipSet
from cntlora_core.mini.making.vocabulary import learn_merges


def test_importing_the_package_does_not_import_torch():
    code = "import sys, cntlora_core.mini as m; m.subjects(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_subject_has_five_pictures_of_each_part():
    assert len(mini.subjects()) >= 8
    for name in mini.subjects():
        subject = mini.subject(name)
        for folder in (subject.photos, subject.held_out):
            pictures = sorted(folder.glob("*.png"))
            assert [path.name for path in pictures] == [f"{i}.png" for i in range(5)]
            for path in pictures:
                with Image.open(path) as picture:
                    assert picture.mode == "RGB"
                    assert picture.size == (128, 128)


def test_captions_name_the_backgrounds_of_the_photos():
    for name in mini.subjects():
        texts = {p.read_text("utf-8").strip() for p in mini.subject(name).photos.glob("*.txt")}
        assert len(texts) == 5
        assert all(text.startswith("a photo of {token} {class} ") for text in texts)


def test_no_held_out_picture_is_a_training_picture():
    seen = {}
    for name in mini.subjects():
        subject = mini.subject(name)
        for path in [*subject.photos.glob("*.png"), *subject.held_out.glob("*.png")]:
            content = path.read_bytes()
            assert content not in seen, f"{path} repeats {seen.get(content)}"
            seen[content] = path


def test_subjects_are_of_both_kinds_and_their_class_is_known_to_the_model():
    known = {object_class.name: object_class.kind for object_class in trained_classes()}
    subjects = [mini.subject(name) for name in mini.subjects()]
    assert {subject.kind for subject in subjects} == {"live", "object"}
    for subject in subjects:
        assert known[subject.class_name] == subject.kind
        assert subject.token not in subject.class_name
        assert f"{subject.token} {subject.class_name}" in subject.instance_prompt
        assert subject.token not in subject.class_prompt


def test_prompts_speak_of_what_training_showed():
    words = {word for phrase in SCENES for word in phrase.split()} | {*COLOURS, *PATTERNS}
    words |= {word for object_class in trained_classes() for word in object_class.name.split()}
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


def test_held_out_names_are_classes_but_not_trained():
    names = {object_class.name for object_class in OBJECT_CLASSES}
    assert set(HELD_OUT_NAMES) <= names
    assert not set(HELD_OUT_NAMES) & {object_class.name for object_class in trained_classes()}
    assert len(trained_classes()) >= 100


def test_the_manifest_lists_every_drawing():
    path = mini._HERE / "making" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    drawings = {emoji for object_class in OBJECT_CLASSES for emoji in object_class.emoji}
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


def test_paste_puts_the_object_where_it_was_told():
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


MAGENTA, GREEN = (255, 0, 255), (0, 200, 80)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SpriteSource:
    """Packages of plain discs: magenta where a 3D drawing is to be kept out, green elsewhere."""
    root = tmp_path_factory.mktemp("node_modules")
    drawn = [
        emoji for object_class in (*OBJECT_CLASSES, *MODEL_CLASSES) for emoji in object_class.emoji
    ]
    emoji = list(dict.fromkeys([*drawn, *KEPT_OUT_3D]))
    rows = [{"short_name": name, "unified": f"{i:04X}"} for i, name in enumerate(emoji)]
    table = root / "emoji-datasource-google" / "emoji.json"
    table.parent.mkdir()
    table.write_text(json.dumps(rows))
    found = SpriteSource(root)
    for style in STYLES:
        for number, name in enumerate(emoji):
            path = found.path(style, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            colour = MAGENTA if style == "3d" and name in KEPT_OUT_3D else GREEN
            picture = Image.new("RGBA", (24, 24))
            box = (2, 2, 22, 8 + number % 12)
            ImageDraw.Draw(picture).ellipse(box, fill=(*colour, 255))
            picture.save(path, lossless=True)
    return found


def colours_of(sprites: list[Image.Image]) -> set[tuple[int, int, int]]:
    """Of one pixel inside each disc."""
    inside = [np.asarray(sprite.convert("RGBA"))[3, 10, :3].tolist() for sprite in sprites]
    return {(red, green, blue) for red, green, blue in inside}


def test_no_sample_and_no_picture_of_the_autoencoder_shows_a_drawing_kept_out(source: SpriteSource):
    assert {subject.emoji for subject in SUBJECTS} <= set(KEPT_OUT_3D)
    plain = ComposeConfig(recolour_share=0)
    shown, everything = [], source.everything()
    for seed, styles in ((1, STYLES), (2, ("3d",))):
        classes = tuple(
            t for t in MODEL_CLASSES if styles == STYLES or t.emoji[0] not in KEPT_OUT_3D
        )
        composer = Composer(source, plain, seed, classes, styles)
        shown += [composer.sample(index)[0] for index in range(60)]
    assert (
        min(np.abs(picture - np.array(MAGENTA, np.float32)).max(-1).min() for picture in shown) > 30
    )
    assert colours_of(everything) == {GREEN}
    assert colours_of(ClipSet(source).sprites) == {GREEN}
    assert colours_of(ClipSet(source, kept_out=True).sprites) == {MAGENTA}


def test_a_caption_without_a_background_has_a_plain_one_behind_it(source: SpriteSource):
    names = [*(object_class.name for object_class in MODEL_CLASSES), "hat", "crown"]
    composer = Composer(source, ComposeConfig(bare_share=1.0), 3)
    white = 0
    for index in range(40):
        picture, caption = composer.sample(index)
        assert caption.endswith(tuple(names)), caption
        corner = picture[:3, :3].reshape(-1, 3).astype(np.float32)
        assert corner.std(0).max() < 3
        white += corner.min() > 220
    assert 10 < white < 35
    named = Composer(source, ComposeConfig(bare_share=0.0), 3)
    assert not any(named.sample(index)[1].endswith(tuple(names)) for index in range(40))


def test_the_model_learns_objects_that_the_classifier_tells_apart_each_by_one_drawing():
    names = [object_class.name for object_class in MODEL_CLASSES]
    assert 15 <= len(set(names)) == len(names) <= 30
    assert set(names) <= set(CORE_NAMES)
    assert {mini.subject(name).class_name for name in mini.subjects()} <= set(names)
    assert all(len(object_class.emoji) == 1 for object_class in MODEL_CLASSES)


def test_a_mirrored_double_of_a_subject_is_found(source: SpriteSource, tmp_path: Path):
    shutil.copytree(source.root, tmp_path / "modules")
    copied = SpriteSource(tmp_path / "modules")
    for emoji, turn in (("tent", False), ("key", True)):
        picture = Image.new("RGBA", (24, 24))
        ImageDraw.Draw(picture).polygon([(2, 2), (20, 6), (8, 21)], fill=(*GREEN, 255))
        if turn:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture.save(copied.path("3d", emoji), lossless=True)
    neighbours = nearest(copied)
    assert neighbours["tent"][0][0] == "key"
    assert neighbours["tent"][0][1] < NEAR < neighbours["tent"][1][1]
