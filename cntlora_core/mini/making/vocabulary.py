"""A small byte-pair vocabulary in CLIP's format, learnt from words and their counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

__all__ = ["END", "START", "byte_letters", "learn_merges", "save_tokenizer"]

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def byte_letters() -> dict[int, str]:
    """CLIP's (GPT-2's) printable letter for each byte, in CLIP's order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(plain))
    return letters


def learn_merges(counts: Mapping[str, int], whole: list[str], limit: int) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first.

    Args:
        counts: word -> how often it occurs; ASCII, lower case.
        whole: words to make one token each, whatever their count, in this order.
        limit: stop at so many merges (those that ``whole`` needs come on top).

    Returns:
        Pairs in order of application.
    """
    words = {word: ([*word[:-1], word[-1] + _WORD_END], n) for word, n in counts.items()}
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, n in words.values():
            for pair in pairwise(parts):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, (parts, n) in words.items():
            words[word] = (_apply(parts, best), n)
    for word in whole:
        parts = [*word[:-1], word[-1] + _WORD_END]
        for pair in merges:
            parts = _apply(parts, pair)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = _apply(parts, merges[-1])
    return merges


def _apply(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged, at = [], 0
    while at < len(parts):
        if at + 1 < len(parts) and (parts[at], parts[at + 1]) == pair:
            merged.append(parts[at] + parts[at + 1])
            at += 2
        else:
            merged.append(parts[at])
            at += 1
    return merged


def save_tokenizer(folder: Path, merges: list[tuple[str, str]]) -> int:
    """Write ``vocab.json``, ``merges.txt`` and the configs as CLIP has them; returns the size."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = list(byte_letters().values())
    tokens = letters + [letter + _WORD_END for letter in letters]
    for first, second in merges:
        if first + second not in tokens:
            tokens.append(first + second)
    tokens += [START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return len(vocabulary)
