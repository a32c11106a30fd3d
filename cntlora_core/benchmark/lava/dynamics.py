"""The experiments on what happens within: variance of the gradient, spectrum of the update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from cntlora_core.benchmark.lava.experiments import Cell, Experiment, grid, some_models
from cntlora_core.benchmark.lava.finetuning import (
    Adapted,
    FlattenedLoRA,
    Task,
    accuracy,
    adapt,
    finetune,
)
from cntlora_core.benchmark.lava.settings import LavaBenchmark
from cntlora_core.lava.inject import lava_layers

_GRADIENTS = 24  # mini-batches that a variance is taken over
_LOOKS = 6  # times in a run
_WIDE = 8  # the rank of the spectra, as a multiple of the benchmark's


def _variance_cells(settings: LavaBenchmark) -> list[Cell]:
    return grid(
        model=some_models(settings),
        seed=range(settings.seeds),
        start=("orthogonal", "lora"),
        strength=(0.0, settings.orthogonality),
        rate=settings.rates[len(settings.rates) // 2 :][:1],
    )


def _run_variance(cell: Cell, task: Task) -> dict[str, Any]:
    settings, data = task.settings, task.data(cell["seed"])
    adapted = adapt(
        task.fresh(cell["seed"]),
        "lava_term",
        settings,
        strength=cell["strength"],
        init_weights=cell["start"],
    )
    every = max(1, settings.steps // _LOOKS)
    looks: list[dict[str, Any]] = []

    def look(step: int) -> None:
        if step % every == 0:
            looks.append({"step": step, **gradient_variance(adapted, data.train, settings.batch)})

    finetune(adapted, data, settings, cell["rate"], cell["seed"], at_step=look)
    return {"looks": looks, "accuracy": accuracy(adapted.network, data.test)}


def gradient_variance(
    adapted: Adapted, pictures: tuple[Tensor, Tensor], batch: int, count: int = _GRADIENTS
) -> dict[str, Any]:
    """How much the gradient of V differs between mini-batches, the parameters standing still.

    V is the factor that starts at zero, B in the paper. The orthogonality term, which is the same
    for all batches, is left out.

    Returns:
        ``variance``: ``E ||g - E g||^2``, the mean over layers; ``relative``: the same over
        ``||E g||^2``; ``size``: ``||U||^2``, by which such a gradient grows;
        ``deviation``: ``||U.T U - I||``; all means over layers, and ``layers``, the variances.
    """
    layers = lava_layers(adapted.network)
    generator = torch.Generator().manual_seed(99)
    sums: dict[str, Tensor] = {}
    squares = dict.fromkeys(layers, 0.0)
    running = [m for m in adapted.network.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [(m.momentum, m) for m in running]
    for module in running:
        module.momentum = 0.0  # the running means stand still too
    parameters = [layer.lava_V["default"] for layer in layers.values()]
    try:
        for _ in range(count):
            chosen = torch.randint(len(pictures[1]), (batch,), generator=generator)
            loss = nn.functional.cross_entropy(
                adapted.network(pictures[0][chosen]), pictures[1][chosen]
            )
            for name, gradient in zip(layers, torch.autograd.grad(loss, parameters), strict=True):
                gradient = gradient.double()
                sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient
                squares[name] += float(gradient.square().sum())
    finally:
        for momentum, module in kept:
            module.momentum = momentum
    found: dict[str, list[float]] = {
        key: [] for key in ("variance", "relative", "size", "deviation")
    }
    for name, layer in layers.items():
        centre = float((sums[name] / count).square().sum())
        variance = (squares[name] / count - centre) * count / (count - 1)
        u = layer.lava_U["default"].detach().double()
        found["variance"].append(variance)
        found["relative"].append(variance / max(centre, 1e-30))
        found["size"].append(float(u.square().sum()))
        gram = u.T @ u
        found["deviation"].append(float((gram - torch.eye(len(gram))).norm()))
    return {key: mean(values) for key, values in found.items()} | {"layers": found["variance"]}


def _summarise_variance(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["model"], run["start"], run["strength"]), []).append(run)
    rows = []
    for (model, initialization, strength), group in groups.items():
        looks = [list(at) for at in zip(*(run["looks"] for run in group))]
        row = {"model": model, "start": initialization, "strength": strength, "seeds": len(group)}
        for key in ("variance", "relative", "size", "deviation"):
            row[key] = mean(look[key] for at in looks[1:] or looks for look in at)
        row["accuracy"] = mean(run["accuracy"] for run in group)
        row["steps"] = [at[0]["step"] for at in looks]
        row["course"] = [mean(look["variance"] for look in at) for at in looks]
        rows.append(row)
    return rows


def _spectrum_cells(settings: LavaBenchmark) -> list[Cell]:
    return grid(
        model=some_models(settings),
        seed=range(settings.seeds),
        method=("lora", "lava", "lava_term"),
        rate=settings.rates[len(settings.rates) // 2 :][:1],
    )


def _run_spectrum(cell: Cell, task: Task) -> dict[str, Any]:
    settings, data = task.settings, task.data(cell["seed"])
    rank = settings.rank * (2 if settings.quick else _WIDE)
    adapted = adapt(task.fresh(cell["seed"]), cell["method"], settings, rank=rank)
    finetune(adapted, data, settings, cell["rate"], cell["seed"])
    spectra = {
        name: values.tolist()
        for name, values in ((n, spectrum(d)) for n, d in trained_deltas(adapted.network))
        if len(values) >= rank
    }
    return {
        "rank": rank,
        "accuracy": accuracy(adapted.network, data.test),
        "spectra": {name: values[: rank + 4] for name, values in spectra.items()},
    }


def trained_deltas(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What was added to each kernel, as a matrix (c_out, c_in kh kw)."""
    for name, layer in lava_layers(network).items():
        yield name, layer.get_delta_weight("default").detach().flatten(1)
    for name, module in network.named_modules():
        if isinstance(module, FlattenedLoRA):
            yield name.split(".parametrizations")[0], module.delta().detach()


def spectrum(delta: Tensor) -> Tensor:
    """Singular values over the largest; zeros of a delta of zeros."""
    values = torch.linalg.svdvals(delta.double())
    return values / values[0].clamp_min(1e-300)


def shape_of(values: list[float], rank: int) -> dict[str, float]:
    """What is said of a spectrum.

    Returns:
        ``flat``: the share of the first ``rank`` values that are at least half the largest;
        ``condition``: the largest over the last of those that are not rounding; ``effective``: the
        exponential of the entropy of the energies, over the rank; ``steepest``: where, as a part of
        the rank, the next value is smallest against its forerunner, and ``drop``, that ratio.
    """
    kept = [value for value in values[:rank] if value > 1e-7]
    energy = torch.tensor(kept, dtype=torch.float64).square()
    share = energy / energy.sum()
    entropy = float(-(share * share.clamp_min(1e-300).log()).sum())
    ratios = [b / a for a, b in pairwise(kept)] or [1.0]
    drop = min(ratios)
    return {
        "flat": sum(value >= 0.5 for value in kept) / rank,
        "condition": kept[0] / kept[-1],
        "effective": float(torch.tensor(entropy).exp()) / rank,
        "steepest": (ratios.index(drop) + 1) / rank,
        "drop": drop,
    }


def _summarise_spectrum(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["model"], run["method"]), []).append(run)
    rows = []
    for (model, method), group in groups.items():
        rank = group[0]["rank"]
        spectra = [values for run in group for values in run["spectra"].values()]
        shapes = [shape_of(values, rank) for values in spectra]
        row: dict[str, Any] = {"model": model, "method": method, "rank": rank, "of": len(spectra)}
        for key in ("flat", "effective", "steepest", "drop"):
            row[key] = mean(shape[key] for shape in shapes) if shapes else None
        conditions = torch.tensor([shape["condition"] for shape in shapes])
        row["condition"] = float(conditions.log().mean().exp()) if shapes else None
        row["accuracy"] = mean(run["accuracy"] for run in group)
        row["middle"] = [
            float(torch.tensor([values[i] for values in spectra]).median()) for i in range(rank)
        ] if spectra else []  # fmt: skip
        rows.append(row)
    return rows


VARIANCE = Experiment(
    "variance",
    "variance of the gradient of V, with the term and without",
    _variance_cells,
    _run_variance,
    _summarise_variance,
)
SPECTRUM = Experiment(
    "spectrum",
    "singular values of the trained update",
    _spectrum_cells,
    _run_spectrum,
    _summarise_spectrum,
)
