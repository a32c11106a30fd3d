"""The naming test: its prompts, its list of names, and the counting of answers."""

from __future__ import annotations

import pytest

from cntlora_core.mini.making.blind import (
    blind_prompts,
    count_right,
    names_to_choose_from,
    protocol_prompts,
    read_answers,
)


def test_every_prompt_is_of_another_object_and_its_name_is_among_forty():
    rows, names = blind_prompts(20, seed=0), names_to_choose_from(40, seed=0)
    wanted = [name for _, name in rows]
    assert len(set(wanted)) == 20
    assert len(set(names)) == 40
    assert set(wanted) < set(names)
    assert all(f" {name} " in prompt for prompt, name in rows)
    assert blind_prompts(20, seed=1) != rows


def test_answers_are_counted_by_image_and_by_prompt():
    key = [{"prompt": p, "name": n} for p, n in (("a", "dog"), ("b", "cat"), ("a", "dog"))]
    counted = count_right(read_answers("1 dog\n2: Cat\n\n3. fox\n"), key)
    assert (counted["images"], counted["images_right"]) == (3, 2)
    assert (counted["prompts"], counted["prompts_with_every_image_right"]) == (2, 1)
    assert counted["mistaken"] == [{"prompt": "a", "answer": "fox"}]
    assert count_right({}, key)["images_right"] == 0


@pytest.mark.parametrize("text", ["dog", "1 dog\n1 cat"])
def test_a_line_that_is_no_answer_is_refused(text: str):
    with pytest.raises(ValueError, match="number and a name"):
        read_answers(text)


def test_the_protocols_prompts_name_the_class_and_not_the_subject():
    prompts = protocol_prompts(["penguin", "backpack"])
    assert len(prompts) == 50
    assert prompts[0] == "a photo of a penguin in the snow"
    assert not any("sks" in prompt or "{" in prompt for prompt in prompts)
