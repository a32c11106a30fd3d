"""Seconds a step and peak memory of ComfyUI's own TrainLoraNode and of ours, in one server.

    COMFYUI_PATH=... COMFYUI_PYTHON=... python -m tests.comfyui.bench_training \\
        --checkpoint SD15.safetensors --output docs/experiments/comfyui_training.json

Same model, photos, resolution, rank, optimizer and float32, batch 1, on the CPU. TrainLoraNode
adapts every linear layer and convolution of the UNet and has neither class images nor a trained
text encoder, so ours is measured without both (equal work) and with both. The server runs under
``cntlora_core.benchmark.stepclock``, which notes the end of every optimizer step of either node;
the first step of each run is not counted. The peak is that of the whole server, from the moment
before the run is queued. TrainLoraNode leaves gigabytes behind that ComfyUI gives back only when
another node asks for room, so the initialisation on the small model, which does, comes before each
run. 16 GB of memory and half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cntlora_core.runtime.files import write_json_atomic

from .server import COMFYUI_PATH, ROOT, Server, number_of, workflow

NAME = "sd15.safetensors"
PROMPT = "a photo of sks backpack"
OURS = ("CNTLoRALoadModel", "CNTLoRASubject", "CNTLoRAInitialize", "CNTLoRATrain")


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        name: In the result.
        theirs: ComfyUI's node, else ours.
        checkpointing: Gradient checkpointing.
        whole: With the text encoder and a class image in each step.
    """

    name: str
    theirs: bool = False
    checkpointing: bool = False
    whole: bool = False


CASES = (
    Case("ComfyUI", theirs=True),
    Case("ours, UNet alone"),
    Case("ours, text encoder and class image", whole=True),
    Case("ComfyUI, gradient checkpointing", theirs=True, checkpointing=True),
    Case("ours, UNet alone, gradient checkpointing", checkpointing=True),
)


def our_graph(case: Case, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Photos to LoRA with the nodes of this pack."""
    graph = workflow(
        "personalise_sd15",
        {
            "CNTLoRALoadModel": {"checkpoint": NAME},
            "CNTLoRASubject": {"resolution": args.resolution},
            "CNTLoRAClassImages": {"count": 1, "steps": 1},
            "CNTLoRAInitialize": {
                "rank": args.rank, "passes": 1, "train_text_encoder": case.whole,
                "rank_budget": "fixed",
            },
            "CNTLoRATrain": {
                "steps": args.steps, "preview_every": 0, "training_seed": seed,
                "gradient_checkpointing": case.checkpointing, "name": f"bench_{seed}",
                "save_every": 1_000_000,
            },
        },
    )  # fmt: skip
    kinds = (*OURS, "CNTLoRAClassImages") if case.whole else OURS
    graph = {number: node for number, node in graph.items() if node["class_type"] in kinds}
    for node in graph.values():
        if not case.whole:
            node["inputs"].pop("class_images", None)
    return graph


def their_graph(case: Case, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The same photos to ComfyUI's TrainLoraNode."""
    subject = next(
        node
        for node in our_graph(case, seed, args).values()
        if node["class_type"] == "CNTLoRASubject"
    )
    train = {
        "model": ["2", 0], "latents": ["3", 0], "positive": ["4", 0], "batch_size": 1,
        "grad_accumulation_steps": 1, "steps": args.steps, "learning_rate": 1e-4,
        "rank": args.rank, "optimizer": "AdamW", "loss_function": "MSE", "seed": seed,
        "training_dtype": "fp32", "lora_dtype": "fp32", "algorithm": "LoRA",
        "gradient_checkpointing": case.checkpointing, "existing_lora": "[None]",
        "bucket_mode": False,
    }  # fmt: skip
    loss = {"loss": ["5", 2], "filename_prefix": "loss"}
    return {
        "1": subject,
        "2": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": NAME}},
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["1", 1], "vae": ["2", 2]}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": PROMPT, "clip": ["2", 1]}},
        "5": {"class_type": "TrainLoraNode", "inputs": train},
        "6": {"class_type": "LossGraphNode", "inputs": loss},
    }


def make_room(server: Server) -> None:
    """An initialisation on the small model: what the run before has left is given back."""
    changes = {"CNTLoRAInitialize": {"passes": 1}}
    graph = workflow("personalise_small_model", changes)
    kinds = ("CNTLoRALoadModel", "CNTLoRASubject", "CNTLoRAInitialize")
    graph = {number: node for number, node in graph.items() if node["class_type"] in kinds}
    graph["99"] = {
        "class_type": "PreviewImage",
        "inputs": {"images": [number_of(graph, "CNTLoRAInitialize"), 1]},
    }
    outcome = server.run(graph)
    if outcome.status != "success":
        raise RuntimeError(f"making room: {outcome.messages}")


def measure(server: Server, case: Case, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run: when it began and ended on the common clock, and the server's peak memory."""
    graph = (their_graph if case.theirs else our_graph)(case, seed, args)
    make_room(server)
    settled = server.settled_memory()
    server.forget_peak_memory()
    begin = time.perf_counter()
    outcome = server.run(graph, 7200)
    if outcome.status != "success":
        raise RuntimeError(f"{case.name}: {outcome.messages}")
    run = {"case": case.name, "begin": begin, "end": time.perf_counter(), "settled": settled}
    run["peak"] = server.memory("VmHWM")
    print(f"{case.name}: {run['end'] - begin:.0f} s, peak {run['peak'] / 1e9:.2f} GB", flush=True)
    return run


def seconds_a_step(run: dict[str, Any], ends: Sequence[float]) -> float:
    """Median time between the ends of a run's steps."""
    own = [end for end in ends if run["begin"] < end < run["end"]]
    return statistics.median(b - a for a, b in pairwise(own))


def summary(runs: Sequence[dict[str, Any]], ends: Sequence[float]) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and ours against theirs."""
    found: dict[str, dict[str, float]] = {}
    for case in CASES:
        own = [run for run in runs if run["case"] == case.name]
        found[case.name] = {
            "seconds_a_step": statistics.median(seconds_a_step(run, ends) for run in own),
            "peak_gb": statistics.median(run["peak"] for run in own) / 1e9,
        }
    for case in CASES:
        peer = next(c.name for c in CASES if c.theirs and c.checkpointing == case.checkpointing)
        for key in ("seconds_a_step", "peak_gb"):
            found[case.name][f"{key}_of_theirs"] = found[case.name][key] / found[peer][key]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("comfyui_training.json"))
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args(arguments)
    if not COMFYUI_PATH:
        parser.error("COMFYUI_PATH does not name a ComfyUI checkout")
    with tempfile.TemporaryDirectory() as folder:
        base, clock = Path(folder), Path(folder) / "steps.json"
        (base / "models" / "checkpoints").mkdir(parents=True)
        (base / "models" / "checkpoints" / NAME).symlink_to(args.checkpoint.resolve())
        program = ("-m", "cntlora_core.benchmark.stepclock", str(clock), "main.py")
        server = Server(base, program=program, python_path=str(ROOT))
        runs = []
        try:
            for number in range(args.rounds):
                for seed, case in enumerate(CASES, 1 + number * len(CASES)):
                    runs.append(measure(server, case, seed, args))
            nodes = server.get("/system_stats")["system"]
        finally:
            server.stop()  # at its end the clock writes its file
        ends = json.loads(clock.read_text("utf-8"))["step_ends"]
    result = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("checkpoint", "output")},
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "versions": {k: nodes[k] for k in ("comfyui_version", "pytorch_version")},
        "cases": summary(runs, ends),
        "runs": [{**run, "seconds_a_step": seconds_a_step(run, ends)} for run in runs],
    }
    write_json_atomic(args.output, result)
    json.dump(result["cases"], sys.stdout, indent=2)


if __name__ == "__main__":
    main()
