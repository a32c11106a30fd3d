"""Prompts as users write them: placeholders are filled in with a subject's token and class name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from cntlora_core.data.captions import SubjectPrompts, fill_placeholders, subject_prompts

PLACEHOLDERS = ("{}", "{token}", "{class}")


def filled_prompt(prompt: str, subject: SubjectPrompts | None) -> str:
    """A prompt with the token and the class name in place of ``{token}`` and ``{class}``, and both
    in place of ``{}``.

    Raises:
        ValueError: if the prompt has a placeholder, and there is no subject or one that was given
            by full prompts.
    """
    marks = [mark for mark in PLACEHOLDERS if mark in prompt]
    if not marks:
        return prompt
    if subject is None or subject.token is None:
        raise ValueError(
            f"the prompt {prompt!r} has {marks[0]}: give a token and a class name, or write the "
            "words out"
        )
    return fill_placeholders(prompt.replace("{}", "{token} {class}"), subject)


def taught_subject(header: Mapping[str, str]) -> SubjectPrompts | None:
    """Token and class name that a LoRA was taught with, as its header says; None without.

    Args:
        header: The strings of the file's header.
    """
    try:
        values = json.loads(header["cntlora.settings"])["subject"]
        return subject_prompts(values["token"], values["class_name"], None, None)
    except (KeyError, TypeError, ValueError):
        return None


def prompts_for_loras(
    prompts: Sequence[str], headers: Iterable[Mapping[str, str]]
) -> tuple[str, ...]:
    """Prompts with their placeholders filled in as the LoRAs were taught them.

    Args:
        prompts: With placeholders or without, see :func:`filled_prompt`.
        headers: Of the LoRAs; not read where there is no placeholder.

    Raises:
        ValueError: if a prompt has a placeholder, and a LoRA names no token and class name, or they
            differ in them.
    """
    if not any(mark in prompt for prompt in prompts for mark in PLACEHOLDERS):
        return tuple(prompts)
    taught = {taught_subject(header) for header in headers}
    subject = taught.pop() if len(taught) == 1 else None
    if subject is None:
        raise ValueError(
            "{token} and {class} are filled in from the LoRA, and here there is none that "
            "names them, or several that differ: write the words themselves into the prompts"
        )
    return tuple(filled_prompt(prompt, subject) for prompt in prompts)
