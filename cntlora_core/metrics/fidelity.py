"""DreamBooth's protocol (arXiv 2208.12242, section 4.2): subject fidelity and prompt fidelity.

DINO and CLIP-I are the mean cosine between every generated and every real picture of the subject,
CLIP-T is the mean cosine between a generated picture and its prompt. The token means nothing to
CLIP, so it is left out of the prompt: "a photo of sks dog" counts as "a photo of dog".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cntlora_core.metrics.encoders import Encoders
from cntlora_core.runtime.progress import Reporter, silent

NAMES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}


@dataclass(frozen=True)
class PromptFidelity:
    """The pictures of one prompt; cosines in [-1, 1].

    Attributes:
        prompt: As the pictures were generated with.
        pictures: How many.
        dino: Mean cosine with the real pictures, by DINO's features.
        clip_i: The same by CLIP's.
        clip_t: Mean cosine with the prompt.
    """

    prompt: str
    pictures: int
    dino: float
    clip_i: float
    clip_t: float


@dataclass(frozen=True)
class Fidelity:
    """One set of pictures; cosines in [-1, 1], means over pictures.

    Attributes:
        label: What was measured.
        pictures: How many.
        dino: Subject fidelity by DINO's features.
        clip_i: Subject fidelity by CLIP's features.
        clip_t: Prompt fidelity; None where no prompts are known.
        by_prompt: The same for each prompt, in the order of first use.
        notes: What a person should know.
    """

    label: str
    pictures: int
    dino: float
    clip_i: float
    clip_t: float | None
    by_prompt: tuple[PromptFidelity, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class SubjectFeatures:
    """The real pictures as the encoders see them: rows of length 1, (n, d) each."""

    dino: Tensor
    clip: Tensor


def mean_pairwise_cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine over all pairs of a row of (n, d) with a row of (m, d); rows of length 1."""
    return (first.double() @ second.double().T).mean().item()


def mean_cosine_among(rows: Tensor) -> float | None:
    """Mean cosine over all pairs of two different rows of (n, d); None for a single row."""
    count = len(rows)
    if count < 2:
        return None
    cosines = rows.double() @ rows.double().T
    return ((cosines.sum() - cosines.trace()) / (count * (count - 1))).item()


def mean_paired_cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine of each row of (n, d) with the row of (n, d) at its place."""
    return (first.double() * second.double()).sum(1).mean().item()


def without_token(prompt: str, token: str | None) -> str:
    """The prompt as CLIP is to read it: without the word that only the LoRA knows."""
    if not token:
        return prompt
    found = re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", " ", prompt, flags=re.IGNORECASE)
    return " ".join(found.split()) or prompt


def subject_features(
    encoders: Encoders, photos: Sequence[Image.Image], reporter: Reporter = silent
) -> SubjectFeatures:
    """Look at the real pictures once.

    Raises:
        ValueError: there are none.
    """
    if not photos:
        raise ValueError("there are no photos of the subject to compare with")
    return SubjectFeatures(
        encoders.dino.encode_images(photos, reporter), encoders.clip.encode_images(photos, reporter)
    )


def measure(
    encoders: Encoders,
    subject: SubjectFeatures,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str] | None,
    *,
    token: str | None = None,
    label: str = "pictures",
    reporter: Reporter = silent,
) -> Fidelity:
    """Subject fidelity and, with prompts, prompt fidelity of generated pictures.

    Args:
        encoders: What measures.
        subject: The real pictures, see :func:`subject_features`.
        pictures: Generated ones.
        prompts: One for each picture, or None.
        token: The word that stands for the subject, left out of the prompts.
        label: What is measured, for people.
        reporter: Told of the pictures looked at.

    Raises:
        ValueError: no pictures, or another number of prompts than of pictures.
    """
    if not pictures:
        raise ValueError("there are no generated pictures to measure")
    if prompts is not None and len(prompts) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures but {len(prompts)} prompts: give one for each")
    dino = encoders.dino.encode_images(pictures, reporter)
    clip = encoders.clip.encode_images(pictures, reporter)
    whole_dino = mean_pairwise_cosine(dino, subject.dino)
    whole_clip = mean_pairwise_cosine(clip, subject.clip)
    notes = encoders.notes(pictures)
    if prompts is None:
        return Fidelity(label, len(pictures), whole_dino, whole_clip, None, notes=notes)
    different = list(dict.fromkeys(prompts))
    texts, cut = encoders.clip.encode_prompts([without_token(p, token) for p in different])
    rows = torch.tensor([different.index(prompt) for prompt in prompts])
    by_prompt = tuple(
        PromptFidelity(
            prompt,
            int(chosen.sum()),
            mean_pairwise_cosine(dino[chosen], subject.dino),
            mean_pairwise_cosine(clip[chosen], subject.clip),
            mean_pairwise_cosine(clip[chosen], texts[i : i + 1]),
        )
        for i, prompt in enumerate(different)
        for chosen in [rows == i]
    )
    clip_t = mean_paired_cosine(clip, texts[rows])
    return Fidelity(label, len(pictures), whole_dino, whole_clip, clip_t, by_prompt, (*notes, *cut))


def measure_photos_under(
    encoders: Encoders, subject: SubjectFeatures, prompts: Sequence[str], token: str | None = None
) -> float:
    """CLIP-T of the real pictures under prompts: what is scored without following any of them.

    Args:
        encoders: What measures.
        subject: The real pictures.
        prompts: Each goes with every picture.
        token: The word that stands for the subject, left out of the prompts.
    """
    texts, _ = encoders.clip.encode_prompts([without_token(p, token) for p in prompts])
    return mean_pairwise_cosine(subject.clip, texts)


def measure_photos(
    subject: SubjectFeatures, label: str = "the photos themselves"
) -> Fidelity | None:
    """What the real pictures score against one another: about the most that can be reached.

    Returns:
        None where there is only one.
    """
    dino, clip = mean_cosine_among(subject.dino), mean_cosine_among(subject.clip)
    if dino is None or clip is None:
        return None
    return Fidelity(label, len(subject.dino), dino, clip, None)
