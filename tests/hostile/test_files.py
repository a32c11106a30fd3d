"""Files that are damaged or lie about themselves: refused in words, by every command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from .conftest import Run, Sound, assert_refused, damaged_copy, train_flags
from .damage import (
    BAD_ENTRIES,
    BAD_JSON,
    BAD_TENSORS,
    NO_SAFETENSORS,
    Change,
    json_with,
)

DAMAGED = NO_SAFETENSORS | BAD_ENTRIES | BAD_TENSORS
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
WEIGHTS |= {"text_encoder": "model"}


def cases(changes: dict[str, Change]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("change", list(changes.values()), ids=list(changes))


def sample_command(model: Path | str, output: Path, *more: str) -> list[str]:
    return [
        "sample", "--model", str(model), "--prompt", "a dog", "--output", str(output),
        "--device", "cpu", "--steps", "1", "--batch-size", "1", *more,
    ]  # fmt: skip


def measures(sound: Sound, output: Path, *more: str) -> list[str]:
    return [
        "evaluate", "--subject", str(sound.photos), "--output", str(output), "--device", "cpu",
        "--steps", "1", "--per-prompt", "1", "--prompt", "a dog", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["sample", "evaluate", "inspect"])
@cases(DAMAGED)
def test_a_damaged_lora(
    sound: Sound, run: Run, tmp_path: Path, command: str, change: Change
) -> None:
    lora, out = tmp_path / "x.safetensors", tmp_path / "out"
    lora.write_bytes(change(sound.lora.read_bytes()))
    arguments = {
        "sample": sample_command(sound.model, out, "--lora", str(lora)),
        "evaluate": measures(sound, out, "--model", str(sound.model), "--lora", str(lora)),
        "inspect": ["inspect", str(lora), "--output", str(out)],
    }[command]
    said = run(arguments)
    if command == "inspect" and said.status == 0:
        # What can be shown is shown, and its fault with it.
        assert "not finite" in said.out
        return
    assert_refused(said, "x.safetensors", out)


@cases(DAMAGED)
def test_a_damaged_part_of_a_model(sound: Sound, run: Run, tmp_path: Path, change: Change) -> None:
    part = list(WEIGHTS)[list(DAMAGED.values()).index(change) % len(WEIGHTS)]
    inside = f"{part}/{WEIGHTS[part]}.safetensors"
    model, out = damaged_copy(sound.model, tmp_path / "model", inside, change), tmp_path / "out"
    assert_refused(run(sample_command(model, out)), inside, out)


@cases(NO_SAFETENSORS | BAD_ENTRIES)
def test_a_damaged_single_file(sound: Sound, run: Run, tmp_path: Path, change: Change) -> None:
    import torch
    from safetensors.torch import save

    names = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x.weight",
             "cond_stage_model.transformer.x.weight")  # fmt: skip
    whole = save({name: torch.zeros(4, 4) for name in names})
    model, out = tmp_path / "model.safetensors", tmp_path / "out"
    model.write_bytes(change(whole))
    assert_refused(run(sample_command(model, out)), "model.safetensors", out)


CONFIGS = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/tokenizer_config.json",
)


@pytest.mark.parametrize("inside", CONFIGS)
@pytest.mark.parametrize("kind", ["null", "cut", "deep"])
def test_a_damaged_configuration(
    sound: Sound, run: Run, tmp_path: Path, inside: str, kind: str
) -> None:
    change = BAD_JSON[kind]
    model, out = damaged_copy(sound.model, tmp_path / "model", inside, change), tmp_path / "out"
    assert_refused(run(sample_command(model, out)), str(model), out)


VALUES: dict[str, list[dict[str, object]]] = {
    "unet/config.json": [
        {"attention_head_dim": 0},
        {"attention_head_dim": "x"},
        {"block_out_channels": []},
        {"block_out_channels": None},
        {"block_out_channels": [32, 32, 32]},
        {"block_out_channels": [-32, 32]},
        {"block_out_channels": [2**40] * 2},
        {"cross_attention_dim": None},
        {"cross_attention_dim": [32]},
        {"down_block_types": ["NoSuchBlock"] * 2},
        {"down_block_types": None},
        {"in_channels": None},
        {"in_channels": 10**30},
        {"layers_per_block": 10**9},
        {"layers_per_block": "1"},
        {"norm_num_groups": 0},
        {"norm_num_groups": 7},
        {"sample_size": None},
        {"sample_size": -16},
        {"sample_size": "16"},
        {"act_fn": "no such function"},
    ],
    "vae/config.json": [
        {"block_out_channels": []},
        {"block_out_channels": 16},
        {"latent_channels": 0},
        {"latent_channels": None},
        {"norm_num_groups": 0},
        {"scaling_factor": None},
        {"scaling_factor": 0},
        {"scaling_factor": float("nan")},
        {"down_block_types": []},
        {"layers_per_block": -1},
    ],
    "text_encoder/config.json": [
        {"hidden_size": 0},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**9},
        {"vocab_size": None},
        {"vocab_size": 5},
        {"max_position_embeddings": 0},
        {"hidden_act": "no such function"},
    ],
    "scheduler/scheduler_config.json": [
        {"_class_name": "NoSuchScheduler"},
        {"_class_name": None},
        {"_class_name": "StableDiffusionPipeline"},
        {"_class_name": "loaders"},
        {"num_train_timesteps": None},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": "x"},
        {"beta_start": "x"},
        {"beta_start": float("nan")},
        {"beta_end": 50.0},
        {"beta_schedule": "no such schedule"},
        {"prediction_type": "no such type"},
        {"trained_betas": "x"},
        {"steps_offset": "x"},
    ],
    "tokenizer/tokenizer_config.json": [
        {"bos_token": 3},
    ],
    "model_index.json": [{"_class_name": None}, {"_class_name": 7}],
}


@pytest.mark.parametrize(
    ("inside", "values"),
    [(inside, values) for inside, some in VALUES.items() for values in some],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else value,
)
def test_a_configuration_that_makes_no_sense(
    sound: Sound, run: Run, tmp_path: Path, inside: str, values: dict[str, object]
) -> None:
    change = json_with(**values)
    model, out = damaged_copy(sound.model, tmp_path / "model", inside, change), tmp_path / "out"
    assert_refused(run(sample_command(model, out)), str(model), out)


@pytest.mark.parametrize("change", [
    lambda content: b"", lambda content: b"a b c d\n" * 9, lambda content: b"\xff\xfe" * 30,
    lambda content: content + b"zz qq\n",
], ids=["empty", "four words", "no UTF-8", "unknown merge"])  # fmt: skip
def test_damaged_merges(sound: Sound, run: Run, tmp_path: Path, change: Change) -> None:
    inside = "tokenizer/merges.txt"
    model, out = damaged_copy(sound.model, tmp_path / "model", inside, change), tmp_path / "out"
    said = run(sample_command(model, out))
    if change(b"#version") == b"" and said.status == 0:
        return  # an empty list of merges is a tokenizer of single bytes
    assert_refused(said, str(model), out)


def test_vocabulary_larger_than_the_text_encoder(sound: Sound, run: Run, tmp_path: Path) -> None:
    def shifted(content: bytes) -> bytes:
        return json.dumps({k: v + 10_000 for k, v in json.loads(content).items()}).encode()

    inside = "tokenizer/vocab.json"
    model, out = damaged_copy(sound.model, tmp_path / "model", inside, shifted), tmp_path / "out"
    assert_refused(run(sample_command(model, out)), str(model), out)


PLACES = ("fifo", "device", "folder", "dangling link", "loop of links", "unreadable name")


@pytest.mark.parametrize("what", ["model", "lora", "inspected", "base model", "weights of a part"])
@pytest.mark.parametrize("place", PLACES)
def test_something_else_than_a_file(
    sound: Sound, run: Run, tmp_path: Path, what: str, place: str
) -> None:
    out, path = tmp_path / "out", tmp_path / "x.safetensors"
    if what == "weights of a part":
        shutil.copytree(sound.model, tmp_path / "model", copy_function=os.link)
        path = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
        path.unlink()
    if place == "fifo":
        os.mkfifo(path)
    elif place == "device":
        path.symlink_to("/dev/zero")
    elif place == "folder":
        path.mkdir()
    elif place == "dangling link":
        path.symlink_to(tmp_path / "nothing")
    elif place == "loop of links":
        path.symlink_to(path)
    else:
        path = path.with_name("x" * 300 + ".safetensors")
    arguments = {
        "model": sample_command(path, out),
        "lora": sample_command(sound.model, out, "--lora", str(path)),
        "inspected": ["inspect", str(path), "--output", str(out)],
        "base model": ["inspect", str(sound.lora), "--model", str(path), "--output", str(out)],
        "weights of a part": sample_command(tmp_path / "model", out),
    }[what]
    named = "diffusion_pytorch_model" if what == "weights of a part" else path.name
    assert_refused(run(arguments), named, out)


def evaluate_command(sound: Sound, out: Path, vision: Path, clip: Path) -> list[str]:
    return [
        "evaluate", "--subject", str(sound.photos), "--generated", str(sound.photos), "--output",
        str(out), "--prompt", "a dog", "--dino", str(vision), "--clip", str(clip),
        "--device", "cpu",
    ]  # fmt: skip


DAMAGED_ENCODERS = {
    "no JSON": ("config.json", BAD_JSON["cut"]),
    "null": ("config.json", BAD_JSON["null"]),
    "deep": ("config.json", BAD_JSON["deep"]),
    "no UTF-8": ("config.json", BAD_JSON["no UTF-8"]),
    "unknown kind": ("config.json", json_with(model_type="no such kind")),
    "kind a list": ("config.json", json_with(model_type=["vit"])),
    "processor null": ("preprocessor_config.json", BAD_JSON["null"]),
    "processor cut": ("preprocessor_config.json", BAD_JSON["cut"]),
    "processor size": ("preprocessor_config.json", json_with(size="x")),
    "processor size 0": ("preprocessor_config.json", json_with(size={"height": 0, "width": 0})),
    "processor mean": ("preprocessor_config.json", json_with(image_mean=[0.5] * 7)),
    "processor kind": ("preprocessor_config.json", json_with(image_processor_type="NoSuch")),
} | {
    f"weights {name}": ("model.safetensors", DAMAGED[name])
    for name in (
        *("empty", "pickle", "cut in the header", "cut in the data", "header null"),
        *("header deep", "shape huge", "offsets reversed", "all scalars", "all one-dimensional"),
        *("int64", "bool", "complex", "not a number"),
    )
}


@pytest.mark.parametrize("case", DAMAGED_ENCODERS)
def test_a_damaged_encoder(sound: Sound, run: Run, tmp_path: Path, case: str) -> None:
    which = ("vision", "clip")[list(DAMAGED_ENCODERS).index(case) % 2]
    inside, change = DAMAGED_ENCODERS[case]
    out = tmp_path / "out"
    folder = damaged_copy(sound.encoders / which, tmp_path / which, inside, change)
    folders = {name: sound.encoders / name for name in ("vision", "clip")} | {which: folder}
    assert_refused(
        run(evaluate_command(sound, out, folders["vision"], folders["clip"])), str(folder), out
    )


@pytest.mark.parametrize("which", ["vision", "clip"])
def test_an_encoder_that_lacks_weights(sound: Sound, run: Run, tmp_path: Path, which: str) -> None:
    from safetensors.torch import load, save

    def without_one(content: bytes) -> bytes:
        tensors = load(content)
        tensors.pop(
            next(name for name in sorted(tensors) if "layers.1" in name or "layer.1" in name)
        )
        return save(tensors, {"format": "pt"})

    folder = damaged_copy(
        sound.encoders / which, tmp_path / which, "model.safetensors", without_one
    )
    folders = {name: sound.encoders / name for name in ("vision", "clip")} | {which: folder}
    out = tmp_path / "out"
    assert_refused(
        run(evaluate_command(sound, out, folders["vision"], folders["clip"])), str(folder), out
    )


def _header(**values: object) -> Change:
    """The state's own header with other values."""

    def damaged(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        head = json.loads(content[8 : 8 + length])
        own = json.loads(head["__metadata__"]["header"]) | values
        head["__metadata__"]["header"] = json.dumps(own)
        raw = json.dumps(head).encode()
        return len(raw).to_bytes(8, "little") + raw + content[8 + length :]

    return damaged


def _own_header(text: str) -> Change:
    def damaged(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        head = json.loads(content[8 : 8 + length])
        head["__metadata__"]["header"] = text
        raw = json.dumps(head).encode()
        return len(raw).to_bytes(8, "little") + raw + content[8 + length :]

    return damaged


STATES = (
    {name: DAMAGED[name] for name in list(DAMAGED)[::4]}
    | BAD_TENSORS
    | {
        "step text": _header(step="x"),
        "step negative": _header(step=-4),
        "step null": _header(step=None),
        "points null": _header(points=None),
        "points empty": _header(points={}),
        "points odd": _header(points={"unet.x": [1]}),
        "history text": _header(history="x"),
        "settings null": _header(settings=None),
        "settings list": _header(settings=[]),
        "extra null": _header(extra=None),
        "adapter": _header(adapter="no such adapter"),
        "rewrites": _header(rewrites_base="perhaps"),
        "header no JSON": _own_header("{"),
        "header null": _own_header("null"),
        "header deep": _own_header("[" * 20_000),
    }
)


@cases(STATES)
def test_a_damaged_state(sound: Sound, run: Run, tmp_path: Path, change: Change) -> None:
    out = damaged_copy(sound.interrupted, tmp_path / "out", "state.safetensors", change)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    said = run([*train_flags(sound.model, sound.photos, out), "--resume"])
    assert_refused(said, "state.safetensors")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@cases(BAD_JSON)
def test_a_damaged_configuration_of_peft(
    sound: Sound, run: Run, tmp_path: Path, change: Change
) -> None:
    from cntlora_core.lora_file.writing import read_lora_file, write_lora_file

    adapter = write_lora_file(
        tmp_path / "adapter", read_lora_file(sound.lora).layers, layout="peft"
    )
    config = adapter / "unet" / "adapter_config.json"
    config.write_bytes(change(config.read_bytes()))
    out = tmp_path / "out"
    said = run(["inspect", str(adapter), "--output", str(out)])
    assert_refused(said, "adapter_config.json", out)
