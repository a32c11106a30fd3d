"""Memory of a training step by precision, resolution and gradient checkpointing.

    python -m cntlora_core.benchmark.training_memory --output docs/experiments/training_memory.json

Stable Diffusion 1.5 at full size passes through the trainer's own step as fake tensors, which have
shapes and no values: what is alive at any moment is counted, and nothing is computed. What the
allocator and the libraries add to it is not counted. ``--real`` runs one step on the CPU too, and
compares its count, and the growth of the process, with the fake one's.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import init_empty_weights
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cntlora_core.benchmark.peak import peak_bytes, reset_peak
from cntlora_core.data.latents import LatentSet
from cntlora_core.diffusion.batches import Batch, SameShape, TrainingData
from cntlora_core.diffusion.family import SD15, UNET
from cntlora_core.diffusion.initialize import diffusion_attachment_points
from cntlora_core.diffusion.pipeline import build_model
from cntlora_core.diffusion.settings import AdapterSettings, TrainingSettings, torch_dtype
from cntlora_core.diffusion.trainer import SubjectTrainer
from cntlora_core.initialization.plan import plan_plain_lora
from cntlora_core.runtime.files import write_json_atomic
from cntlora_core.runtime.memory import freed_memory_kept

SIZES = ("weights", "between_steps", "peak")


@dataclass(frozen=True)
class Benchmark:
    """What is measured.

    Attributes:
        output: JSON file for the result.
        precisions: Data types of the frozen base.
        resolutions: Sides of the images in pixels.
        rank: Rank of the adapters.
        batch_size: Photos a step; as many class images go with them.
        real: Also run one step of the smallest resolution and the first precision on the CPU.
    """

    output: Path = Path("training_memory.json")
    precisions: tuple[str, ...] = ("float32", "bfloat16", "float16")
    resolutions: tuple[int, ...] = (512, 768)
    rank: int = 128
    batch_size: int = 1
    real: bool = False


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, of those that operations return within it.

    Attributes:
        now: Bytes alive.
        peak: The most that were alive at once since the start, or since it was set.

    Args:
        known: Tensors whose bytes are counted elsewhere.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def trainer_of(b: Benchmark, precision: str, checkpointing: bool) -> SubjectTrainer:
    """A trainer of Stable Diffusion 1.5's size with plain LoRA."""
    with init_empty_weights():
        networks = {part: build_model(part, SD15.configs) for part in (UNET, *SD15.text_encoders)}
    for network in networks.values():
        torch.nn.Module.to(network, torch_dtype(precision)).eval()
        for module in network.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                memory = torch.empty(weight.shape, dtype=weight.dtype)  # not used until touched
                module.register_parameter(name, nn.Parameter(memory, requires_grad=False))
    adapter = AdapterSettings(method="lora", rank=b.rank)
    points = diffusion_attachment_points(networks, SD15, adapter)
    latent = torch.zeros(4, 8, 8)
    latents = LatentSet((latent,), (latent,), ("",), (0,), (False,), 1.0, 0, (None,))
    tokens = torch.zeros(1, 77, dtype=torch.long)
    return SubjectTrainer(
        networks,
        SD15,
        DDPMScheduler(),
        plan_plain_lora(points, rank=b.rank, scaling=adapter.scaling),
        TrainingData(latents, tokens, latents, tokens),
        adapter=adapter,
        training=TrainingSettings(
            device="cpu",
            batch_size=b.batch_size,
            precision=precision,  # pyright: ignore[reportArgumentType]
            gradient_checkpointing=checkpointing,
        ),
        prior_weight=0.1,
    )


def one_batch(b: Benchmark, resolution: int) -> Batch:
    """As many photos as class images, all of one shape."""
    n, side = 2 * b.batch_size, resolution // 8
    latents, noise = torch.randn(2, n, 4, side, side)
    shape = SameShape(torch.arange(n), latents, noise, None)
    tokens = torch.zeros(n, 77, dtype=torch.long)
    return Batch(
        (shape,), torch.full((n,), 500), tokens, b.batch_size, (b.batch_size, b.batch_size)
    )


def measure(
    b: Benchmark,
    precision: str,
    checkpointing: bool,
    resolutions: Sequence[int],
    fake: bool = True,
) -> list[dict[str, Any]]:
    """By resolution: bytes of the base's weights, of all that stays between two steps, and of a
    step's peak."""
    trainer: Any = trainer_of(b, precision, checkpointing)
    networks = trainer.networks.values()
    for network in networks:
        network.train()
    base = sum(p.nbytes for m in networks for p in m.parameters() if not p.requires_grad)
    before = base + sum(p.nbytes for p in trainer.parameters.values())
    before += sum(tensor.nbytes for tensor in trainer._initial.values())
    if not fake:
        for weight in (p for m in networks for p in m.parameters() if not p.requires_grad):
            weight.normal_(0, 0.01)
    trainer._look_every = 10  # fake tensors have no values to look at

    def step(resolution: int) -> None:
        batch = one_batch(b, resolution)
        trainer._batch = lambda _micro: batch
        trainer._one_step()

    rows, known = [], [t for m in networks for t in (*m.parameters(), *m.buffers())]
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext() as mode:
        known += trainer._initial.values()
        if mode is not None:
            # Of fake prompts it is not known which are the same.
            trainer._batch_loss.conditioning = lambda b: SD15.encode(trainer.networks, b.tokens)
            known = [mode.from_tensor(tensor) for tensor in known]
        with LiveBytes(known) as live:
            step(min(resolutions))  # the optimizer's state comes with the first step
            for resolution in resolutions:
                live.peak = live.now
                reset_peak()
                step(resolution)
                rows.append(
                    {
                        "precision": precision,
                        "resolution": resolution,
                        "gradient_checkpointing": checkpointing,
                        "weights": base,
                        "between_steps": before + live.now,
                        "peak": before + live.peak,
                        **({} if fake else {"process_peak": peak_bytes()}),
                    }
                )
    return rows


def run(b: Benchmark) -> dict[str, Any]:
    """All rows; the result is also written to ``b.output``."""
    result: dict[str, Any] = {
        "settings": {k: str(v) for k, v in dataclasses.asdict(b).items()},
        "torch": torch.__version__,
        "rows": [],
    }
    for precision, checkpointing in itertools.product(b.precisions, (False, True)):
        rows = measure(b, precision, checkpointing, b.resolutions)
        result["rows"] += rows
        for row in rows:
            sizes = (f"{name} {row[name] / 1e9:.2f}" for name in SIZES)
            print(precision, row["resolution"], checkpointing, *sizes, "GB", flush=True)
        write_json_atomic(b.output, result)
    if b.real:
        case = (b.precisions[0], False, [min(b.resolutions)])
        with freed_memory_kept():
            result["real"] = measure(b, *case, fake=False)
        print(result["real"])
        write_json_atomic(b.output, result)
    return result


if __name__ == "__main__":
    run(tyro.cli(Benchmark))
