"""The time of a training step: LAVA with its term against LoRA and DoRA, side by side."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from cntlora_core.benchmark.lava.experiments import Cell, Experiment, grid
from cntlora_core.benchmark.lava.finetuning import Task
from cntlora_core.benchmark.lava.networks import adapted_modules, build_network
from cntlora_core.benchmark.lava.settings import LavaBenchmark
from cntlora_core.lava import LavaConfig, OrthogonalityLoss

METHODS = ("frozen", "lora", "lava without term", "lava", "dora")
_ROUNDS = 15
_MATRICES: tuple[str, ...] = ("query", "key", "value", "dense")


def _cells(settings: LavaBenchmark) -> list[Cell]:
    return grid(case=("matrix", "conv"), round=range(settings.seeds))


def _run(cell: Cell, _task: Task | None, settings: LavaBenchmark) -> dict[str, Any]:
    torch.manual_seed(cell["round"])
    quick = settings.quick
    if cell["case"] == "matrix":
        config = RobertaConfig()
        if quick:
            config = RobertaConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
            )
        base: nn.Module = RobertaForSequenceClassification(config)
        tokens = torch.randint(5, 1000, (2 if quick else 8, 16 if quick else 128))
        targets, rank, classes = list(_MATRICES), 8, config.num_labels or 2

        def loss_of(model: nn.Module) -> torch.Tensor:
            return nn.functional.cross_entropy(
                model(input_ids=tokens).logits, tokens[:, 0] % classes
            )
    else:
        base = build_network("resnet18", 10, 0.125 if quick else 1.0)
        pictures = torch.randn(4 if quick else 32, 3, 64, 64)
        targets, rank = list(adapted_modules(base)), settings.rank

        def loss_of(model: nn.Module) -> torch.Tensor:
            return nn.functional.cross_entropy(model(pictures), torch.arange(len(pictures)) % 10)

    steps = {name: _stepper(copy.deepcopy(base), name, targets, rank, loss_of) for name in METHODS}
    for step in steps.values():  # the first one allocates
        step()
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in range(2 if quick else _ROUNDS):
        # In turn and in turning order, so that a slow spell of the machine meets all alike.
        order = [METHODS[(turn + i) % len(METHODS)] for i in range(len(METHODS))]
        for name in order:
            began = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - began)
    return {"step_seconds": seconds}


def _stepper(
    base: nn.Module,
    method: str,
    targets: list[str],
    rank: int,
    loss_of: Callable[[nn.Module], torch.Tensor],
) -> Callable[[], None]:
    penalty = None
    if method == "frozen":  # a gradient that goes all the way back, and next to nothing to train
        model = base.requires_grad_(False)
        first = next(p for p in model.parameters() if p.ndim == 1)
        first.requires_grad_(True)
    elif method in ("lora", "dora"):
        lora = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=targets, use_dora=method == "dora"
        )
        model = get_peft_model(base, lora)  # pyright: ignore[reportArgumentType]
    else:
        strength = 0.1 if method == "lava" else 0.0
        lava = LavaConfig(r=rank, lava_alpha=rank, target_modules=targets, orthogonality=strength)
        model = get_peft_model(base, lava)  # pyright: ignore[reportArgumentType]
        penalty = OrthogonalityLoss(model) if strength else None
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        loss = loss_of(model)
        if penalty is not None:
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By case and method: the median step, and the median of its ratio to LoRA's of that turn."""
    rows = []
    for case in dict.fromkeys(run["case"] for run in runs):
        turns: dict[str, list[float]] = {}
        for run in runs:
            if run["case"] == case:
                for name, found in run["step_seconds"].items():
                    turns.setdefault(name, []).extend(found)
        for name, found in turns.items():
            ratios = [own / lora for own, lora in zip(found, turns["lora"], strict=True)]
            rows.append(
                {
                    "case": case,
                    "method": name,
                    "step": median(found),
                    "over_lora": median(ratios),
                    "turns": len(found),
                }
            )
    return rows


def cost_experiment(settings: LavaBenchmark) -> Experiment:
    """The experiment; it needs no network that is pre-trained."""
    return Experiment(
        "cost",
        "time of a training step over LoRA's",
        _cells,
        lambda cell, task: _run(cell, task, settings),
        summarise,
    )
