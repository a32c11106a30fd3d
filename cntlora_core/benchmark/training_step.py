"""Seconds a training step and peak memory, against diffusers' DreamBooth LoRA script, in one run.

    python -m cntlora_core.benchmark.training_step --model DIFFUSERS_FOLDER --images PHOTOS \\
        --class-images IMAGES --diffusers-script examples/dreambooth/train_dreambooth_lora.py

Both programs do the same work: SD1.5, rank 128 on the attention of UNet and text encoder, one photo
and one class image a step, float32. They run in turn, several rounds, each in a process of its own;
the first step of each is not counted. The peer's script comes from the diffusers repository (it is
no part of the package) and needs torchvision. ``--floor`` also times the bare forward and backward
passes of the frozen model on the same batch, which no trainer can go below.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from cntlora_core.diffusion.pipeline import load_stable_diffusion
from cntlora_core.runtime.files import write_json_atomic


@dataclass(frozen=True)
class Benchmark:
    """What is measured.

    Attributes:
        model: A diffusers folder with SD1.5.
        images: Folder of photos.
        class_images: Folder of class images.
        output: JSON file for the result.
        diffusers_script: The peer's train_dreambooth_lora.py; left out: only ours is measured.
        resolution: Side of the images in pixels.
        rank: Rank of the adapters.
        steps: Steps of each run, the first of which is not counted.
        rounds: How often both run in turn.
        floor: Also time the frozen model's bare forward and backward passes.
    """

    model: Path
    images: Path
    class_images: Path
    output: Path = Path("training_step.json")
    diffusers_script: Path | None = None
    resolution: int = 256
    rank: int = 128
    steps: int = 6
    rounds: int = 3
    floor: bool = True


def our_arguments(b: Benchmark, folder: Path, method: str = "cross") -> list[str]:
    return [
        "-m", "cntlora_core.cli", "train",
        "--model", str(b.model), "--images", str(b.images), "--class-images", str(b.class_images),
        "--token", "sks", "--class-name", "dog", "--output", str(folder / "ours"),
        "--cache", str(folder / "cache"), "--resolution", str(b.resolution),
        "--rank", str(b.rank), "--alpha", str(b.rank), "--steps", str(b.steps),
        "--init-passes", "1", "--method", method, "--device", "cpu",
        "--learning-rate", "1e-4", "--lr-schedule", "constant",
        "--cntlora.rank-budget", "fixed", "--file-precision", "float16",
    ]  # fmt: skip


def diffusers_arguments(b: Benchmark, folder: Path) -> list[str]:
    count = sum(1 for path in b.class_images.iterdir() if path.is_file())
    return [
        str(b.diffusers_script),
        "--pretrained_model_name_or_path", str(b.model), "--instance_data_dir", str(b.images),
        "--class_data_dir", str(b.class_images), "--with_prior_preservation",
        "--prior_loss_weight", "0.1", "--num_class_images", str(count),
        "--instance_prompt", "a photo of sks dog", "--class_prompt", "a photo of a dog",
        "--output_dir", str(folder / "diffusers"), "--resolution", str(b.resolution),
        "--center_crop", "--rank", str(b.rank), "--train_text_encoder",
        "--train_batch_size", "1", "--max_train_steps", str(b.steps), "--learning_rate", "1e-4",
        "--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--seed", "0",
        "--mixed_precision", "no",
    ]  # fmt: skip


def clocked(arguments: list[str], log: Path) -> dict[str, float]:
    """Run a program under the step clock: median seconds a step, and peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "clock.json"
        command = [sys.executable, "-m", "cntlora_core.benchmark.stepclock", str(result)]
        with log.open("ab") as stream:
            subprocess.run([*command, *arguments], stdout=stream, stderr=stream, check=True)
        clock = json.loads(result.read_text())
    ends = clock["step_ends"]
    seconds = [b - a for a, b in itertools.pairwise(ends)]
    return {
        "seconds_per_step": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "peak_gb": clock["peak_bytes"] / 1e9,
    }


def floor_seconds(b: Benchmark, repeats: int = 3) -> dict[str, float]:
    """Median seconds of the frozen model's passes on a batch of two: what any trainer must pay."""
    parts = load_stable_diffusion(b.model)
    side = b.resolution // parts.latent_scale
    latents = torch.randn(2, 4, side, side, requires_grad=True)
    timesteps = torch.tensor([10, 500])
    width = parts.unet.config["cross_attention_dim"]
    states = torch.randn(2, 77, width, requires_grad=True)
    tokens = torch.randint(0, 1000, (2, 77))

    def forward() -> Any:
        return parts.unet(latents, timesteps, encoder_hidden_states=states).sample

    def forward_and_backward() -> None:
        forward().square().mean().backward()

    def text() -> None:
        hidden = parts.text_encoder.get_input_embeddings()(tokens).requires_grad_(True)
        with torch.enable_grad():
            parts.text_encoder.get_input_embeddings().register_forward_hook(lambda *_: hidden)
            parts.text_encoder(tokens)[0].square().mean().backward()

    with torch.no_grad():
        alone = _median(forward, repeats)
    return {
        "unet_forward": alone,
        "unet_forward_and_backward": _median(forward_and_backward, repeats),
        "text_encoder_forward_and_backward": _median(text, repeats),
    }


def _median(function: Callable[[], object], repeats: int) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run(b: Benchmark) -> dict[str, Any]:
    """All rounds; the result is also written to ``b.output``."""
    log = b.output.with_suffix(".log")
    rounds: list[dict[str, Any]] = []
    for i in range(b.rounds):
        with tempfile.TemporaryDirectory() as name:
            entry = {"ours": clocked(our_arguments(b, Path(name)), log)}
            if b.diffusers_script is not None:
                entry["diffusers"] = clocked(diffusers_arguments(b, Path(name)), log)
        rounds.append(entry)
        print(f"round {i + 1} of {b.rounds}: {entry}", flush=True)
    result: dict[str, Any] = {
        "settings": {k: str(v) for k, v in dataclasses.asdict(b).items()},
        "rounds": rounds,
        "floor": floor_seconds(b) if b.floor else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
    }
    if b.diffusers_script is not None:
        ratios = [
            r["diffusers"]["seconds_per_step"] / r["ours"]["seconds_per_step"] for r in rounds
        ]
        memory = [r["ours"]["peak_gb"] / r["diffusers"]["peak_gb"] for r in rounds]
        result["times_faster"] = statistics.median(ratios)
        result["memory_ratio"] = statistics.median(memory)
        print(f"a step is {result['times_faster']:.2f} times as fast as diffusers'")
    if result["floor"]:
        floor = sum(
            result["floor"][k]
            for k in ("unet_forward_and_backward", "text_encoder_forward_and_backward")
        )
        ours = statistics.median(r["ours"]["seconds_per_step"] for r in rounds)
        result["over_floor"] = ours / floor
        print(f"floor {floor:.2f} s; a step takes {ours / floor:.2f} times that")
    write_json_atomic(b.output, result)
    return result


if __name__ == "__main__":
    run(tyro.cli(Benchmark))
