"""The problems of the study: model, data and metric, all of them small and at hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ViTForImageClassification

from cntlora_core import mini
from cntlora_core.mini.making.evaluate import as_batch
from cntlora_core.tasks.chat import SentenceEncoder
from cntlora_core.tasks.glosses import find_encoder, load_gloss_task
from cntlora_core.tasks.images import open_picture
from cntlora_core.tasks.recipes import VisionSettings
from cntlora_core.tasks.settings import Plan, Preset
from cntlora_core.tasks.text import score_classes
from cntlora_core.tasks.trainer import Task
from cntlora_core.tasks.vision import HEAD_DEVIATION, collate_pictures, vision_task

if TYPE_CHECKING:
    from cntlora_core.mini.making.sprites import SpriteSource


@dataclass(frozen=True)
class Folders:
    """Of data that no package ships.

    Attributes:
        drawings: ``node_modules`` with the emoji.
        llava: The small LLaVA.
    """

    drawings: Path | None = None
    llava: Path | None = None


ATTENTION = ("query", "key", "value", "q_proj", "k_proj", "v_proj")
Make = Callable[[Plan, int, int, Folders], Task]


@dataclass(frozen=True)
class Problem:
    """One problem at several amounts of data.

    Attributes:
        make: ``make(plan, size, seed, folders)``, a fresh model with data.
        preset: Settings of its source, for the method's own to go into.
        sizes: Numbers of training samples, and the steps for each.
        dynamics: Whether the training's dynamics are recorded.
    """

    make: Make
    preset: Preset
    sizes: Mapping[int, int]
    dynamics: bool = False


def glosses(_plan: Plan, size: int, seed: int, _folders: Folders) -> Task:
    """WordNet's definitions of nouns to their 26 categories, on a pre-trained text encoder."""
    found = load_gloss_task(train=size, validation=512, seed=seed, batch_size=1, longest=20)
    return Task(
        name=f"{size} glosses",
        model=found.new_model(seed),
        train=found.batches,
        splits={"validation": sorted(found.validation, key=lambda b: b["input_ids"].shape[1])},
        collate=_padded,
        measure=_measure_glosses,
        score=score_classes,
        best="accuracy",
    )


def style(plan: Plan, size: int, seed: int, folders: Folders) -> Task:
    """Names of objects in a style of drawing that the small image encoder never saw."""
    from cntlora_core.mini.making.object_classes import OBJECT_CLASSES

    source = _drawings(folders)
    drawn = [c.emoji[0] for c in OBJECT_CLASSES if source.path("3d", c.emoji[0]).is_file()]
    rng = np.random.default_rng(seed)
    shown = rng.choice(drawn, size=60, replace=False)
    sprites = [source.sprite("3d", emoji) for emoji in shown]
    splits = {
        name: [(_composed(sprites[i % len(sprites)], rng), i % len(sprites)) for i in range(count)]
        for name, count in (("train", size), ("validation", 4 * len(sprites)))
    }
    return _vision(plan, f"{size} images in a new style", splits, len(sprites), seed)


def digits(plan: Plan, size: int, seed: int, _folders: Folders) -> Task:
    """scikit-learn's handwritten digits, enlarged."""
    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))

    def pictures(chosen: Sequence[int]) -> list[tuple[Image.Image, int]]:
        grey = [(images[i].reshape(8, 8) / 16 * 255).astype(np.uint8) for i in chosen]
        enlarged = [Image.fromarray(g).resize((32, 32), Image.Resampling.BICUBIC) for g in grey]
        return [(p.convert("RGB"), int(labels[i])) for p, i in zip(enlarged, chosen, strict=True)]

    splits = {
        "train": pictures(order[:size].tolist()),
        "validation": pictures(order[-500:].tolist()),
    }
    return _vision(plan, f"{size} digits", splits, 10, seed)


def subject(_plan: Plan, size: int, seed: int, folders: Folders) -> Task:
    """A subject's name, to be said of its pictures and of no others, by a small LLaVA."""
    from cntlora_core.benchmark.tasks.small_llava import load_llava

    model, tokenizer = load_llava(folders.llava or Path("llava"))
    names = mini.subjects()
    chosen = names[seed % len(names)]
    photos = _captioned(chosen)[:size]
    others = [row for name in names if name != chosen for row in _captioned(name, held_out=True)]
    plain = [(picture, caption.replace("sks ", "")) for picture, caption in others]
    return Task(
        name=f"the name of a {chosen}",
        model=model,
        train=photos,
        splits={"validation": [*_captioned(chosen, held_out=True), *plain]},
        collate=_Captions(tokenizer),
        measure=_Describing(tokenizer, SentenceEncoder(str(find_encoder())), _judge_naming),
        score=_score_naming,
        best="accuracy",
    )


def captions(_plan: Plan, size: int, seed: int, folders: Folders) -> Task:
    """Captions of the drawings in a style that the small LLaVA never saw."""
    from cntlora_core.benchmark.tasks.small_llava import compose_captioned, load_llava
    from cntlora_core.mini.making.collage import Collage
    from cntlora_core.mini.making.train_clip import ClipSet

    model, tokenizer = load_llava(folders.llava or Path("llava"))
    known = ClipSet(_drawings(folders), kept_out=True)
    collage = Collage(known.sprites, known.backgrounds, seed)
    splits = {}
    for name, count in (("train", size), ("validation", 200)):
        rng = np.random.default_rng((seed, count))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of what a collage does with its objects
            pictures, texts = compose_captioned(known, collage, rng, count)
        splits[name] = list(zip(pictures, texts, strict=True))
    return Task(
        name=f"captions of {size} images in a new style",
        model=model,
        train=splits["train"],
        splits={"validation": splits["validation"]},
        collate=_Captions(tokenizer),
        measure=_Describing(tokenizer, SentenceEncoder(str(find_encoder())), _judge_captions),
        score=_score_captions,
        best="accuracy",
    )


_TEXT = Preset(
    source="as the recipe of GLUE: LoRA's settings for RoBERTa-large (arXiv 2106.09685, table 9)",
    model="all-MiniLM-L6-v2",
    data="WordNet 3.0",
    targets=ATTENTION,
    head=("head",),
    rank=16,
    alpha=32.0,
    learning_rate=3e-4,
    warmup=0.06,
    batch_size=16,
)
_VISION = Preset(
    source="as the recipe of VTAB-1K (ConsNoTrainLoRA, supplement), without its weight decay",
    model="the small image encoder",
    data="",
    targets=(*ATTENTION, "dense", "o_proj", "fc1", "fc2"),
    head=("classifier",),
    rank=8,
    alpha=16.0,
    bias="all",
    learning_rate=5e-4,
    schedule="cosine",
    warmup=0.1,
    batch_size=16,
    options={"image_size": 64},
)

_NAMING = Preset(
    source="as the recipe of myVLM (ConsNoTrainLoRA, supplement), without its batch of 8",
    model="the small LLaVA",
    data="",
    targets=r".*(vision_tower.*|language_model.*)\.(q_proj|k_proj|v_proj|gate_proj|up_proj|down_proj)",
    rank=16,
    alpha=32.0,
    learning_rate=2e-4,
    batch_size=5,
)

PROBLEMS: Mapping[str, Problem] = {
    "glosses": Problem(glosses, _TEXT, {320: 60, 960: 90, 2880: 140}),
    "style": Problem(style, _VISION, {120: 60}),
    "subject": Problem(subject, _NAMING, {5: 60}),
    "captions": Problem(
        captions, dataclasses.replace(_NAMING, batch_size=8), {1200: 150}, dynamics=True
    ),
    "digits": Problem(digits, _VISION, {100: 100, 400: 150}),
}


def _vision(plan: Plan, name: str, splits: Mapping[str, Any], classes: int, seed: int) -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification.from_pretrained(
            mini.encoder_path("vision"),
            num_labels=classes,
            dtype=torch.float32,  # the file's is float16
            local_files_only=True,
        )
        nn.init.normal_(model.classifier.weight, std=HEAD_DEVIATION)
        nn.init.zeros_(model.classifier.bias)
    settings = VisionSettings(output=plan.settings.output)
    task = vision_task(plan, settings, model=model, data=splits, transform=_pixels)
    return Task(**{**vars(task), "name": name, "collate": _any_size})


def _any_size(samples: list[tuple[Tensor, int]]) -> Mapping[str, Any]:
    """A batch for an encoder whose position embeddings are those of another size."""
    return {**collate_pictures(samples), "interpolate_pos_encoding": True}


def _pixels(picture: Image.Image) -> Tensor:
    """float32 (3, h, w) from -1 to 1, as the encoder was trained."""
    return as_batch([picture])[0].contiguous()


def _as_pixels(picture: Image.Image | Tensor) -> Tensor:
    return picture if isinstance(picture, Tensor) else _pixels(picture.resize((64, 64)))


def _drawings(folders: Folders) -> SpriteSource:
    from cntlora_core.mini.making.sprites import SpriteSource

    if folders.drawings is None:
        raise ValueError(
            "the drawings are missing: python -m cntlora_core.mini.making.fetch --cache FOLDER, "
            "then --drawings FOLDER/node_modules"
        )
    return SpriteSource(folders.drawings)


def _composed(sprite: Image.Image, rng: np.random.Generator) -> Image.Image:
    """An object on any background, at any place."""
    from cntlora_core.mini.making.compose import Placement, any_background, paste, render_background

    image = render_background(any_background(rng), rng, 64)
    extent = rng.uniform(0.5, 0.9)
    slack = (1 - extent) / 2
    centre = (0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack))
    paste(image, sprite, Placement(extent, centre, rng.uniform(-15, 15), rng.random() < 0.5))
    return Image.fromarray(np.clip(image.round(), 0, 255).astype(np.uint8))


def _padded(samples: list[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Batches of one, joined: shorter ones are filled up with padding (0)."""
    batch: dict[str, Tensor] = {}
    for name in ("input_ids", "attention_mask"):
        rows = [sample[name][0] for sample in samples]
        batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {**batch, "labels": torch.cat([sample["labels"] for sample in samples])}


def _measure_glosses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
    found = model(**batch)
    return found["loss"], torch.cat([found["logits"], batch["labels"][:, None].float()], dim=1)


def _captioned(name: str, held_out: bool = False) -> list[tuple[Image.Image, str]]:
    """A subject's pictures with captions that name it and the background."""
    known = mini.subject(name)
    kind, folder = ("held_out", known.held_out) if held_out else ("photos", known.photos)
    table = json.loads((folder.parents[1] / "subjects.json").read_text("utf-8"))["subjects"][name]
    return [(open_picture(folder / f"{i}.png"), text) for i, text in enumerate(table[kind])]


@dataclass(frozen=True)
class _Captions:
    tokenizer: Any

    def __call__(self, samples: list[tuple[Image.Image | Tensor, str]]) -> Mapping[str, Tensor]:
        from cntlora_core.benchmark.tasks.small_llava import encode

        pictures, captions = zip(*samples, strict=True)
        return {
            **encode(self.tokenizer, captions),
            "pixel_values": torch.stack([_as_pixels(p) for p in pictures]),
        }


@dataclass(frozen=True)
class _Describing:
    """Rows of what `judge` says of the captions told and wanted, and of SentSim: the cosine of the
    features of both."""

    tokenizer: Any
    sentences: SentenceEncoder
    judge: Callable[[str, str], tuple[bool, bool]]

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        from cntlora_core.benchmark.tasks.small_llava import describe

        _, wanted, told = describe(model, self.tokenizer, batch)
        judged = torch.tensor([self.judge(*pair) for pair in zip(told, wanted, strict=True)])
        alike = (self.sentences(told) * self.sentences(wanted)).sum(dim=1, keepdim=True)
        return model(**batch).loss, torch.cat([judged.float(), alike], dim=1)


def _judge_naming(told: str, wanted: str) -> tuple[bool, bool]:
    """Whether the name was said, and whether it should have been."""
    return "sks" in told.split(), "sks" in wanted.split()


def _judge_captions(told: str, wanted: str) -> tuple[bool, bool]:
    """Whether a caption is right word by word, and whether its object is."""
    return told == wanted, told.split()[:5] == wanted.split()[:5]


def _score_captions(rows: np.ndarray) -> dict[str, float]:
    """The share of captions that are right, of objects that are, and the mean SentSim."""
    whole, named, alike = (float(v) for v in rows.mean(axis=0))
    return {"accuracy": whole, "object": named, "sentsim": alike}


def _score_naming(rows: np.ndarray) -> dict[str, float]:
    """Recall of the name on the subject, its absence on others, the mean of the two, and SentSim
    of the captions."""
    said, is_subject = rows[:, 0], rows[:, 1] > 0
    recall, absence = float(said[is_subject].mean()), 1 - float(said[~is_subject].mean())
    return {
        "accuracy": (recall + absence) / 2,
        "recall": recall,
        "absence": absence,
        "sentsim": float(rows[is_subject, 2].mean()),
        "sentsim_others": float(rows[~is_subject, 2].mean()),
    }
