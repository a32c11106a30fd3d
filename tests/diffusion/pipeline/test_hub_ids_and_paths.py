"""Hub ids and paths: what is here is loaded offline, what is not is said in words."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils
import pytest
from diffusers import DiffusionPipeline

from cntlora_core.diffusion.checkpoint import CheckpointError
from cntlora_core.diffusion.pipeline import StableDiffusionParts, load_stable_diffusion

from .conftest import assert_same, load_narrow


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Blocks the network with the hub online, and records who tries it."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    tried: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        tried.append(arguments)
        raise OSError("the network is blocked in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def test_local_models_touch_no_network(
    single: Path, narrow: Path, folder: Path, attempts: list[object]
) -> None:
    load_narrow(single, narrow).pipeline()("a cat", num_inference_steps=1, output_type="latent")
    load_stable_diffusion(str(folder)).pipeline("euler_a")
    assert attempts == []


def test_a_hub_id_tries_the_network_and_says_that_there_is_none(
    attempts: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        load_stable_diffusion("nobody/nothing")
    assert attempts


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_id_offline(
    attempts: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    reset = getattr(huggingface_hub.utils, "reset_sessions", None)
    if reset is not None:  # huggingface_hub before 1.0 reads the setting once for each session
        reset()
    reason = "HF_HUB_OFFLINE is set" if offline else "local_files_only forbids"
    with pytest.raises(CheckpointError, match=f"no such file or folder here, .* {reason}"):
        load_stable_diffusion("nobody/nothing", local_files_only=None if offline else True)
    assert attempts == []


def test_a_hub_id_is_downloaded_without_what_is_not_needed(
    folder: Path, made: StableDiffusionParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    parts = load_stable_diffusion("owner/model-1.5")
    assert_same(made, parts)
    assert parts.source == "owner/model-1.5"
    assert asked["name"] == "owner/model-1.5"
    assert asked["use_safetensors"] is True
    assert asked["safety_checker"] is None
    assert asked["feature_extractor"] is None


def test_a_hub_id_in_the_cache_loads_offline(
    folder: Path,
    made: StableDiffusionParts,
    attempts: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repository = tmp_path / "hub" / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    for module in (huggingface_hub.constants,):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    assert_same(made, load_stable_diffusion("owner/model", local_files_only=True))
    assert attempts == []


def test_paths_as_people_write_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    shutil.move(folder, tmp_path / "deep" / folder.name)
    for text in ("~/deep/a folder", r"deep\a folder", '"deep/a folder"', "deep/a folder/"):
        assert load_stable_diffusion(text).default_resolution == 64


@pytest.mark.parametrize(
    "text", ["", "no/such/model", "./none", "models/x.safetensors", "C:\\x\\y"]
)
def test_a_path_that_is_not_there(text: str, attempts: list[object]) -> None:
    with pytest.raises(CheckpointError, match=r"there is no such file or folder\. .*owner/name"):
        load_stable_diffusion(text)
    assert attempts == []
