"""Texts with answers in them: the loss on the answers alone, and answers that are generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100
"""The label of a token whose prediction does not count."""


def use_padding(tokenizer: Any) -> None:
    """Give a tokenizer without a padding token one: what it has for unknown words, or the end."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def encode_answer(tokenizer: Any, prompt: str, answer: str, max_tokens: int) -> dict[str, Tensor]:
    """Token numbers and labels of a prompt and its answer, which ends with the end-of-text token.

    A text that is too long loses the beginning of its prompt.

    Raises:
        ValueError: if the answer alone is too long.
    """
    before = tokenizer(prompt)["input_ids"]
    if before and before[-1] == tokenizer.eos_token_id:
        before = before[:-1]
    after = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    if len(after) >= max_tokens:
        raise ValueError(
            f"an answer has {len(after)} tokens, which leaves nothing of max_tokens={max_tokens} "
            f"for its prompt: {answer[:60]!r}"
        )
    before = before[-(max_tokens - len(after)) :]
    return {
        "input_ids": torch.tensor(before + after),
        "labels": torch.tensor([IGNORED] * len(before) + after),
    }


def collate_answers(samples: Sequence[Mapping[str, Tensor]], padding: int) -> dict[str, Tensor]:
    """A batch of what :func:`encode_answer` gives, padded to the right."""
    ids = pad_sequence([s["input_ids"] for s in samples], True, padding)
    labels = pad_sequence([s["labels"] for s in samples], True, IGNORED)
    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def generate_answers(
    model: nn.Module, batch: Mapping[str, Any], tokenizer: Any, **options: Any
) -> tuple[list[str], list[str], list[str]]:
    """Prompts, the answers that are expected, and those that the model generates.

    Args:
        model: With ``generate``.
        batch: With ``input_ids``, ``attention_mask`` and ``labels`` (samples, tokens), padded to
            the right or left. The prompt of a sample is all before its first label.
        tokenizer: Of the model.
        options: Of ``generate``.
    """
    labels = batch["labels"]
    inputs = prompts_of(batch, tokenizer.pad_token_id)
    options = {"pad_token_id": tokenizer.pad_token_id, "do_sample": False, **options}
    written = model.generate(**inputs, **options)  # pyright: ignore[reportCallIssue]
    written = written[:, inputs["input_ids"].shape[1] :]
    expected = [first_answer(row) for row in labels]
    prompts = [row[m.bool()] for row, m in zip(inputs["input_ids"], inputs["attention_mask"])]
    decode = [
        [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        for rows in (prompts, expected, written)
    ]
    return decode[0], decode[1], decode[2]


def prompts_of(batch: Mapping[str, Any], padding: int) -> dict[str, Any]:
    """The batch without answers: what has a number for each token is padded to the left."""
    labels, mask = batch["labels"], batch["attention_mask"]
    size = tuple(labels.shape)
    ends = [int((row != IGNORED).nonzero()[0]) for row in labels]
    starts = [int(row.nonzero()[0]) for row in mask]
    width = max(end - start for start, end in zip(starts, ends))
    found = {}
    for name, value in batch.items():
        if name == "labels":
            continue
        by_token = isinstance(value, Tensor) and not value.is_floating_point()
        if not by_token or tuple(value.shape[:2]) != size:
            found[name] = value
            continue
        fill = padding if name == "input_ids" else 0
        cut = value.new_full((size[0], width, *value.shape[2:]), fill)
        for i, (start, end) in enumerate(zip(starts, ends)):
            cut[i, width - (end - start) :] = value[i, start:end]
        found[name] = cut
    return found


def first_answer(labels: Tensor) -> Tensor:
    """The tokens of the first answer in a row of labels."""
    counts = labels != IGNORED
    start = int(counts.nonzero()[0])
    rest = (~counts[start:]).nonzero()
    return labels[start : start + int(rest[0])] if len(rest) else labels[start:]
