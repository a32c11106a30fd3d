"""The sources' settings, as data.

"cntlora" stands for the supplement of ConsNoTrainLoRA (arXiv 2507.08044), "lava" for "LAVA: A
unified framework for finetuning language and vision models", whose tables are named.
"""

from __future__ import annotations

from collections.abc import Mapping

from cntlora_core.tasks.settings import Preset

_CNTLORA = "ConsNoTrainLoRA, supplement, section 1"
_ATTENTION = ("query", "key", "value")
_QKV = ("q_proj", "k_proj", "v_proj")


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

_LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
_SENTENCES = "sentence-transformers/all-MiniLM-L6-v2"


def _instructions(model: str) -> Preset:
    return Preset(
        source="the study of LoRA initialisations in vision-language models: rank 8, learning rate "
        "1e-4, cosine, warm-up 0.1, one epoch of 30,000 conversations of LLaVA-Instruct-150K; its "
        "PiSSA has 16 iterations (method pissa_niter_16); the layers are LLaMA-Factory's",
        model=model,
        data="",
        targets=_LANGUAGE,
        method="lora",
        rank=8,
        alpha=16.0,
        learning_rate=1e-4,
        schedule="cosine",
        warmup=0.1,
        epochs=1,
        batch_size=16,
        precision="bfloat16",
        base_precision="bfloat16",
        options={"held_out": 0.01, "max_train": 30_000, "sentence_encoder": ""},
    )


VLM: Mapping[str, Preset] = {
    "myvlm": Preset(
        source=f"{_CNTLORA}; the share that is held out is not given there",
        model="llava-hf/llava-1.5-7b-hf",
        data="",
        targets=(
            r".*vision_tower.*\.(q_proj|k_proj|v_proj)|"
            r".*language_model.*\.(q_proj|k_proj|v_proj|gate_proj|up_proj|down_proj)"
        ),
        rank=128,
        alpha=256.0,
        learning_rate=2e-4,
        epochs=20,
        batch_size=8,
        precision="bfloat16",
        base_precision="bfloat16",
        options={
            "prompt": "Provide a personalized description of the image",
            "held_out": 0.2,
            "sentence_encoder": _SENTENCES,
        },
    ),
    "apd": Preset(
        source=f"{_CNTLORA}; the share that is held out is not given there",
        model="THUDM/glm-edge-v-5b",
        data="philschmid/amazon-product-descriptions-vlm",
        targets=_QKV,
        rank=32,
        alpha=64.0,
        learning_rate=2e-4,
        epochs=20,
        batch_size=8,
        precision="bfloat16",
        base_precision="bfloat16",
        options={
            "class": "AutoModelForCausalLM",
            "prompt": "Create a Short Product description based on the provided <PRODUCT NAME> and "
            "<CATEGORY> and image. Only return description. The description should be SEO "
            "optimized and for a better mobile search experience.\n\n"
            "<PRODUCT NAME>: {product_name} <CATEGORY>: {category}",
            "held_out": 0.1,
            "sentence_encoder": _SENTENCES,
        },
    ),
    "qwen2.5-vl": _instructions("Qwen/Qwen2.5-VL-7B-Instruct"),
    "llama-3.2-vision": _instructions("meta-llama/Llama-3.2-11B-Vision-Instruct"),
}


def _segmentation(
    learning_rate: float, epochs: int, orthogonality: float, best: str, loss: str
) -> Preset:
    return Preset(
        source="LAVA, table 12; its multiplier lambda of 4 has no counterpart here; layers as in "
        "Conv-LoRA, the neck's convolutions, and the mask decoder in full",
        model="facebook/sam-vit-huge",
        data="",
        targets=r"vision_encoder\.(layers\.\d+\.attn\.qkv|neck\.conv[12])",
        head=("mask_decoder",),
        method="lora",
        adapter="lava",
        rank=3,
        alpha=32.0,
        orthogonality=orthogonality,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=4,
        options={"best": best, "loss": loss},
    )


SEGMENTATION: Mapping[str, Preset] = {
    "polyp": _segmentation(1e-4, 30, 0.5, "s_measure", "structure"),
    "camo": _segmentation(1e-4, 20, 0.1, "s_measure", "structure"),
    "leaf": _segmentation(3e-4, 30, 0.1, "iou", "structure"),
    "isic2017": _segmentation(1e-3, 30, 1.0, "iou", "structure"),
    "sbu": _segmentation(1e-4, 10, 0.1, "balanced_error_rate", "balanced"),
}

DEPTH: Mapping[str, Preset] = {
    "nyu": Preset(
        source="LAVA, appendix A.8.1; rank, alpha and schedule are not given there; image size and "
        "loss are ZoeDepth's",
        model="LiheYoung/depth-anything-large-hf",
        data="",
        targets=(
            # transformers 4's names of the encoder's layers, 5's, and the decoder's convolutions
            r"backbone\..*\.(query|key|value|dense|fc1|fc2)|"
            r"backbone\..*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)|"
            r"neck\..*\.(projection|convolution[12])|neck\.convs\.\d+|head\.conv[12]"
        ),
        head=("conv3",),
        method="lora",
        adapter="lava",
        rank=8,
        alpha=8.0,
        orthogonality=0.01,
        learning_rate=1.61e-4,
        weight_decay=0.01,
        epochs=10,
        batch_size=4,
        options={"max_depth": 10, "image_size": (392, 518)},
    )
}
