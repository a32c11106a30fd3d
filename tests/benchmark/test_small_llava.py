"""The small LLaVA: what it reads, what its loss counts, and how naming a subject is scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

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
from cntlora_core.mini.making.evaluate import as_batch
from cntlora_core.tasks.answers import IGNORED


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


def test_a_subject_s_task_is_made_of_its_photos_and_those_of_others(llava, tmp_path):
    with pytest.raises(FileNotFoundError, match="small_llava"):
        load_llava(tmp_path)
    for part in llava:
        part.save_pretrained(tmp_path)
    task = problems.subject(None, 5, 2, problems.Folders(llava=tmp_path))
    assert len(task.train) == 5
    rows = task.splits["validation"]
    assert [sum("sks" in caption for _, caption, named in rows if named is want) for want in (1, 0)]
    assert all(("sks" in caption) == bool(named) for _, caption, named in rows)
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


def test_captions_are_scored_whole_by_the_object_and_by_sentsim():
    rows = np.array([[1, 1, 1], [0, 1, 0.5]], dtype=np.float32)
    found = problems._score_captions(rows)
    assert found == {"accuracy": 0.5, "object": 1.0, "sentsim": 0.75}
