"""The sources' settings, as data.

"cntlora" stands for the supplement of ConsNoTrainLoRA (arXiv 2507.08044), "lava" for "LAVA: A
unified framework for finetuning language and vision models", whose tables are named.
"""

from __future__ import annotations

from collections.abc import Mapping

from cntlora_core.tasks.settings import Preset

_CNTLORA = "ConsNoTrainLoRA, supplement, section 1"
_ATTENTION = ("query", "key", "value")


def _glue_large(learning_rate: float, epochs: int, batch_size: int, max_tokens: int) -> Preset:
    return Preset(
        source=f"{_CNTLORA}, which names the model and refers to EVA for the rest; learning rates, "
        "epochs and batch sizes are LoRA's for this model (arXiv 2106.09685, table 9)",
        model="FacebookAI/roberta-large",
        data="nyu-mll/glue",
        targets=("query", "value"),
        head=("classifier",),
        rank=8,
        alpha=16.0,
        learning_rate=learning_rate,
        weight_decay=0.1,
        warmup=0.06,
        epochs=epochs,
        batch_size=batch_size,
        options={"max_tokens": max_tokens},
    )


def _glue_base(learning_rate: float, epochs: int, batch_size: int, orthogonality: float) -> Preset:
    return Preset(
        source="LAVA, tables 6 and 7",
        model="FacebookAI/roberta-base",
        data="nyu-mll/glue",
        targets=("query", "value"),
        head=("classifier",),
        method="lora",
        adapter="lava",
        rank=8,
        alpha=8.0,
        dropout=0.1,
        orthogonality=orthogonality,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        select_best=True,
        options={"max_tokens": 512, "halve_validation": True},
    )


TEXT: Mapping[str, Mapping[str, Preset]] = {
    "cntlora": {
        "mnli": _glue_large(3e-4, 10, 4, 128),
        "sst2": _glue_large(4e-4, 10, 4, 128),
        "mrpc": _glue_large(3e-4, 20, 4, 512),
        "cola": _glue_large(2e-4, 20, 4, 128),
        "qnli": _glue_large(2e-4, 10, 4, 512),
        "qqp": _glue_large(3e-4, 20, 4, 512),
        "rte": _glue_large(4e-4, 20, 8, 512),
        "stsb": _glue_large(2e-4, 30, 8, 512),
    },
    "lava": {
        "mnli": _glue_base(5e-4, 30, 16, 0.3),
        "sst2": _glue_base(5e-4, 20, 8, 1.0),
        "mrpc": _glue_base(3e-4, 20, 4, 1.0),
        "cola": _glue_base(4e-4, 80, 32, 0.05),
        "qnli": _glue_base(4e-4, 25, 32, 0.025),
        "qqp": _glue_base(5e-4, 25, 64, 0.1),
        "rte": _glue_base(5e-4, 80, 32, 0.1),
        "stsb": _glue_base(4e-4, 40, 32, 0.05),
    },
}

VISION: Mapping[str, Preset] = {
    "cntlora": Preset(
        source=f"{_CNTLORA}; rank, alpha, learning rate and batch size are not given there",
        model="facebook/dinov2-giant",
        data="",
        # the names of transformers 4, and those of 5
        targets=(
            *(*_ATTENTION, "dense", "fc1", "fc2", "weights_in", "weights_out"),
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ),
        head=("classifier",),
        rank=16,
        alpha=16.0,
        bias="all",
        learning_rate=5e-4,
        weight_decay=0.05,
        schedule="cosine",
        warmup=0.1,  # 3 of 30 epochs
        epochs=30,
        batch_size=64,
        layer_decay=0.75,
        precision="bfloat16",
        options={"image_size": 224},
    )
}


def _commonsense(model: str) -> Preset:
    return Preset(
        source="LAVA, section 5.2 and appendix A.6: rank 32, the rest as in LLM-Adapters (arXiv "
        "2304.01933), where learning rate and lambda were searched and are not given",
        model=model,
        data="",
        targets=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
        method="lora",
        adapter="lava",
        rank=32,
        alpha=64.0,
        dropout=0.05,
        orthogonality=0.1,
        learning_rate=3e-4,
        warmup=0.01,
        epochs=3,
        batch_size=16,
        precision="bfloat16",
        base_precision="bfloat16",
        options={"max_tokens": 256, "max_new_tokens": 32, "beams": 4},
    )


LM: Mapping[str, Preset] = {
    "gemma-2": _commonsense("google/gemma-2-2b"),
    "llama-2": _commonsense("meta-llama/Llama-2-7b-hf"),
}
