"""A model's tokenizer, checked."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPTextConfig, CLIPTokenizer

from cntlora_core.diffusion.checkpoint import read_json


def load_tokenizer(folder: Path, config: CLIPTextConfig) -> CLIPTokenizer:
    """The tokenizer in a folder.

    Args:
        folder: With vocab.json and merges.txt, or tokenizer.json.
        config: Of the text encoder that reads its tokens.

    Raises:
        Exception: What transformers raises over a file.
        ValueError: The files contradict each other, or the text encoder knows fewer tokens.
    """
    if not (folder / "tokenizer.json").is_file():
        vocabulary = read_json(folder / "vocab.json")
        if not vocabulary or not all(type(n) is int and n >= 0 for n in vocabulary.values()):
            raise ValueError("vocab.json does not map words to numbers")
        for line in (folder / "merges.txt").read_text("utf-8").splitlines():
            pair = [] if line.startswith("#version") else line.split()
            if pair and (len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys()):
                raise ValueError(f"merges.txt: {line[:50]!r} is no pair of its vocabulary")
    if (folder / "tokenizer_config.json").is_file():
        read_json(folder / "tokenizer_config.json")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < config.vocab_size:
        raise ValueError(
            f"its largest token is {largest}, and the text encoder knows {config.vocab_size}"
        )
    tokenizer("a photo", truncation=True, max_length=config.max_position_embeddings)
    return tokenizer
