"""ComfyUI's own loader on a full-size SD 1.5 checkpoint with one of our files.

Needs a ComfyUI checkout (COMFYUI_PATH), an environment that runs it (COMFYUI_PYTHON, else this
one), about 12 GB of memory and a minute. CNTLORA_SD15_CHECKPOINT names a single-file checkpoint;
without it one with random weights is made.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cntlora_core.lora_file.families import SD15_FILES
from cntlora_core.lora_file.names import kohya_name
from cntlora_core.lora_file.writing import LoRALayer, LoRALayers, write_lora_file

COMFYUI_PATH = os.environ.get("COMFYUI_PATH")
PROMPT = "a photo of sks dog in the snow"
TOLERANCE = 1e-4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not COMFYUI_PATH, reason="COMFYUI_PATH does not name a ComfyUI checkout"),
]


@dataclass(frozen=True)
class Run:
    """What diffusers gave, what ComfyUI gave, and the weights before."""

    layers: LoRALayers
    base_weights: dict[str, Tensor]
    expected: dict[str, Tensor]
    actual: dict[str, Tensor]
    report: dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("CNTLORA_SD15_CHECKPOINT")
    if given:
        return Path(given)
    base = tmp_path_factory.mktemp("checkpoint") / "sd15-random"
    module = "cntlora_core.diffusion.random_checkpoint"
    arguments = ["--layout", "single", "--dtype", "float16"]
    subprocess.run([sys.executable, "-m", module, str(base), *arguments], check=True)
    return base.with_suffix(".safetensors")


def random_layers(weights: dict[str, Tensor]) -> LoRALayers:
    """An adapter of the size of the weights' own spread, with ranks and scalings that differ."""
    generator = torch.Generator().manual_seed(5)
    layers: LoRALayers = {}
    for index, (name, weight) in enumerate(weights.items()):
        rank, scaling = 4 + 4 * (index % 4), (2.0, 0.5, 1.0)[index % 3]
        out, inner = weight.shape
        up = torch.randn(out, rank, generator=generator) * 0.3 / (scaling * rank**0.5)
        down = torch.randn(rank, inner, generator=generator) * weight.std()
        layers[name] = LoRALayer(down, up, scaling * rank)
    return layers


def attention_weights(unet: torch.nn.Module, text_encoder: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all 128 + 48 attention projections' weights under canonical names."""
    found: dict[str, Tensor] = {}
    for prefix, model, endings in (
        ("unet", unet, (".to_q", ".to_k", ".to_v", ".to_out.0")),
        ("text_encoder", text_encoder, (".q_proj", ".k_proj", ".v_proj", ".out_proj")),
    ):
        for path, module in model.named_modules():
            if path.endswith(endings):
                path = path.removeprefix("text_model.")
                found[f"{prefix}.{path}"] = module.weight.detach().clone()
    return found


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    from cntlora_core.diffusion.pipeline import load_stable_diffusion

    folder = tmp_path_factory.mktemp("comfyui run")
    lora = folder / "our lora.safetensors"
    generator = torch.Generator().manual_seed(6)
    latents = torch.randn(2, 4, 32, 32, generator=generator)
    timesteps = torch.tensor([50.0, 800.0])

    @torch.no_grad()
    def denoise(pipeline: Any, tokens: Tensor) -> dict[str, Tensor]:
        states = pipeline.text_encoder(tokens)[0]
        noise = pipeline.unet(latents, timesteps, states.expand(2, -1, -1)).sample
        return {"states": states, "noise": noise}

    pipeline = load_stable_diffusion(checkpoint, dtype=torch.float32).pipeline()
    tokens = pipeline.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    base_weights = attention_weights(pipeline.unet, pipeline.text_encoder)
    layers = random_layers(base_weights)
    write_lora_file(lora, layers)
    expected = {f"plain {key}": value for key, value in denoise(pipeline, tokens).items()}
    pipeline.load_lora_weights(str(lora))
    expected |= denoise(pipeline, tokens)
    del pipeline
    gc.collect()

    save_file(
        {"tokens": tokens[0], "latents": latents, "timesteps": timesteps},
        folder / "inputs.safetensors",
    )
    job = {"checkpoint": str(checkpoint.resolve()), "lora": str(lora)}
    job |= {key: str(folder / f"{key}.safetensors") for key in ("inputs", "outputs")}
    job["report"] = str(folder / "report.json")
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("apply_lora_in_comfyui.py")
    done = subprocess.run(
        [os.environ.get("COMFYUI_PYTHON", sys.executable), str(script), str(folder / "job.json")],
        cwd=COMFYUI_PATH,
        env={**os.environ, "PYTHONPATH": str(COMFYUI_PATH)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((folder / "report.json").read_text())
    return Run(layers, base_weights, expected, load_file(folder / "outputs.safetensors"), report)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_every_key_is_loaded(run: Run) -> None:
    assert run.report["dtype"] == "torch.float32"
    assert run.report["messages"] == []
    assert run.report["model_patches"] == 128
    assert run.report["clip_patches"] == 48
    patched = {key.removeprefix("weight.") for key in run.actual if key.startswith("weight.")}
    assert patched == {kohya_name(name, SD15_FILES) for name in run.layers}


def test_patched_weights_are_the_base_plus_our_delta(run: Run) -> None:
    errors = {}
    for name, layer in run.layers.items():
        base, patched = run.base_weights[name], run.actual[f"weight.{kohya_name(name, SD15_FILES)}"]
        # Of the change alone, so that a small change cannot hide behind a large weight.
        errors[name] = error(patched - base, layer.delta())
    worst = max(errors, key=errors.__getitem__)
    print(f"worst relative error of a delta: {errors[worst]:.2e} at {worst}")
    assert errors[worst] < TOLERANCE, worst


@pytest.mark.parametrize("key", ["states", "noise"])
def test_outputs_are_those_of_diffusers(run: Run, key: str) -> None:
    moved = error(run.expected[f"plain {key}"], run.expected[key])
    off = error(run.actual[key], run.expected[key])
    print(f"{key}: LoRA moves it by {moved:.3f}, ComfyUI is off diffusers by {off:.2e}")
    assert moved > 0.05
    assert off < TOLERANCE
