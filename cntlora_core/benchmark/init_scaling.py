"""How the initialisation's cost grows with images, rank, width and depth of a small transformer.

Each phase is timed on its own: the bare forward passes; the sums of second moments (the accumulator
on rows of the right shape, once for each distinct input); the linear algebra after them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from cntlora_core.activations.moments import SecondMoment
from cntlora_core.benchmark.init_plots import PHASES, plot_scaling
from cntlora_core.benchmark.init_settings import InitBenchmark
from cntlora_core.benchmark.initialization_speed import machine
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.methods.peft_model import get_cntlora_model
from cntlora_core.runtime.console import result_console
from cntlora_core.runtime.files import require_writable_folder, write_json_atomic
from cntlora_core.runtime.progress import Reporter, silent

EXPECTED = {
    "images": "forwards and sums in proportion; linear algebra not at all",
    "rank": "the factors' part of the linear algebra (d_out * d_in * k) only",
    "width": "forwards and sums with its square; so do few eigenpairs, all of them with its cube",
    "depth": "everything in proportion",
}
"""What the arithmetic says of each variable."""

TARGETS = r".*attention.*\.(query|key|value|q_proj|k_proj|v_proj)"  # old and new transformers


@dataclass(frozen=True)
class Shape:
    """A vision transformer, its data and its adapters.

    Attributes:
        images: How many are read.
        rank: Of the adapters.
        width: Of the transformer; heads are 32 wide.
        depth: Layers.
        side: Of an image in pixels; a patch has 16.
    """

    images: int
    rank: int
    width: int
    depth: int
    side: int


BASE = Shape(images=8, rank=16, width=384, depth=6, side=224)
SWEEPS: dict[str, Sequence[int]] = {
    "images": (1, 2, 4, 8, 16, 32),
    "rank": (4, 8, 16, 32, 64, 128),
    "width": (96, 192, 384, 768, 1536),
    "depth": (2, 4, 8, 16),
}
TINY_BASE = Shape(images=2, rank=2, width=64, depth=1, side=32)
TINY_SWEEPS: dict[str, Sequence[int]] = {
    "images": (1, 2),
    "rank": (2, 4),
    "width": (32, 64),
    "depth": (1, 2),
}


def measure_shape(shape: Shape, repeats: int, seed: int = 0) -> dict[str, Any]:
    """Median seconds of each phase, and what the initialisation holds.

    Returns:
        ``seconds`` by phase, ``distinct_inputs``, ``moment_bytes`` and ``rows`` of each moment.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _transformer(shape)
        batches = [
            {"pixel_values": torch.randn(1, 3, shape.side, shape.side)} for _ in range(shape.images)
        ]
        rows_of_one = torch.randn((shape.side // 16) ** 2 + 1, shape.width)
    config = LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules=TARGETS)

    def forwards() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    def sums() -> None:
        moment = SecondMoment(shape.width)
        for _ in range(shape.images):
            moment.update(rows_of_one)
        moment.result()

    reports: list[Any] = []
    for _ in range(repeats):
        adapted = get_cntlora_model(copy.deepcopy(model), config, CNTLoRAConfig(), batches)
        reports.append(adapted.cntlora_report)
    distinct = reports[0].distinct_inputs
    return {
        "seconds": {
            "forwards": median_seconds(forwards, repeats),
            "sums": distinct * median_seconds(sums, repeats),
            "linear algebra": median(report.solve_seconds for report in reports),
        },
        "distinct_inputs": distinct,
        "moment_bytes": distinct * shape.width**2 * 4,
        "rows": max(reports[0].rows.values()),
    }


def _transformer(shape: Shape) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=max(1, shape.width // 32),
        intermediate_size=4 * shape.width,
        image_size=shape.side,
        patch_size=16,
    )
    return ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that does not count."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def growth_exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """The e of ``seconds ~ values^e``: a straight line through the upper half of the logarithms.

    The lower half is where fixed costs hide the growth.
    """
    from numpy import log, polyfit

    half = max(2, math.ceil(len(values) / 2))
    return float(polyfit(log(values[-half:]), log(seconds[-half:]), 1)[0])


def run_scaling(settings: InitBenchmark, reporter: Reporter = silent) -> dict[str, Any]:
    """Measure all sweeps; writes ``scaling.json`` and ``scaling.png``, returns the former's.

    Raises:
        OSError: the output folder cannot be written to.
    """
    folder = require_writable_folder(settings.output)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    base, sweeps = (TINY_BASE, TINY_SWEEPS) if settings.quick else (BASE, SWEEPS)
    total = sum(len(values) for values in sweeps.values())
    done = 0
    result: dict[str, Any] = {
        "base": asdict(base),
        "repeats": settings.repeats,
        "machine": machine(),
        "sweeps": {},
    }
    reporter("measuring shapes", 0, total, {})
    for variable, values in sweeps.items():
        points = []
        for value in values:
            shape = replace(base, **{variable: value})
            found = measure_shape(shape, settings.repeats, settings.seed)
            points.append({"value": value, **found})
            done += 1
            said = ", ".join(f"{phase} {s:.3f} s" for phase, s in found["seconds"].items())
            reporter("measuring shapes", done, total, {"note": f"{variable} {value}: {said}"})
        largest = points[-1]["seconds"]
        result["sweeps"][variable] = {
            "points": points,
            "exponents": {
                phase: growth_exponent(
                    [float(v) for v in values], [p["seconds"][phase] for p in points]
                )
                for phase in PHASES
            },
            "bounded_by": max(largest, key=lambda phase: largest[phase]),
            "expected": EXPECTED[variable],
        }
        write_json_atomic(folder / "scaling.json", result)
    plot_scaling(result, folder / "scaling.png")
    return result


def show_scaling(result: dict[str, Any], console: Console | None = None) -> None:
    """Print exponents and bounds as a table."""
    phases = (f"{phase} ~ x^" for phase in PHASES)
    table = Table("what grows (x)", *phases, "bounded by", "what the arithmetic says")
    for variable, sweep in result["sweeps"].items():
        exponents = (f"{sweep['exponents'][phase]:.2f}" for phase in PHASES)
        table.add_row(variable, *exponents, sweep["bounded_by"], sweep["expected"])
    (console or result_console()).print(table)
