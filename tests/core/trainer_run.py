"""A small run of transformers' Trainer; as a script, it resumes one in a fresh process.

python trainer_run.py OUTPUT_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from cntlora_core import ConvertedCheckpoints, get_cntlora_model, load_initialized
from cntlora_core.lava import LavaConfig, get_lava_model

TARGETS = ["query", "value", "intermediate.dense"]


def base() -> BertForSequenceClassification:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=64,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config)


def examples(count: int = 32, seed: int = 7) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 64, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def batches(seed: int = 7) -> list[dict[str, torch.Tensor]]:
    found = examples(seed=seed)
    return [
        {key: torch.stack([example[key] for example in found[i : i + 8]]) for key in found[0]}
        for i in range(0, len(found), 8)
    ]


def config(method: str) -> LoraConfig | LavaConfig:
    if method == "lava":
        return LavaConfig(r=4, lava_alpha=8, target_modules=TARGETS, modules_to_save=["classifier"])
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=["classifier"])


def initialised(method: str, seed: int = 7) -> PeftModel:
    make = get_lava_model if method == "lava" else get_cntlora_model
    return make(base(), config(method), None, batches(seed))


def plain(method: str) -> PeftModel:
    return get_peft_model(base(), config(method))


def make_trainer(model: PeftModel, folder: Path) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        logging_steps=1,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        save_total_limit=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(
        model=model,
        args=args,
        train_dataset=examples(),  # pyright: ignore[reportArgumentType]
        eval_dataset=examples(16, seed=8),  # pyright: ignore[reportArgumentType]
        callbacks=[ConvertedCheckpoints()],
    )


if __name__ == "__main__":
    output = Path(sys.argv[1])
    resumed = load_initialized(base(), output / "checkpoint-6", is_trainable=True)
    trainer = make_trainer(resumed, output)
    trainer.train(resume_from_checkpoint=True)
    (output / "log.json").write_text(json.dumps(trainer.state.log_history))
