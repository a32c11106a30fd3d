"""Folders of generated images, each with its prompt, and prompt files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cntlora_core.data.captions import SubjectPrompts
from cntlora_core.data.photos import load_photos
from cntlora_core.data.prompts import filled_prompt
from cntlora_core.diffusion.sampler import LoRAUse
from cntlora_core.runtime.files import write_json_atomic
from cntlora_core.runtime.reading import read_json_object, reading, require_file, user_path

PROMPTS_NAME = "prompts.json"
"""In a folder of pictures: an object with the prompt of each file, and its LoRAs where known."""


@dataclass(frozen=True, eq=False)
class PromptedPictures:
    """Generated pictures.

    Attributes:
        pictures: In the order of their names.
        prompts: One for each, or None where they are not known.
        notes: What a person should know of the files.
    """

    pictures: tuple[Image.Image, ...]
    prompts: tuple[str, ...] | None
    notes: tuple[str, ...] = ()


def read_pictures(folder: str | Path, prompt: str | None = None) -> PromptedPictures:
    """The pictures of a folder and their prompts.

    A prompt is taken from ``prompts.json``, which ``cntlora sample`` writes, else from a text file
    of the same name beside the picture, else it is ``prompt``.

    Args:
        folder: The folder.
        prompt: That of all pictures that have none of their own.

    Raises:
        OSError, ValueError: for a folder without pictures, or where some have a prompt and others
            have none.
    """
    found = load_photos(folder)
    listed = _listed(Path(folder))
    prompts = [
        listed.get(photo.path.name if photo.path else "") or photo.caption or prompt
        for photo in found.photos
    ]
    images = tuple(photo.image for photo in found.photos)
    notes = tuple(f"skipped {skipped.path.name}: {skipped.reason}" for skipped in found.skipped)
    if not any(prompts):
        return PromptedPictures(images, None, notes)
    for photo, text in zip(found.photos, prompts, strict=True):
        if not text:
            raise ValueError(
                f"{photo.path} has no prompt, though others have: add it to {PROMPTS_NAME} or put "
                "it into a text file of the same name"
            )
    return PromptedPictures(images, tuple(str(text) for text in prompts), notes)


def write_prompts(
    folder: Path, prompts: Mapping[str, str], loras: Sequence[LoRAUse] | None = None
) -> None:
    """Add to the prompts of a folder's pictures, in ``prompts.json``, by their file names.

    Args:
        folder: The folder.
        prompts: Of the pictures that are added.
        loras: What they were generated with, which is then noted with each prompt.
    """
    new: dict[str, Any] = dict(prompts)
    if loras is not None:
        used = [{"file": str(lora.path), "strength": lora.strength} for lora in loras]
        new = {name: {"prompt": prompt, "loras": used} for name, prompt in prompts.items()}
    write_json_atomic(folder / PROMPTS_NAME, {**_entries(folder), **new})


def _listed(folder: Path) -> dict[str, str]:
    return {
        name: entry if isinstance(entry, str) else entry["prompt"]
        for name, entry in _entries(folder).items()
    }


def _entries(folder: Path) -> dict[str, Any]:
    """By the names of pictures: their prompts, or objects with these and LoRAs."""
    path = folder / PROMPTS_NAME
    if not path.is_file():
        return {}
    content = read_json_object(path)
    for entry in content.values():
        prompt = entry.get("prompt") if isinstance(entry, dict) else entry
        if not isinstance(prompt, str):
            raise ValueError(f'{path} should hold an object such as {{"dog-0.png": "a dog"}}')
    return content


def read_prompts(texts: Sequence[str], subject: SubjectPrompts | None) -> tuple[str, ...]:
    """Prompts as they were given, or the lines of files that were given, filled in.

    Args:
        texts: Prompts, and names of text files with a prompt in each line.
        subject: Fills in ``{token}`` and ``{class}``, and ``{}`` for both.

    Raises:
        ValueError: a placeholder without a value, or no prompt.
        OSError: a file cannot be read.
    """
    prompts: list[str] = []
    for text in texts:
        lines = _lines(user_path(text)) if text.endswith(".txt") else [text]
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("there are no prompts: give some, or a text file with one in each line")
    return tuple(filled_prompt(prompt, subject) for prompt in prompts)


def _lines(path: Path) -> list[str]:
    require_file(path, "a text file with a prompt in each line")
    with reading(path, "a text file", "Save it as UTF-8."):
        return path.read_text("utf-8-sig").splitlines()
