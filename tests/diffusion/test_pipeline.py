"""Loading Stable Diffusion: every layout gives the same model, offline, in little memory."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args

import diffusers
import huggingface_hub.constants
import huggingface_hub.utils
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from cntlora_core.diffusion.checkpoint import (
    PARTS,
    CheckpointError,
    read_json,
)
from cntlora_core.diffusion.original_layout import save_single_file, to_original_layout
from cntlora_core.diffusion.pipeline import (
    SD15_CONFIGS,
    SchedulerName,
    StableDiffusionParts,
    load_parts,
    load_stable_diffusion,
)
from cntlora_core.diffusion.random_checkpoint import (
    main,
    random_parts,
    save_diffusers_folder,
    write_random_checkpoint,
)

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
    shutil.copytree(SD15_CONFIGS, folder)
    for part, values in changes.items():
        change_json(folder / part / "config.json", **values)
    return folder


def assert_same(one: StableDiffusionParts, other: object) -> None:
    for part in PARTS:
        left, right = getattr(one, part).state_dict(), getattr(other, part).state_dict()
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), f"{part}.{name}"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of SD1.5's topology (blocks, layers), at a fraction of its width."""
    return make_configs(tmp_path_factory.mktemp("narrow") / "configs", NARROW)


@pytest.fixture(scope="module")
def made(narrow: Path) -> StableDiffusionParts:
    return random_parts(narrow, seed=3)


@pytest.fixture(scope="module")
def single(made: StableDiffusionParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "my model.safetensors"
    save_single_file(made, path, {"modelspec.title": "narrow"})
    return path


@pytest.fixture
def folder(made: StableDiffusionParts, narrow: Path, tmp_path: Path) -> Path:
    save_diffusers_folder(made, narrow, tmp_path / "a folder")
    return tmp_path / "a folder"


def load_narrow(path: Path, configs: Path, **options: torch.dtype) -> StableDiffusionParts:
    return load_parts(path, configs, source=str(path), **options)


def test_tokenizer_gives_the_known_ids() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(str(SD15_CONFIGS / "tokenizer"))
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A Photo of\n a   CAT").input_ids == tokenizer("a photo of a cat").input_ids
    assert tokenizer("").input_ids == [49406, 49407]
    assert tokenizer.model_max_length == 77
    assert tokenizer.pad_token_id == 49407
    assert len(tokenizer) == 49408


def test_vocabulary_follows_the_published_construction() -> None:
    folder = SD15_CONFIGS / "tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    merges = (folder / "merges.txt").read_text("utf-8").splitlines()
    assert merges[0].startswith("#version")
    assert len(merges) == 1 + 48_894
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    assert list(vocabulary.values()) == list(range(49_408))
    assert names[256:512] == [symbol + "</w>" for symbol in names[:256]]
    assert names[512:-2] == ["".join(merge.split()) for merge in merges[1:]]
    assert names[-2:] == ["<|startoftext|>", "<|endoftext|>"]


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH is not set")
def test_vocabulary_is_that_of_comfyui() -> None:
    theirs = Path(os.environ["COMFYUI_PATH"]) / "comfy" / "sd1_tokenizer"
    ours = SD15_CONFIGS / "tokenizer"
    assert read_json(ours / "vocab.json") == read_json(theirs / "vocab.json")
    merges = [(folder / "merges.txt").read_text("utf-8").split() for folder in (ours, theirs)]
    assert merges[0] == merges[1]


def test_single_file_loads_in_diffusers_bit_for_bit(
    made: StableDiffusionParts, single: Path, narrow: Path
) -> None:
    """The oracle: diffusers' own converter reads what our key map wrote."""
    stock = StableDiffusionPipeline.from_single_file(
        str(single), config=str(narrow), local_files_only=True, safety_checker=None
    )
    assert_same(made, stock)


def test_single_file_round_trip(made: StableDiffusionParts, single: Path, narrow: Path) -> None:
    loaded = load_narrow(single, narrow)
    assert_same(made, loaded)
    for part in PARTS:
        model = getattr(loaded, part)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_single_file_has_the_names_and_shapes_of_sd15(made: StableDiffusionParts) -> None:
    tensors = to_original_layout(made)
    assert len(tensors) == 686 + 248 + len(made.text_encoder.state_dict())
    assert tensors["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
    for name in (
        "model.diffusion_model.time_embed.2.bias",
        "model.diffusion_model.input_blocks.11.0.out_layers.3.weight",
        "model.diffusion_model.input_blocks.9.0.op.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.8.2.conv.weight",
        "model.diffusion_model.output_blocks.11.1.proj_out.weight",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.decoder.norm_out.weight",
        "first_stage_model.post_quant_conv.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.k_proj.bias",
    ):
        assert name in tensors


def test_single_file_with_what_real_ones_carry(
    made: StableDiffusionParts, single: Path, narrow: Path, tmp_path: Path
) -> None:
    tensors = load_file(single)
    for name in [name for name in tensors if name.startswith("model.diffusion_model.out.")]:
        tensors["model_ema." + name[len("model.") :].replace(".", "")] = tensors[name] + 1
    tensors["alphas_cumprod"] = torch.rand(1000)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[
        None
    ]
    save_file(tensors, tmp_path / "extra.safetensors")
    assert_same(made, load_narrow(tmp_path / "extra.safetensors", narrow))


def test_single_file_without_the_text_model_level_and_with_vae_matrices(
    made: StableDiffusionParts, single: Path, narrow: Path, tmp_path: Path
) -> None:
    tensors = {
        name.replace(".transformer.text_model.", ".transformer."): (
            tensor.flatten(1) if "attn_1" in name and tensor.ndim == 4 else tensor
        )
        for name, tensor in load_file(single).items()
    }
    save_file(tensors, tmp_path / "other.safetensors")
    assert_same(made, load_narrow(tmp_path / "other.safetensors", narrow))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_is_cast_on_load(
    single: Path, narrow: Path, tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in load_file(single).items()}
    save_file(tensors, tmp_path / "cast.safetensors")
    loaded = load_narrow(tmp_path / "cast.safetensors", narrow, dtype=wanted)
    for part in PARTS:
        assert {p.dtype for p in getattr(loaded, part).parameters()} == {wanted}
    weight = tensors["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(loaded.unet.conv_in.weight, weight.to(wanted))


def test_weights_do_not_change_with_the_file(
    made: StableDiffusionParts, single: Path, narrow: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    shutil.copy(single, copy)
    loaded = load_narrow(copy, narrow)
    with copy.open("r+b") as stream:
        stream.seek(copy.stat().st_size // 2)
        stream.write(bytes(copy.stat().st_size // 2))
    assert_same(made, loaded)


def test_a_missing_weight_is_named(single: Path, narrow: Path, tmp_path: Path) -> None:
    tensors = load_file(single)
    del tensors["model.diffusion_model.out.2.weight"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 of 686 weights are missing, as .*\.out\.2\.weight"
    ):
        load_narrow(tmp_path / "less.safetensors", narrow)


def test_another_width_than_sd15s_is_refused(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has shape .* expected .* built differently"):
        load_stable_diffusion(single)


def test_saving_honours_the_umask_and_leaves_nothing_behind(
    made: StableDiffusionParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "model.safetensors"
    save_single_file(made, path)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cntlora_core.diffusion.original_layout.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_single_file(made, path)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == ["model.safetensors"]


def test_folder_is_what_diffusers_loads(made: StableDiffusionParts, folder: Path) -> None:
    loaded = load_stable_diffusion(folder)
    assert_same(made, loaded)
    assert_same(loaded, StableDiffusionPipeline.from_pretrained(folder, local_files_only=True))
    assert loaded.source == str(folder)
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1
    assert (loaded.latent_scale, loaded.default_resolution) == (8, 64)


def test_folder_saved_by_diffusers_in_fp16_variant(
    made: StableDiffusionParts, folder: Path, tmp_path: Path
) -> None:
    half = load_stable_diffusion(folder, dtype=torch.float16)
    half.pipeline().save_pretrained(tmp_path / "half", variant="fp16")
    files = {path.name for path in (tmp_path / "half").rglob("*.safetensors")}
    assert files == {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    loaded = load_stable_diffusion(tmp_path / "half", dtype=torch.float16)
    assert_same(half, loaded)
    prompt = "a photo of an ümläut"
    assert loaded.tokenizer(prompt).input_ids == made.tokenizer(prompt).input_ids
    assert torch.equal(loaded.unet.conv_in.weight, made.unet.conv_in.weight.half())


def test_folder_with_shards(made: StableDiffusionParts, folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    made.unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    assert_same(made, load_stable_diffusion(folder))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is missing"):
        load_stable_diffusion(folder)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_folder_with_names_of_other_versions(
    made: StableDiffusionParts, folder: Path, prefix: str
) -> None:
    """transformers before and after 5.6; the VAE's attention before diffusers 0.17."""
    text = folder / "text_encoder" / "model.safetensors"
    save_file({prefix + k.removeprefix("text_model."): v for k, v in load_file(text).items()}, text)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(vae)
    for new_name, old_name in old.items():
        tensors = {k.replace(f".{new_name}.", f".{old_name}."): v for k, v in tensors.items()}
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, vae)
    assert_same(made, load_stable_diffusion(folder))


def test_small_model_of_another_make(tmp_path: Path) -> None:
    """64 px, three VAE levels (factor 4), text width 128, a vocabulary of its own."""
    configs = make_configs(
        tmp_path / "configs",
        {
            "unet": {**NARROW["unet"], "sample_size": 16, "cross_attention_dim": 128},
            "vae": {
                "block_out_channels": [8, 16, 16],
                "down_block_types": ["DownEncoderBlock2D"] * 3,
                "up_block_types": ["UpDecoderBlock2D"] * 3,
                "norm_num_groups": 8,
                "sample_size": 64,
                "scaling_factor": 1.5,
            },
            "text_encoder": {
                **NARROW["text_encoder"],
                "hidden_size": 128,
                "vocab_size": 516,
                "eos_token_id": 515,
                "bos_token_id": 514,
            },
        },
    )
    names = list(json.loads((SD15_CONFIGS / "tokenizer" / "vocab.json").read_text("utf-8")))[:512]
    names += ["ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    (configs / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "#version: 0.2\nc a\nca t</w>\n"
    (configs / "tokenizer" / "merges.txt").write_text(merges, encoding="utf-8")
    write_random_checkpoint(tmp_path / "small", layout="diffusers", configs=configs)

    parts = load_stable_diffusion(tmp_path / "small")
    assert (parts.latent_scale, parts.default_resolution) == (4, 64)
    assert parts.tokenizer("cat").input_ids == [514, 513, 515]
    pipeline = parts.pipeline()
    generator = torch.Generator().manual_seed(0)
    image = pipeline("cat", num_inference_steps=2, output_type="np", generator=generator).images
    assert image.shape == (1, 64, 64, 3)
    assert 0 < image.std() < 1


@pytest.mark.parametrize("name", [None, *get_args(SchedulerName)])
def test_every_scheduler_samples(made: StableDiffusionParts, name: SchedulerName | None) -> None:
    pipeline = made.pipeline(name)
    assert pipeline.unet is made.unet
    assert made.default_resolution == 64  # diffusers sets it to 512 for configs before 0.9
    assert pipeline.scheduler.config["beta_schedule"] == "scaled_linear"
    if name is None:
        assert isinstance(pipeline.scheduler, diffusers.PNDMScheduler)
    images = pipeline("a cat", num_inference_steps=2, output_type="latent").images
    assert torch.isfinite(images).all()


def test_unknown_scheduler_lists_the_known(made: StableDiffusionParts) -> None:
    with pytest.raises(ValueError, match=r"'dmp\+\+' is not one of pndm, ddim"):
        made.pipeline("dmp++")  # type: ignore[arg-type]


def test_noise_schedule_is_sd15s_own(made: StableDiffusionParts) -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    wanted = torch.cumprod(1 - betas, 0)
    assert torch.allclose(made.noise_scheduler.alphas_cumprod.double(), wanted, rtol=1e-4)
    assert made.noise_scheduler.config["prediction_type"] == "epsilon"


def test_v_prediction_is_honoured_and_clipping_is_off_by_default(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text("utf-8")) | {"prediction_type": "v_prediction"}
    del config["clip_sample"]
    file.write_text(json.dumps(config), encoding="utf-8")
    parts = load_stable_diffusion(folder)
    for scheduler in (parts.noise_scheduler, parts.pipeline("ddim").scheduler):
        assert scheduler.config["prediction_type"] == "v_prediction"
        assert scheduler.config["clip_sample"] is False


def test_fingerprint_follows_the_weights_not_the_place(
    single: Path, narrow: Path, tmp_path: Path
) -> None:
    first = load_narrow(single, narrow).fingerprint
    assert len(first) == 16
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copyfile(single, moved)
    assert load_narrow(moved, narrow).fingerprint == first
    tensors = load_file(single)
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, moved, {"format": "pt", "modelspec.title": "narrow"})
    assert load_narrow(moved, narrow).fingerprint != first


def test_folder_fingerprint_sees_one_changed_tensor(folder: Path) -> None:
    first = load_stable_diffusion(folder).fingerprint
    assert load_stable_diffusion(folder, dtype=torch.float16).fingerprint == first
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    assert load_stable_diffusion(folder).fingerprint != first


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

    monkeypatch.setattr(StableDiffusionPipeline, "download", download)
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


def test_parts_that_do_not_fit_together(
    made: StableDiffusionParts, narrow: Path, tmp_path: Path
) -> None:
    wide = make_configs(tmp_path / "wide", NARROW)
    change_json(wide / "unet" / "config.json", cross_attention_dim=64)
    with pytest.raises(CheckpointError, match="text states of width 64, the text encoder makes 32"):
        random_parts(wide)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.source = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("unet/config.json", "no unet/config.json"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors is"),
        ("text_encoder/model.safetensors", "text_encoder/model.safetensors is missing"),
        ("scheduler/scheduler_config.json", "this file is missing"),
        ("tokenizer/vocab.json", "tokenizer/ has neither vocab.json and merges.txt nor tokenizer"),
    ],
)
def test_a_folder_with_a_file_missing(folder: Path, lost: str, message: str) -> None:
    (folder / lost).unlink()
    with pytest.raises(CheckpointError, match=message):
        load_stable_diffusion(folder)


def test_script_writes_both_layouts_and_spares_what_is_there(narrow: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    written = write_random_checkpoint(
        tmp_path / "r.safetensors", configs=narrow, dtype=torch.float16, seed=5, report=lines.append
    )
    assert written == [tmp_path / "r.safetensors", tmp_path / "r"]
    assert len(lines) == 3
    assert sorted(item.name for item in tmp_path.iterdir()) == ["r", "r.safetensors"]
    half = load_stable_diffusion(tmp_path / "r")
    assert_same(half, load_narrow(tmp_path / "r.safetensors", narrow))
    drawn = random_parts(narrow, seed=5)
    assert torch.equal(half.unet.conv_in.weight, drawn.unet.conv_in.weight.half().float())
    assert main([str(tmp_path / "r"), "--layout", "diffusers"]) == 1


def test_random_parts_depend_on_the_seed_only(narrow: Path, made: StableDiffusionParts) -> None:
    state = torch.random.get_rng_state()
    assert_same(made, random_parts(narrow, seed=3))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(
        made.unet.conv_in.weight, random_parts(narrow, seed=4).unet.conv_in.weight
    )


MEASURE = """
import sys, torch
from cntlora_core.diffusion.pipeline import load_stable_diffusion
def peak():
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) // 1024
before = peak()
parts = load_stable_diffusion(sys.argv[1], dtype=torch.float16)
size = sum(p.nbytes for m in (parts.unet, parts.vae, parts.text_encoder) for p in m.parameters())
print(before, peak(), size // 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_full_size_in_both_layouts_and_in_little_memory(tmp_path: Path) -> None:
    file, folder = write_random_checkpoint(tmp_path / "full", dtype=torch.float16)
    for path in (file, folder):
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
        )
        before, peak, size = map(int, result.stdout.split())
        assert size == 2033  # MiB: 859,520,964 + 83,653,863 + 123,060,480 parameters of two bytes
        assert peak - before < 1.1 * size
    one = load_stable_diffusion(file, dtype=torch.float16)
    assert (one.latent_scale, one.default_resolution) == (8, 512)
    assert_same(one, load_stable_diffusion(folder, dtype=torch.float16))
    stock = StableDiffusionPipeline.from_single_file(
        str(file),
        config=str(SD15_CONFIGS),
        torch_dtype=torch.float16,
        local_files_only=True,
        safety_checker=None,
    )
    assert_same(one, stock)
