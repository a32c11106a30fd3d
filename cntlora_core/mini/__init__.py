"""The embedded small text-to-image model, its weights and its subjects (no torch import here)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MiniSubject", "encoder_path", "model_path", "subject", "subjects"]

_HERE = Path(__file__).resolve().parent
ENCODERS = ("clip", "vision")


@dataclass(frozen=True)
class MiniSubject:
    """One subject, in drawings that the small model never saw.

    Attributes:
        name: folder name, e.g. ``"dog"``.
        class_name: the noun that the model knows, e.g. ``"dog"``.
        token: the rare word that stands for this one subject.
        kind: ``"live"`` or ``"object"``.
        photos: folder of the training pictures.
        held_out: folder of the pictures kept for measuring.
        prompts: templates with ``{}`` where "token class_name" goes.
        held_out_captions: what the held-out pictures show, in their order.
    """

    name: str
    class_name: str
    token: str
    kind: str
    photos: Path
    held_out: Path
    prompts: tuple[str, ...]
    held_out_captions: tuple[str, ...]

    @property
    def instance_prompt(self) -> str:
        """The caption of the training pictures."""
        return f"a photo of a {self.token} {self.class_name}"

    @property
    def class_prompt(self) -> str:
        """The caption of the class (prior) pictures."""
        return f"a photo of {_article(self.class_name)} {self.class_name}"


def model_path() -> Path:
    """Folder of the small model, for ``StableDiffusionPipeline.from_pretrained``.

    Raises:
        FileNotFoundError: the package was installed without its weights.
    """
    path = _HERE / "model"
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"No model at {path}. The weights are package data; reinstall the package, or train "
            "them with the commands in cntlora_core/mini/README.md."
        )
    return path


def encoder_path(kind: str) -> Path:
    """Folder of one of the small encoders that measure images, for transformers' classes.

    Args:
        kind: ``"vision"``, a ViTModel whose first token stands for the picture; or ``"clip"``, a
            CLIPModel with its tokenizer.

    Raises:
        ValueError: there is no such kind.
        FileNotFoundError: the package was installed without its weights.
    """
    if kind not in ENCODERS:
        raise ValueError(f"No encoder {kind!r}; there are: {', '.join(ENCODERS)}")
    path = _HERE / "encoders" / kind
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"No encoder at {path}. The weights are package data; reinstall the package, or train "
            "them with the commands in cntlora_core/mini/README.md."
        )
    return path


def subjects() -> list[str]:
    """Names of the subjects, sorted."""
    return sorted(_subject_table()["subjects"])


def subject(name: str) -> MiniSubject:
    """Look one subject up.

    Raises:
        ValueError: no subject of that name; the message lists those there are.
    """
    table = _subject_table()
    if name not in table["subjects"]:
        known = ", ".join(sorted(table["subjects"]))
        raise ValueError(f"No subject {name!r}; there are: {known}")
    row = table["subjects"][name]
    folder = _HERE / "subjects" / name
    return MiniSubject(
        name=name,
        class_name=row["class_name"],
        token=row["token"],
        kind=row["kind"],
        photos=folder / "photos",
        held_out=folder / "held_out",
        prompts=tuple(table["prompts"][row["kind"]]),
        held_out_captions=tuple(row["held_out"]),
    )


def _subject_table() -> dict:
    path = _HERE / "subjects" / "subjects.json"
    if not path.is_file():
        raise FileNotFoundError(f"No subjects at {path}; see cntlora_core/mini/README.md.")
    return json.loads(path.read_text(encoding="utf-8"))


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" and not noun.startswith("uni") else "a"
