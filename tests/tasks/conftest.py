"""Tiny random models of the true classes, with tokenizers made by hand."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEXT = "a the cat dog sat ran on mat red blue good bad is not big small it saw one two"
WORDS = TEXT.split()
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def make_tokenizer(*more: str, template: bool = True, **options) -> PreTrainedTokenizerFast:
    """Whole words, with RoBERTa's special tokens around a text or between two."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = {word: i for i, word in enumerate([*special, *WORDS, *more])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> </s> $B </s>",
            special_tokens=[("<s>", 0), ("</s>", 2)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
        **options,
    )


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    """What the library datasets writes stays out of the user's cache."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
    import sys

    if "datasets" in sys.modules:
        folder = tmp_path_factory.getbasetemp() / "datasets"
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)


@pytest.fixture(autouse=True)
def few_curves(request, monkeypatch):
    """A run draws its curves where a test looks at them: they are a third of a tiny run's time."""
    import sys

    run = sys.modules.get("cntlora_core.tasks.run")
    if run is not None and request.node.get_closest_marker("plots") is None:
        monkeypatch.setattr(run, "plot_curves", lambda *_: None)


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder that has no head for classes, and its tokenizer."""
    from transformers import RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp("tiny roberta")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=40,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SHAPE,
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder
