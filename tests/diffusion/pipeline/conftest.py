"""A random model of SD1.5's topology at a fraction of its width, in every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cntlora_core.diffusion.family import SD15
from cntlora_core.diffusion.pipeline import StableDiffusionParts, load_parts
from cntlora_core.diffusion.random_checkpoint import random_parts, save_diffusers_folder
from cntlora_core.diffusion.single_file import save_single_file

NARROW = {
    "unet": {
        "block_out_channels": [8, 16, 32, 32],
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
        "sample_size": 8,
    },
    "vae": {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 8, "sample_size": 64},
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
}


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


def make_configs(folder: Path, changes: dict[str, dict[str, object]]) -> Path:
    shutil.copytree(SD15.configs, folder)
    for part, values in changes.items():
        change_json(folder / part / "config.json", **values)
    return folder


def assert_same(one: StableDiffusionParts, other: object) -> None:
    for part in SD15.parts:
        left, right = getattr(one, part).state_dict(), getattr(other, part).state_dict()
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), f"{part}.{name}"


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of SD1.5's topology (blocks, layers), at a fraction of its width."""
    return make_configs(tmp_path_factory.mktemp("narrow") / "configs", NARROW)


@pytest.fixture(scope="session")
def made(narrow: Path) -> StableDiffusionParts:
    return random_parts(narrow, seed=3)


@pytest.fixture(scope="session")
def single(made: StableDiffusionParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "my model.safetensors"
    save_single_file(made, path, {"modelspec.title": "narrow"})
    return path


@pytest.fixture
def folder(made: StableDiffusionParts, narrow: Path, tmp_path: Path) -> Path:
    save_diffusers_folder(made, narrow, tmp_path / "a folder")
    return tmp_path / "a folder"


def load_narrow(path: Path, configs: Path, **options: Any) -> StableDiffusionParts:
    return load_parts(path, configs, source=str(path), **options)
