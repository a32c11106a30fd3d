"""A text encoder with transformers' Trainer, from CNTLoRA's initialisation.

python docs/examples/text_classifier.py   # a tiny encoder with random weights; seconds
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from cntlora_core import CNTLoRAConfig, get_cntlora_model, save_converted

CLASSES, LENGTH, VOCABULARY = 3, 8, 64


def texts(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Token ids whose first token decides the class."""
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row[0] % CLASSES} for row in ids]


def main(output: Path, steps: int = 150) -> float:
    """Train, save an adapter that fits the stock encoder, and return the validation loss."""
    torch.manual_seed(0)
    encoder = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            id2label={label: str(label) for label in range(CLASSES)},
            initializer_range=0.2,  # of a model whose weights say something without pre-training
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    training, validation = texts(1024, seed=1), texts(64, seed=2)
    few = [
        {"input_ids": torch.stack([text["input_ids"] for text in training[i : i + 16]])}
        for i in range(0, 64, 16)
    ]
    model = get_cntlora_model(
        encoder,
        LoraConfig(
            r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
        ),
        CNTLoRAConfig(constraint="cross"),
        few,
    )
    arguments = TrainingArguments(
        str(output / "checkpoints"),
        max_steps=steps,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=training, eval_dataset=validation)
    trainer.train()
    save_converted(model, output / "adapter")
    return trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    print(f"validation loss {main(folder):.3f}; the adapter is in {folder / 'adapter'}")
