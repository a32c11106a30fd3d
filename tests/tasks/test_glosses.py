"""The gloss task: WordNet's format, batches, training; and on the real data where it is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

from cntlora_core.tasks import glosses
from cntlora_core.tasks.glosses import (
    CATEGORIES,
    Gloss,
    GlossClassifier,
    GlossTask,
    find_encoder,
    find_wordnet,
    load_gloss_task,
    read_glosses,
)

SUBJECTS = {5: "a small furry animal", 6: "a tool made of iron", 20: "a tall green plant"}
WORDS = sorted({word for text in SUBJECTS.values() for word in text.split()} | {"of", "kind"})


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    """A file in WordNet's format: 60 nouns of 3 categories."""
    folder = tmp_path / "word net"
    folder.mkdir()
    lines = [
        "  1 This software and database is being provided to you, the LICENSEE | under licence"
    ]
    for i in range(60):
        number, text = list(SUBJECTS.items())[i % 3]
        gloss = f'{text} of kind {i}; "we saw a {i} | there"'
        lines.append(f"{i:08d} {number:02d} n 01 thing_{i} 0 001 @ 00000000 n 0000 | {gloss}  ")
    (folder / "data.noun").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(str(folder))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def task(encoder: Path, wordnet: Path) -> GlossTask:
    return load_gloss_task(encoder=encoder, wordnet=wordnet, train=40, validation=20, batch_size=16)


def test_definitions_and_categories_are_read_without_examples(wordnet: Path):
    found = read_glosses(wordnet)
    assert len(found) == 60
    assert found[0] == Gloss("a small furry animal of kind 0", "noun.animal")
    assert found[2].category == "noun.plant"
    assert len(CATEGORIES) == 45


@pytest.mark.parametrize("line", ["rubbish", "00 99 n x | text", "00 05 n x text"])
def test_a_file_of_another_kind_is_refused(wordnet: Path, line: str):
    (wordnet / "data.noun").write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1 is no line of WordNet's"):
        read_glosses(wordnet)


def test_wordnet_is_found_or_asked_for(wordnet: Path, monkeypatch: Any, tmp_path: Path):
    monkeypatch.setattr(glosses, "_USUAL_FOLDERS", (str(tmp_path / "none"),))
    monkeypatch.delenv("WNHOME", raising=False)
    monkeypatch.setenv("WNSEARCHDIR", str(wordnet))
    assert find_wordnet() == wordnet
    monkeypatch.delenv("WNSEARCHDIR")
    with pytest.raises(FileNotFoundError, match="apt-get install wordnet-base"):
        find_wordnet()


def test_batches_hold_each_sampled_gloss_once(task: GlossTask):
    assert task.categories == ("noun.animal", "noun.artifact", "noun.plant")
    assert [len(batch["labels"]) for batch in task.batches] == [16, 16, 8]
    assert sum(len(batch["labels"]) for batch in task.validation) == 20
    with pytest.raises(ValueError, match="together they can be 60"):
        load_gloss_task(encoder=task.encoder, wordnet=task.encoder.parent / "word net", train=60)


def test_long_glosses_are_cut(encoder: Path, wordnet: Path):
    cut = load_gloss_task(encoder=encoder, wordnet=wordnet, train=4, validation=4, longest=5)
    assert {b["input_ids"].shape[1] for b in (*cut.batches, *cut.validation)} == {5}


def test_padding_changes_nothing(task: GlossTask):
    model = task.new_model().eval()
    batch = {k: v[:1] for k, v in task.batches[0].items() if k != "labels"}
    padded = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in batch.items()}
    torch.testing.assert_close(model(**padded)["logits"], model(**batch)["logits"])


def test_training_learns_repeats_exactly_and_leaves_the_encoder_alone(task: GlossTask):
    lora = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["head"])
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = get_peft_model(task.new_model(), lora)  # pyright: ignore[reportArgumentType]
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        before = task.evaluate(model)
        learning_rates = {"learning_rate": 5e-3, "head_learning_rate": 0.05}
        found.append(list(task.train(model, steps=30, evaluate_at=(15, 30), **learning_rates)))
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert found[0] == found[1]
    assert [evaluation.step for evaluation in found[0]] == [15, 30]
    assert found[0][-1].loss < 0.7 * before.loss
    assert found[0][-1].accuracy > before.accuracy


def test_the_validation_loss_is_the_mean_over_glosses(task: GlossTask):
    model = task.new_model().eval()
    assert isinstance(model, GlossClassifier)
    losses = []
    for batch in task.validation:
        logits = model(batch["input_ids"], batch["attention_mask"])["logits"].detach()
        losses.append(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"))
    assert task.evaluate(model).loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_all_of_wordnet():
    try:
        folder = find_wordnet()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    everything = read_glosses(folder, ("noun", "verb", "adj", "adv"))
    assert len(everything) > 117_000
    assert {gloss.category for gloss in everything} == set(CATEGORIES)
    nouns = read_glosses(folder)
    assert len({gloss.category for gloss in nouns}) == 26
    assert all(gloss.text for gloss in nouns)


def test_the_real_encoder_learns_real_glosses_from_a_data_driven_initialisation():
    try:
        find_encoder()
        find_wordnet()
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(str(error))
    from cntlora_core import CNTLoRAConfig, get_cntlora_model

    task = load_gloss_task(train=128, validation=32, batch_size=8)
    assert len(task.categories) == 26
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "key", "value"], modules_to_save=["head"]
    )
    model = get_cntlora_model(task.new_model(), lora, CNTLoRAConfig(), task.batches[:4])
    before = task.evaluate(model)
    (after,) = task.train(model, steps=8, evaluate_at=(8,))
    assert after.loss < before.loss
