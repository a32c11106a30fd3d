"""All steps at SD1.5's size in a real ComfyUI server: teach, save, load, generate by stock nodes.

Needs COMFYUI_PATH, COMFYUI_PYTHON and a single-file checkpoint in CNTLORA_SD15_CHECKPOINT (one with
random weights will do: ``python -m cntlora_core.diffusion.random_checkpoint``), 16 GB of memory and
some ten minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from .server import COMFYUI_PATH, Outcome, Server, number_of, workflow

CHECKPOINT = os.environ.get("CNTLORA_SD15_CHECKPOINT")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(
        not (COMFYUI_PATH and CHECKPOINT),
        reason="COMFYUI_PATH and CNTLORA_SD15_CHECKPOINT name no ComfyUI and no checkpoint",
    ),
]

NAME = "sd15.safetensors"
SAMPLING = {
    "CheckpointLoaderSimple": {"ckpt_name": NAME},
    "EmptyLatentImage": {"width": 256, "height": 256},
    "KSampler": {"steps": 2},
}
TAUGHT = {
    **SAMPLING,
    "CNTLoRALoadModel": {"checkpoint": NAME},
    "CNTLoRASubject": {"resolution": 256},
    "CNTLoRAClassImages": {"count": 1, "steps": 1},
    "CNTLoRAInitialize": {"passes": 1, "rank": 128},
    "CNTLoRATrain": {
        "steps": 2,
        "learning_rate": 1e-2,
        "lr_schedule": "constant",
        "preview_every": 0,
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("full-size")
    (base / "models" / "checkpoints").mkdir(parents=True)
    (base / "models" / "checkpoints" / NAME).symlink_to(Path(str(CHECKPOINT)).resolve())
    server = Server(base)
    yield server
    server.stop()


def picture(server: Server, outcome: Outcome, graph: dict[str, Any]) -> np.ndarray:
    shown = outcome.outputs[number_of(graph, "SaveImage")]["images"][0]
    with Image.open(server.base / "output" / shown["subfolder"] / shown["filename"]) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def test_teaching_saving_loading_and_sampling(server: Server) -> None:
    teach = workflow("subject_lora_sd15", TAUGHT)
    first = server.run(teach, 5400)
    assert first.status == "success", first.messages
    applied = picture(server, first, teach)

    def generate(strength: float) -> np.ndarray:
        strengths = {"strength_model": strength, "strength_clip": strength}
        graph = workflow("use_a_saved_lora", {**SAMPLING, "LoraLoader": strengths})
        outcome = server.run(graph)
        assert outcome.status == "success", outcome.messages
        return picture(server, outcome, graph)

    loaded, base = generate(1.0), generate(0.0)
    assert np.abs(loaded - base).mean() > 1.0
    # Load LoRA, from the file, does what Apply Subject LoRA did without it.
    assert np.abs(loaded - applied).max() <= 1
    for complaint in ("lora key not loaded", "NOT LOADED"):
        assert complaint not in server.log


def teaching_alone(seed: int, name: str) -> dict[str, Any]:
    """The nodes of this pack, without ComfyUI's own drawing."""
    anew = {"training_seed": seed, "name": name, "trained_before": "train anew"}
    train = {**TAUGHT["CNTLoRATrain"], **anew}
    graph = workflow("personalise_sd15", {**TAUGHT, "CNTLoRATrain": train})
    sampling = {"CNTLoRAOpenModel", "CNTLoRAApply"}
    ours = {
        number: node
        for number, node in graph.items()
        if node["class_type"].startswith("CNTLoRA") and node["class_type"] not in sampling
    }
    assert len(ours) == 6
    return ours


def test_memory_is_given_back_and_the_same_seed_gives_the_same_lora(server: Server) -> None:
    settled = []
    for seed, name in ((1, "first"), (2, "second"), (1, "third")):
        assert server.run(teaching_alone(seed, name), 5400).status == "success"
        settled.append(server.settled_memory())
        kinds = {kind: server.memory(kind) for kind in ("VmRSS", "RssAnon", "RssFile")}
        print(", ".join(f"{kind} {size / 1e6:.0f} MB" for kind, size in kinds.items()))
    assert max(settled[1:]) < settled[0] + 0.3e9  # the models have 4 GB
    files = {
        name: load_file(next((server.base / "output" / "cntlora").glob(f"*/{name}.safetensors")))
        for name in ("first", "second", "third")
    }
    assert all(torch.equal(tensor, files["third"][key]) for key, tensor in files["first"].items())
    assert any(
        not torch.equal(tensor, files["second"][key]) for key, tensor in files["first"].items()
    )
