"""The commonsense sets: LLM-Adapters' files, the loss on answers alone, answers generated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from cntlora_core.tasks.answers import (
    IGNORED,
    collate_answers,
    encode_answer,
    first_answer,
    generate_answers,
    prompts_of,
)
from cntlora_core.tasks.lm import choice_in, read_commonsense, train_lm
from cntlora_core.tasks.recipes import LmSettings

from .conftest import SHAPE, make_tokenizer

ANSWERS = ("correct", "answer", "true", "false", "solution1", "solution2")


def row(i: int, answers: tuple[str, str] = ("true", "false")) -> dict[str, str]:
    return {
        "instruction": ("the cat sat", "the dog ran on the mat")[i % 2],
        "input": "",
        "output": f"the correct answer is {answers[i % 2]}",
        "answer": answers[i % 2],
    }


def rows(count: int) -> list[dict[str, str]]:
    return [row(i) for i in range(count)]


def tiny(kind: str):
    import transformers

    tokenizer = make_tokenizer(*ANSWERS, template=False)
    torch.manual_seed(0)
    shape = {**SHAPE, "num_key_value_heads": 1, "head_dim": 8}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        **shape,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config), tokenizer


def settings(tmp_path: Path, **more) -> LmSettings:
    given = {
        "output": str(tmp_path / "run"),
        "rank": 2,
        "steps": 3,
        "batch_size": 4,
        "held_out": 2,
        "max_new_tokens": 6,
        "beams": 1,
        "precision": "float32",
        "base_precision": "float32",
        "device": "cpu",
    }
    return LmSettings(**{**given, **more})


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "steps"), [("Llama", 40), pytest.param("Gemma2", 3, marks=pytest.mark.thorough)]
)
def test_a_model_learns_to_answer_and_the_adapter_fits_the_stock_base(kind, steps, tmp_path):
    model, tokenizer = tiny(kind)
    wanted = settings(
        tmp_path, steps=steps, learning_rate=0.03, alpha=4.0, dropout=0.0, eval_every=steps
    )
    result = train_lm(
        wanted, model=model, tokenizer=tokenizer, data={"train": rows(10), "boolq": rows(4)}
    )
    assert result.metrics.keys() == {"validation", "boolq", "average"}
    assert result.metrics["average"] == {"accuracy": result.metrics["boolq"]["accuracy"]}
    if steps > 3:
        assert result.metrics["boolq"]["accuracy"] == 1.0
        written = json.loads((result.folder / "generated-boolq.json").read_text())
        assert written[0]["generated"] == "the correct answer is true"
        assert "the cat sat" in written[0]["prompt"]
    stock = tiny(kind)[0]
    ids = torch.randint(5, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = result.model.eval()(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(stock, result.adapter).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)


def test_only_answers_have_labels_and_prompts_end_where_they_begin():
    model, tokenizer = tiny("Llama")
    samples = [
        encode_answer(tokenizer, "the cat", "true", 20),
        encode_answer(tokenizer, "the dog ran on", "the correct answer", 20),
    ]
    assert samples[0]["labels"].tolist()[:2] == [IGNORED, IGNORED]
    assert samples[0]["labels"].tolist()[-1] == tokenizer.eos_token_id
    batch = collate_answers(samples, tokenizer.pad_token_id)
    assert batch["attention_mask"].sum(1).tolist() == [4, 8]
    prompts = prompts_of(batch, tokenizer.pad_token_id)
    assert [tokenizer.decode(p) for p in prompts["input_ids"]] == [
        "<pad> <pad> the cat",
        "the dog ran on",
    ]
    assert prompts["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    row = torch.tensor([IGNORED, 4, 5, IGNORED, 6])
    assert first_answer(row).tolist() == [4, 5]
    # Padding to the left changes no answer.
    options = {"max_new_tokens": 3}
    together = generate_answers(model.eval(), batch, tokenizer, **options)[2]
    alone = collate_answers(samples[:1], tokenizer.pad_token_id)
    assert generate_answers(model, alone, tokenizer, **options)[2] == together[:1]
    # A text that is too long loses the beginning of its prompt, not its answer.
    cut = encode_answer(tokenizer, "the dog ran on the mat", "true", 5)
    assert tokenizer.decode(cut["input_ids"]) == "on the mat true </s>"
    with pytest.raises(ValueError, match="leaves nothing of max_tokens=2"):
        encode_answer(tokenizer, "the dog", "the correct answer", 2)


def test_files_of_llm_adapters_are_read(tmp_path):
    write(tmp_path, "ft-training_set/commonsense_170k.json", rows(6))
    write(tmp_path, "dataset/boolq/test.json", rows(2))
    write(tmp_path, "dataset/piqa/test.json", [row(1, ("solution1", "solution2"))])
    found = read_commonsense(str(tmp_path), ("boolq", "piqa"))
    assert {name: len(split) for name, split in found.items()} == {
        "train": 6, "boolq": 2, "piqa": 1,
    }  # fmt: skip
    assert choice_in(found["piqa"][0]["output"])[0] == "solution2"
    (tmp_path / "ft-training_set/commonsense_170k.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"boolq.train.json"):
        read_commonsense(str(tmp_path), ("boolq",))
    write(tmp_path, "dataset/boolq/train.json", rows(3))
    assert len(read_commonsense(str(tmp_path), ("boolq",))["train"]) == 3
    write(tmp_path, "dataset/boolq/test.json", {"no": "list"})
    with pytest.raises(ValueError, match=r"test.json holds no list of records"):
        read_commonsense(str(tmp_path), ("boolq",))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": rows(4), "boolq": []}, "split 'boolq' is empty"),
        ({"train": [{"instruction": "x"}]}, "split 'train' has no column 'output'"),
        (
            {"train": [*rows(3), {"instruction": "x", "output": "perhaps"}]},
            "split 'train', row 3: the output 'perhaps' names no answer",
        ),
        ({"train": rows(2), "boolq": rows(2)}, "held_out=2 leaves nothing of 2 samples"),
    ],
)
def test_data_of_another_form_are_refused(data, message, tmp_path):
    model, tokenizer = tiny("Llama")
    with pytest.raises(ValueError, match=message):
        train_lm(settings(tmp_path), model=model, tokenizer=tokenizer, data=data)
