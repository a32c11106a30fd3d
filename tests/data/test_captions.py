"""Prompts, caption files, and prompts that do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core.data.captions import (
    check_prompt_length,
    encode_prompts,
    read_caption,
    subject_prompts,
    token_note,
    training_prompts,
    with_article,
)

SKS = subject_prompts("sks", "dog")
FULL = subject_prompts(instance_prompt="my dog", class_prompt="a dog")


def test_prompts_of_dreambooth():
    assert SKS.instance_prompt == "a photo of sks dog"
    assert SKS.class_prompt == "a photo of a dog"
    assert (SKS.token, SKS.class_name) == ("sks", "dog")
    assert subject_prompts("  sks ", "An  Apple\n").class_prompt == "a photo of an Apple"
    assert subject_prompts("sks", "a").class_name == "a"
    assert (FULL.instance_prompt, FULL.class_prompt) == ("my dog", "a dog")
    assert (FULL.token, FULL.class_name) == (None, None)


@pytest.mark.parametrize(
    "noun",
    ["a dog", "an apple", "an owl", "a unicorn", "a uniform", "an uninvited guest", "an umbrella",
     "an hourglass", "a house", "an heir", "a european castle", "a eucalyptus", "an egg",
     "a one-eyed cat", "an onion", "a ukulele", "a used car", "a usual dog", "a yak", "an X-ray",
     "an élan", "a xylophone", "an oven", "an urn", "a 3d printer"],
)  # fmt: skip
def test_article(noun):
    assert with_article(noun.split(" ", 1)[1]) == noun


def test_class_name_keeps_its_article_out():
    assert subject_prompts("sks", "a dog") == SKS
    assert subject_prompts("sks", "anchor").class_name == "anchor"


@pytest.mark.parametrize(
    "given_words",
    [
        {},
        {"token": "sks"},
        {"class_name": "dog"},
        {"token": "sks", "class_name": " "},
        {"instance_prompt": "my dog"},
        {"class_prompt": "a dog"},
    ],
)
def test_missing_parts_name_both_ways(given_words):
    with pytest.raises(ValueError, match=r"a token and a class name .* or an instance prompt and"):
        subject_prompts(**given_words)


@pytest.mark.parametrize(
    "more",
    [
        {"token": "sks", "class_name": "dog", "class_prompt": "a dog"},
        {"token": "sks", "instance_prompt": "my dog", "class_prompt": "a dog"},
        {"class_name": "dog", "instance_prompt": "my dog"},
    ],
)
def test_both_ways_at_once_are_refused(more):
    with pytest.raises(ValueError, match="given together"):
        subject_prompts(**more)


def test_wrong_kinds():
    with pytest.raises(TypeError, match="class name must be a string, got int"):
        subject_prompts("sks", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="placeholder"):
        subject_prompts(instance_prompt="my {token}", class_prompt="a dog")


@pytest.mark.parametrize(
    ("token", "class_name"),
    [("dog", "dog"), ("DOG", "dog"), ("dog", "Big Dog"), ("my dog", "dog"), ("dog7", "dog"),
     ("dog", "dog-house"), ("CAFE\u0301", "café"), ("狗", "狗")],
)  # fmt: skip
def test_token_inside_the_class_name_is_refused(token, class_name):
    with pytest.raises(ValueError, match=r"overwrite .* rare token such as 'sks'"):
        subject_prompts(token, class_name)


@pytest.mark.parametrize(
    ("token", "class_name"),
    [("sks", "dog"), ("do", "dog"), ("dogs", "dog"), ("hot", "hotdog"), ("sks2", "mk2 car")],
)
def test_token_that_only_resembles_the_class_is_fine(token, class_name):
    assert subject_prompts(token, class_name).token == token


@settings(max_examples=60, deadline=None)
@given(st.text("abcXYZ ", min_size=1, max_size=6), st.text("abcXYZ ", min_size=1, max_size=6))
def test_a_shared_word_is_refused_and_nothing_else(token, class_name):
    words = [part.casefold().split() for part in (token, class_name)]
    if not all(words):
        return
    article = len(words[1]) > 1 and words[1][0] in ("a", "an", "the")
    shared = set(words[0]) & set(words[1][article:])
    if shared:
        with pytest.raises(ValueError, match="share the word"):
            subject_prompts(token, class_name)
    else:
        prompts = subject_prompts(token, class_name)
        assert prompts.instance_prompt == f"a photo of {prompts.token} {prompts.class_name}"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"sks dog\n", "sks dog"),
        ("\ufeffsks dög".encode(), "sks dög"),
        ("sks dög".encode("utf-16"), "sks dög"),
        (b"sks dog,\r\n on  grass\r\n", "sks dog, on grass"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".caption", ".TXT"])
def test_caption_files(tmp_path, content, text, suffix):
    (tmp_path / f"my photo.1{suffix}").write_bytes(content)
    caption = read_caption(tmp_path / "my photo.1.jpg")
    assert caption is not None
    assert (caption.text, caption.problem) == (text, None)


def test_caption_files_with_problems(tmp_path):
    photo = tmp_path / "a.jpg"
    assert read_caption(photo) is None
    (tmp_path / "a.txt").write_bytes(b"")
    empty = read_caption(photo)
    assert empty is not None
    assert empty.text is None
    assert empty.problem == "caption file a.txt is empty; the instance prompt is used for a.jpg"
    (tmp_path / "a.txt").write_bytes(b"ok\xff")
    bad = read_caption(photo)
    assert bad is not None
    assert bad.text is None
    assert "a.txt is not UTF-8 (byte 2)" in (bad.problem or "")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.caption").write_text("two")
    both = read_caption(photo)
    assert both is not None
    assert (both.text, both.problem) == ("one", "a.txt is used, a.caption is not")


def test_training_prompts():
    result = training_prompts(
        [
            None,
            " ",
            "a {token} {class} asleep",
            "an SKS, running",
            "a dog",
            "sksy dog",
            "{other}sks",
        ],
        SKS,
        names=["0", "1", "2", "3", "4.png", "5.png", "6"],
    )
    assert result.prompts == (
        "a photo of sks dog", "a photo of sks dog", "a sks dog asleep", "an SKS, running",
        "a dog", "sksy dog", "{other}sks",
    )  # fmt: skip
    assert len(result.warnings) == 2
    assert "4.png does not contain the token 'sks'" in result.warnings[0]
    assert "5.png" in result.warnings[1]
    assert training_prompts([None, "a cat"], FULL) == training_prompts(["my dog", "a cat"], FULL)
    with pytest.raises(ValueError, match="photo 2 has a placeholder"):
        training_prompts([None, "{token}"], FULL)


def test_placeholders_are_filled_once():
    """A token that looks like a placeholder is not expanded again."""
    odd = subject_prompts("{class}", "dog")
    assert training_prompts(["{token} {class}"], odd).prompts == ("{class} dog",)


@pytest.mark.parametrize(("words", "dropped"), [(74, ""), (75, ""), (76, "dog"), (80, "dog " * 5)])
def test_prompt_length_at_the_limit(tokenizer, words, dropped):
    prompt = ("dog " * words).strip()
    length = check_prompt_length(prompt, tokenizer)
    assert (length.n_tokens, length.limit) == (words + 2, 77)
    assert length.dropped_text == dropped.strip()
    encoded = encode_prompts([prompt], tokenizer)
    assert bool(encoded.messages) == bool(dropped)


def test_dropped_text_is_the_users_own(tokenizer):
    if not tokenizer.is_fast:
        pytest.skip("transformers 4 reads CLIP's vocabulary in Python, without offsets")
    prompt = "dog " * 70 + "Über dem Café, SKS dog"
    dropped = check_prompt_length(prompt, tokenizer).dropped_text
    assert prompt.endswith(dropped)
    assert dropped.endswith("Café, SKS dog")
    messages = encode_prompts(["sks dog", prompt, prompt], tokenizer).messages
    assert len(messages) == 1
    assert "Café, SKS dog" in messages[0]
    assert "77" in messages[0]


def test_tokenizers_without_offsets_and_without_a_length(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_max_length", int(1e30))
    assert check_prompt_length("dog", tokenizer).limit == 77
    assert encode_prompts(["dog"], tokenizer).input_ids.shape == (1, 77)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
    assert check_prompt_length("dog " * 76, tokenizer).dropped_text == "dog"


def test_encoding(tokenizer):
    encoded = encode_prompts(["sks dog", ""], tokenizer)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    sks, dog = tokenizer.convert_tokens_to_ids(["sks</w>", "dog</w>"])
    assert encoded.input_ids.dtype == torch.int64
    assert encoded.input_ids.tolist() == [[start, sks, dog] + [end] * 74, [start] + [end] * 76]
    assert encoded.messages == ()
    assert encode_prompts([], tokenizer).input_ids.shape == (0, 77)
    for wrong in ("sks dog", [1], [None]):
        with pytest.raises(TypeError, match="sequence of strings"):
            encode_prompts(wrong, tokenizer)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["dog", "sks", "é", "x9!", "狗", "a-b"]), max_size=60))
def test_never_cut_silently(tokenizer, words):
    """Kept tokens + tokens of what is said to be dropped = all tokens of the prompt."""
    prompt = " ".join(words)
    length = check_prompt_length(prompt, tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    assert length.n_tokens == len(ids) + 2
    encoded = encode_prompts([prompt], tokenizer)
    assert encoded.input_ids[0, 1 : 1 + min(75, len(ids))].tolist() == ids[:75]
    assert bool(encoded.messages) == (len(ids) > 75) == bool(length.dropped_text)
    if length.dropped_text:
        lost = tokenizer(length.dropped_text, add_special_tokens=False).input_ids
        assert ids[-1] == lost[-1]
        assert len(ids) - 75 <= len(lost) <= len(ids) - 75 + 3  # a letter cut in two is said whole


def test_token_notes(tokenizer):
    assert token_note("sks", tokenizer) is None
    assert token_note("dog sks", tokenizer) is None
    note = token_note("zwxq", tokenizer)
    assert note is not None
    assert "4 pieces (z + w + x + q)" in note
    assert token_note("dog dog dog", tokenizer, max_pieces=3) is None
    unknown = token_note("<|endoftext|>", tokenizer)
    assert unknown is not None
    assert "cannot express" in unknown
