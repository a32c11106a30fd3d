"""A pre-trained text encoder on dictionary definitions, as a network like the others."""

from __future__ import annotations

import dataclasses
import random

import torch

from cntlora_core.benchmark.lava.finetuning import Task
from cntlora_core.benchmark.lava.networks import TextNetwork
from cntlora_core.benchmark.lava.pictures import Pictures
from cntlora_core.benchmark.lava.settings import LavaBenchmark

_LENGTH = 24  # tokens; most definitions are shorter


def prepare_text_task(settings: LavaBenchmark) -> Task:
    """The task of docs/text.md, in batches of half as many definitions as there are pictures.

    Raises:
        FileNotFoundError, ImportError: encoder or WordNet are missing; says how to get them.
    """
    from transformers import AutoModel, AutoTokenizer

    from cntlora_core.tasks.glosses import find_encoder, find_wordnet, read_glosses

    folder = str(find_encoder())
    glosses = read_glosses(find_wordnet())
    categories = sorted({gloss.category for gloss in glosses})
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(0)
    network = TextNetwork(encoder, encoder.config.hidden_size, len(categories))
    tested = min(1000, 2 * settings.pictures)
    # Ten times as many as pictures: they are shorter, and of more classes.
    sizes = (10 * settings.pictures, tested // 2, tested)

    def sample(seed: int) -> Pictures:
        sampled = random.Random(seed).sample(glosses, sum(sizes))
        tokens = tokenizer(
            [gloss.text for gloss in sampled],
            padding="max_length",
            truncation=True,
            max_length=_LENGTH,
            return_tensors="pt",
        )["input_ids"]
        labels = torch.tensor([categories.index(gloss.category) for gloss in sampled])
        parts = list(zip(tokens.split(sizes), labels.split(sizes)))
        return Pictures(len(categories), *parts)

    smaller = dataclasses.replace(settings, batch=max(8, settings.batch // 2))
    return Task("minilm", network.eval(), smaller, sample=sample)
