"""The header of a LoRA file: what it says of the training, and of the tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cntlora_core.lora_file.writing import (
    compress_layers,
    modelspec_metadata,
    read_lora_file,
    write_lora_file,
)

from .conftest import adapted, collect


def test_metadata(base, tmp_path: Path) -> None:
    import hashlib

    layers = collect(adapted(base))
    metadata = modelspec_metadata(
        title="my dog",
        resolution=512,
        method="cntlora-cross",
        settings={"damping": 0.01, "constraint": "cross"},
        training={"learning_rate": 1e-4, "seed": 3, "num_train_images": 5, "unet_lr": None},
        tag_frequency={"5_sks dog": {"a photo of sks dog": 5}},
        trigger_phrase="sks dog",
        clip_skip=1,
    )
    path = write_lora_file(tmp_path / "lora.safetensors", layers, metadata=metadata)
    found = read_lora_file(path).metadata
    assert metadata.items() <= found.items()
    assert found["modelspec.sai_model_spec"] == "1.0.0"
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["modelspec.resolution"] == "512x512"
    assert found["ss_base_model_version"] == "sd_v1"
    assert found["ss_network_module"] == "networks.lora"
    assert found["ss_network_dim"] == "Dynamic"
    assert found["ss_network_alpha"] == "6"
    assert found["ss_learning_rate"] == "0.0001"
    assert found["ss_unet_lr"] == "None"
    assert json.loads(found["ss_tag_frequency"])["5_sks dog"] == {"a photo of sks dog": 5}
    assert json.loads(found["cntlora.settings"])["damping"] == 0.01
    assert json.loads(found["cntlora.versions"])["torch"] == torch.__version__
    content = path.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert found["modelspec.hash_sha256"] == f"0x{digest}"
    assert found["sshs_model_hash"] == digest

    # What describes the tensors is made anew when a file is written under another one's metadata.
    small, _ = compress_layers(layers, 1)
    other = write_lora_file(tmp_path / "small.safetensors", small, metadata=found)
    changed = read_lora_file(other).metadata
    assert changed["ss_network_dim"] == "1"
    assert changed["sshs_model_hash"] != digest
    with pytest.raises(ValueError, match="settings cannot be stored"):
        modelspec_metadata(title="", resolution=1, method="", settings={"x": float("nan")})
