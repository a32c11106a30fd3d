"""The small LLaVA: what it reads, what its loss counts, and how naming a subject is scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import RobertaConfig, RobertaModel

from cntlora_core.benchmark.tasks import problems
from cntlora_core.benchmark.tasks.small_llava import (
    PATCHES,
    LlavaSettings,
    build_llava,
    build_tokenizer,
    describe,
    encode,
    load_llava,
)
from cntlora_core.mini.making import train_clip
from cntlora_core.mini.making.collage import every_background
from cntlora_core.mini.making.evaluate import as_batch
from cntlora_core.mini.making.object_classes import trained_classes
from cntlora_core.tasks.answers import IGNORED

from ..tasks.conftest import SHAPE, make_tokenizer


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    return build_llava(LlavaSettings(width=32, layers=1), tokenizer).eval(), tokenizer


def test_the_loss_counts_the_caption_alone(llava):
    model, tokenizer = llava
    batch = encode(tokenizer, ["a photo of a cat", "a photo of a dog on the beach"])
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image).sum(1).tolist() == [PATCHES, PATCHES]
    counted = [row[row != IGNORED] for row in batch["labels"]]
    assert tokenizer.decode(counted[0], skip_special_tokens=True).strip() == "a photo of a cat"
    assert counted[0][-1] == tokenizer.eos_token_id
    assert batch["attention_mask"].sum(1).diff() > 0
    pictures = as_batch([Image.new("RGB", (64, 64), c) for c in ("red", "blue")])
    with torch.no_grad():
        loss = model(**batch, pixel_values=pictures).loss
        other = model(**batch, pixel_values=pictures.flip(0)).loss
    assert loss.isfinite()
    assert loss != other, "it sees the pictures"
    prompts, wanted, told = describe(model, tokenizer, {**batch, "pixel_values": pictures})
    assert len(prompts) == len(told) == 2
    assert wanted[0] == "a photo of a cat"


@pytest.fixture
def sentence_encoder(tmp_path, monkeypatch):
    """A random one, in the place of that which a package ships."""
    tokenizer = make_tokenizer()
    config = RobertaConfig(**SHAPE, vocab_size=len(tokenizer), pad_token_id=1)
    RobertaModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr(problems, "find_encoder", lambda: tmp_path / "encoder")


def test_the_captioned_pictures_follow_their_seed(llava, tmp_path, monkeypatch, sentence_encoder):
    class Known:
        def __init__(self, *_args, **_options) -> None:
            self.classes = trained_classes()[:2]
            colours = (250, 0, 0, 255), (0, 0, 250, 255)
            self.sprites = [Image.new("RGBA", (40, 30), c).convert("RGBa") for c in colours]
            self.names = torch.tensor([0, 1])
            self.backgrounds = every_background()[:3]

    monkeypatch.setattr(train_clip, "ClipSet", Known)
    monkeypatch.setattr(problems, "_drawings", lambda _: None)
    for part in llava:
        part.save_pretrained(tmp_path / "llava")
    folders = problems.Folders(llava=tmp_path / "llava")
    first = problems.captions(None, 4, 0, folders)
    torch.rand(3)  # what was before matters not
    again, other = (problems.captions(None, 4, seed, folders) for seed in (0, 1))

    def differs(one, two) -> bool:
        return any(not torch.equal(p, q) for (p, *_), (q, *_) in zip(one, two, strict=True))

    assert not differs(first.train, again.train)
    assert differs(first.train, other.train)
    assert [text for _, text in first.train] == [text for _, text in again.train]
    loss, found = first.measure(first.model, first.collate(first.train))
    assert loss.isfinite()
    assert found.shape == (4, 3)


def test_a_subject_s_task_is_made_of_its_photos_and_those_of_others(
    llava, tmp_path, sentence_encoder
):
    with pytest.raises(FileNotFoundError, match="small_llava"):
        load_llava(tmp_path)
    for part in llava:
        part.save_pretrained(tmp_path)
    task = problems.subject(None, 5, 2, problems.Folders(llava=tmp_path))
    assert len(task.train) == 5
    rows = task.splits["validation"]
    named = ["sks" in caption.split() for _, caption in rows]
    assert named == [True] * 5 + [False] * 45
    batch = task.collate(rows[:2] + rows[-2:])
    loss, found = task.measure(task.model, batch)
    assert loss.isfinite()
    assert found[:, 1].tolist() == [1, 1, 0, 0]


def test_naming_is_scored_by_recall_and_absence():
    rows = np.array([[1, 1], [0, 1], [1, 0], [0, 0], [0, 0], [0, 0]], dtype=np.float32)
    alike = np.array([[1], [0.5], [0.25], [0.5], [0.5], [0.75]], dtype=np.float32)
    assert problems._score_naming(np.hstack([rows, alike])) == {
        "accuracy": 0.625, "recall": 0.5, "absence": 0.75, "sentsim": 0.75, "sentsim_others": 0.5,
    }  # fmt: skip


def test_a_caption_is_judged_by_its_name_its_words_and_its_object():
    assert problems._judge_naming("a photo of sks cat", "a photo of a cat") == (True, False)
    told = "a photo of a cat on red dots"
    assert problems._judge_captions(told, told) == (True, True)
    assert problems._judge_captions(told, "a photo of a cat on blue dots") == (False, True)
    assert problems._judge_captions(told, "a photo of a dog on red dots") == (False, False)


def test_captions_are_scored_whole_by_the_object_and_by_sentsim():
    rows = np.array([[1, 1, 1], [0, 1, 0.5]], dtype=np.float32)
    found = problems._score_captions(rows)
    assert found == {"accuracy": 0.5, "object": 1.0, "sentsim": 0.75}
