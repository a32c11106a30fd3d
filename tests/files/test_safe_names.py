"""Plain names from any text, and sizes in words."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cntlora_core.runtime.file_names import distinct_names, safe_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of sks dog", "a_photo_of_sks_dog"),
        ("con", "name-con"),
        ("LPT1.txt", "name-LPT1.txt"),
        ("console", "console"),
        ("", "unnamed"),
    ],
)
def test_safe_name_examples(text, expected):
    assert safe_name(text) == expected


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("../../etc/passwd", "etc_passwd"),
        ("C:\\Users\\x", "C_Users_x"),
        (".hidden", "hidden"),
        ("-rf", "rf"),
        ("café.png", "cafe.png"),
        ("name.", "name"),
        ("a dog?", "a_dog"),
        ("dog \N{DOG FACE}", "dog"),
        ("?", "unnamed"),
    ],
)
def test_a_name_that_lost_something_ends_in_eight_digits(text, kept):
    assert re.fullmatch(re.escape(kept) + "-[0-9a-f]{8}", safe_name(text))


def test_safe_name_tells_lost_text_apart():
    assert safe_name("小狗") != safe_name("小猫")
    assert safe_name("dog 小狗") != safe_name("dog 小猫")
    assert safe_name("a dog!") != safe_name("a dog?") != safe_name("a dog")
    long = "x" * 200
    assert safe_name(long + "a") != safe_name(long + "b")
    with pytest.raises(ValueError, match="at least 20"):
        safe_name("x", max_length=5)


_AWKWARD = st.sampled_from(["/", "\\", "..", ".", "con", "NUL", " ", "\0", "é", "-", "_", "\ud800"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=8), _AWKWARD), max_size=12), st.integers(20, 90))
def test_safe_name_is_always_a_plain_name(parts, limit):
    name = safe_name("".join(parts), max_length=limit)
    assert 1 <= len(name) <= limit
    assert name.isascii()
    assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    assert name[0] not in ".-"
    assert not name.endswith(".")
    assert name.split(".")[0].lower() not in {"con", "prn", "aux", "nul", "com1", "lpt9"}
    assert safe_name(name, max_length=limit) == name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text("")
        assert path.resolve().parent == Path(folder).resolve()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a dog", "a_dog", "A dog", "a dog", "con", "name-con", "x" * 90, ""])
    ),
    st.integers(20, 80),
)
def test_distinct_names_differ_whatever_the_texts(texts, limit):
    names = distinct_names(texts, max_length=limit, reserved=["A_Dog", "x" * 11])
    folded = [name.casefold() for name in names]
    assert len(set(folded)) == len(texts)
    assert not {"a_dog", "x" * 11} & set(folded)
    assert all(1 <= len(name) <= limit for name in names)


def test_distinct_names_are_the_plain_ones_where_those_differ():
    assert distinct_names(["a dog", "a cat"]) == ["a_dog", "a_cat"]
