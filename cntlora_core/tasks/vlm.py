"""Vision-language models: personalised captions, product descriptions, instructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.runtime.reading import read_json_object, user_path
from cntlora_core.tasks.answers import generate_answers
from cntlora_core.tasks.chat import Chat, Conversation, SentenceEncoder, chat_of, load_chat
from cntlora_core.tasks.data import (
    TableFormat,
    at_most,
    read_records,
    read_tables,
    require_columns,
    require_picture,
    shuffled,
)
from cntlora_core.tasks.loading import load_model
from cntlora_core.tasks.presets import VLM
from cntlora_core.tasks.recipes import VlmSettings
from cntlora_core.tasks.run import TaskResult, run_task
from cntlora_core.tasks.settings import Plan, planned, preset_named
from cntlora_core.tasks.trainer import Task

Encode = Callable[[Sequence[str]], Tensor]
"""Sentences to features of length 1, (n, d)."""

_APD = ("image", "Product Name", "Category", "description")


def train_vlm(
    settings: VlmSettings,
    reporter: Reporter = silent,
    *,
    model: nn.Module | None = None,
    processor: Any = None,
    data: Mapping[str, Sequence[Conversation]] | None = None,
    encode: Encode | None = None,
    **options: Any,
) -> TaskResult:
    """Fine-tune a vision-language model.

    Args:
        settings: All settings.
        reporter: Told of all long work.
        model: Instead of the one that the settings name.
        processor: Instead of the model's.
        data: Instead of the data that the settings name: conversations by split, ``train`` and,
            unless some are to be held out of it, one to measure on.
        encode: Instead of the sentence encoder that the settings name.
        options: See :func:`.run_task`.

    Raises:
        ValueError: for data of another form, naming the file, the column or the record.
        FileNotFoundError: if model, data or an image are not there.
    """
    plan = planned(settings, preset_named(VLM, settings.preset, "vlm"))
    task = vlm_task(plan, settings, model=model, processor=processor, data=data, encode=encode)
    return run_task(task, plan, reporter, **options)


def vlm_task(
    plan: Plan,
    settings: VlmSettings,
    *,
    model: nn.Module | None = None,
    processor: Any = None,
    data: Mapping[str, Sequence[Conversation]] | None = None,
    encode: Encode | None = None,
) -> Task:
    """Model, data and metric; see :func:`train_vlm`."""
    import transformers

    preset = plan.preset
    splits: dict[str, Any] = dict(data) if data is not None else _read(plan, settings)
    for name, conversations in splits.items():
        if not len(conversations):
            raise ValueError(f"split {name!r} is empty: there is no conversation in it")
    if len(splits) == 1:
        share = settings.held_out
        share = preset.options["held_out"] if share is None else share
        splits = held_out(splits["train"], share, settings.seed)
    most = settings.max_train or preset.options.get("max_train")
    splits["train"] = at_most(splits["train"], most, settings.seed)
    trusted = {"trust_remote_code": True} if settings.trust_remote_code else {}
    chat = chat_of(processor) if processor is not None else load_chat(preset.model, **trusted)
    base: Any = model
    if base is None:
        kind = preset.options.get("class", "AutoModelForImageTextToText")
        base = load_model(getattr(transformers, kind), plan, **trusted)
    named = settings.sentence_encoder
    named = preset.options["sentence_encoder"] if named is None else named
    if encode is None and named:
        encode = SentenceEncoder(named)
    generated: list[dict[str, Any]] = []
    return Task(
        name=settings.preset,
        model=base,
        train=splits["train"],
        splits={name: split for name, split in splits.items() if name != "train"},
        collate=chat,
        measure=_Measure(chat, encode, generated, settings.max_new_tokens),
        score=_score_similarity if encode is not None else _score_nothing,
        best="sentsim" if encode is not None else "loss",
        lower_is_better=encode is None,
        generated=generated,
    )


def held_out(conversations: Sequence[Conversation], share: float, seed: int) -> dict[str, Any]:
    """Training and validation conversations that have no image file in common.

    Raises:
        ValueError: if the share leaves one of both empty.
    """
    keys: list[Any] = list(range(len(conversations)))
    if not isinstance(conversations, _Products):  # each of which has an image of its own
        for i, conversation in enumerate(conversations):
            if isinstance(conversation.image, (str, Path)):
                keys[i] = str(conversation.image)
    distinct = list(dict.fromkeys(keys))
    count = round(share * len(distinct))
    if not 0 <= share < 1 or (share and not 0 < count < len(distinct)):
        raise ValueError(
            f"held_out={share} of {len(distinct)} images leaves none to train on or none to "
            "measure on"
        )
    if not count:
        return {"train": conversations}
    samples: Any = conversations
    kept = {distinct[i] for i in shuffled(len(distinct), seed)[:count]}
    return {
        "train": Subset(samples, [i for i, key in enumerate(keys) if key not in kept]),
        "validation": Subset(samples, [i for i, key in enumerate(keys) if key in kept]),
    }


def read_myvlm(source: str, prompt: str) -> list[Conversation]:
    """Personalised captions: a folder of concepts, or one concept.

    A concept's folder has images and ``captions_augmented.json`` or ``captions.json``, which maps
    an image's name to one caption or several.

    Raises:
        FileNotFoundError: if there are no captions, or an image is missing.
        ValueError: if a file holds something else.
    """
    root = user_path(source)
    names = ("captions_augmented.json", "captions.json")
    concepts = [root, *sorted(path for path in root.glob("*") if path.is_dir())]
    files = [
        found
        for folder in concepts
        if (found := next((folder / n for n in names if (folder / n).is_file()), None))
    ]
    if not files:
        raise FileNotFoundError(
            f"{root} holds no captions.json, nor does a folder in it: a folder for each concept is "
            "expected, with its images and captions.json"
        )
    conversations = []
    for file in files:
        for name, captions in read_json_object(file, "captions by image").items():
            image = require_picture(file.parent / name, str(file))
            for caption in [captions] if isinstance(captions, str) else captions:
                if not isinstance(caption, str) or not caption.strip():
                    raise ValueError(f"{file}: a caption of {name} is {caption!r}, not a sentence")
                conversations.append(Conversation(image, ((prompt, caption),)))
    return conversations


def read_products(source: str, prompt: str) -> dict[str, list[Conversation]]:
    """Amazon product descriptions: tables with image, name, category and description.

    Raises:
        ImportError, FileNotFoundError, ValueError: as :func:`.read_tables`, and if a column is
            missing.
    """
    try:
        prompt.format(product_name="", category="")
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"the prompt may name {{product_name}} and {{category}}, and no others: {prompt!r}"
        ) from error
    layout = TableFormat((), {"train": ("train",), "validation": ("validation", "test")})
    found = {}
    for split, rows in read_tables(source, layout).items():
        require_columns(rows, _APD, f"split {split!r} of {source}")
        found[split] = _Products(rows, prompt)
    return found


def read_instructions(source: str, images: str | None = None) -> list[Conversation]:
    """LLaVA-Instruct: a JSON list of records with ``image`` and ``conversations``.

    Args:
        source: The file, or a folder with one such file (``llava_instruct_150k.json`` where there
            are several).
        images: Folder of the images; default: that of the file.

    Raises:
        FileNotFoundError: if the file or an image is missing.
        ValueError: if a record is of another form, naming it.
    """
    root = user_path(source)
    file = root
    if root.is_dir():
        files = sorted(root.glob("*.json"))
        usual = root / "llava_instruct_150k.json"
        if not files or (len(files) > 1 and usual not in files):
            raise FileNotFoundError(
                f"{root} holds {len(files)} JSON files: give the one with the conversations"
            )
        file = usual if usual in files else files[0]
    folder = user_path(images) if images else file.parent
    conversations = []
    for i, record in enumerate(read_records(file)):
        where = f"{file}, record {i}"
        image = record.get("image")
        path = require_picture(folder / image, where) if image else None
        conversations.append(Conversation(path, _turns(record.get("conversations"), where)))
    return conversations


def _read(plan: Plan, settings: VlmSettings) -> dict[str, Any]:
    preset = plan.preset
    if not preset.data:
        raise ValueError(f"give data: the preset {settings.preset!r} reads a local folder")
    prompt = settings.prompt or preset.options.get("prompt", "")
    if settings.preset == "myvlm":
        return {"train": read_myvlm(preset.data, prompt)}
    if settings.preset == "apd":
        return dict(read_products(preset.data, prompt))
    return {"train": read_instructions(preset.data, settings.images)}


def _turns(said: Any, where: str) -> tuple[tuple[str, str], ...]:
    words = [(part.get("from"), part.get("value")) for part in said or () if isinstance(part, dict)]
    kinds = [kind for kind, _ in words]
    if not words or kinds != ["human", "gpt"] * (len(words) // 2) or len(words) % 2:
        raise ValueError(
            f"{where}: its conversations must alternate between human and gpt, and are {kinds}"
        )
    texts = [str(text).replace("<image>", "").strip() for _, text in words]
    return tuple(zip(texts[::2], texts[1::2], strict=True))


class _Products(Sequence[Conversation]):
    """Rows of a table, read when they are asked for."""

    def __init__(self, rows: Any, prompt: str) -> None:
        self.rows, self.prompt = rows, prompt

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        prompt = self.prompt.format(product_name=row["Product Name"], category=row["Category"])
        return Conversation(row["image"], ((prompt, row["description"]),))


@dataclass(frozen=True)
class _Measure:
    chat: Chat
    encode: Encode | None
    generated: list[dict[str, Any]]
    max_new_tokens: int

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
        loss = model(**batch).loss
        device = batch["input_ids"].device
        if self.encode is None:
            return loss, torch.zeros(len(batch["labels"]), 1, device=device)
        prompts, expected, written = generate_answers(
            model, batch, self.chat.tokenizer, max_new_tokens=self.max_new_tokens
        )
        similar = (self.encode(expected) * self.encode(written)).sum(1)
        self.generated.extend(
            {"prompt": p, "expected": e, "generated": w, "sentsim": float(s)}
            for p, e, w, s in zip(prompts, expected, written, similar, strict=True)
        )
        return loss, similar[:, None].to(device)


def _score_similarity(rows: np.ndarray) -> dict[str, float]:
    return {"sentsim": float(rows.mean())}


def _score_nothing(_rows: np.ndarray) -> dict[str, float]:
    return {}
