"""Pre-training a network once, and fine-tuning it in several ways."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cntlora_core.benchmark.lava.networks import Network, adapted_modules, build_network
from cntlora_core.benchmark.lava.pictures import Pictures, source_pictures, target_pictures
from cntlora_core.benchmark.lava.settings import LavaBenchmark, ModelName, TaskName
from cntlora_core.lava import LavaConfig, OrthogonalityLoss
from cntlora_core.runtime.files import save_safetensors_atomic, write_json_atomic
from cntlora_core.runtime.progress import Reporter

if TYPE_CHECKING:
    from cntlora_core.benchmark.lava.networks import TextNetwork

MethodName = Literal["head", "full", "lora", "lava", "lava_term", "lava_wide"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)


@dataclass
class Task:
    """A pre-trained network, and what it is fine-tuned on.

    Attributes:
        name: Whose layout the network has.
        network: The network, as it was pre-trained.
        settings: The benchmark's.
        pictures: By seed; of a text, tokens (n, length) in place of pictures.
        sample: Makes those of a seed; default: the settings' pictures.
    """

    name: TaskName
    network: Network | TextNetwork
    settings: LavaBenchmark
    pictures: dict[int, Pictures] = field(default_factory=dict)
    sample: Callable[[int], Pictures] | None = None

    def data(self, seed: int) -> Pictures:
        if seed not in self.pictures:
            sample = self.sample or (lambda seed: target_pictures(self.settings, seed))
            self.pictures[seed] = sample(seed)
        return self.pictures[seed]

    def fresh(self, seed: int) -> Network | TextNetwork:
        """A copy, with a new head where the classes are others."""
        torch.manual_seed(seed)
        network = copy.deepcopy(self.network)
        classes = self.data(seed).classes
        if classes != network.head.out_features:
            network.head = nn.Linear(network.head.in_features, classes)
        return network


def prepare_task(
    name: ModelName, settings: LavaBenchmark, folder: Path, reporter: Reporter
) -> Task:
    """Pre-train a network, or read one that was pre-trained before under the same settings."""
    classes, sample = source_pictures(settings)
    torch.manual_seed(0)
    network = build_network(name, classes, settings.width)
    kind = {
        key: value
        for key, value in settings.identity().items()
        if key in ("pretraining_steps", "batch", "size", "width", "quick")
    } | {"source": settings.source}
    weights, note = folder / f"{name}.safetensors", folder / f"{name}.json"
    if note.is_file() and json.loads(note.read_text("utf-8"))["settings"] == kind:
        network.load_state_dict(load_file(weights))
        return Task(name, network.eval(), settings)
    generator = torch.Generator().manual_seed(17)
    steps = settings.pretraining_steps
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    network.train()
    for step in range(steps):
        pictures, labels = sample(settings.batch, generator)
        loss = nn.functional.cross_entropy(network(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        reporter(f"pre-training {name}", step + 1, steps, {"loss": loss.item()})
    found = accuracy(network, sample(min(1000, 8 * settings.batch), generator))
    state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    save_safetensors_atomic(state, weights)
    write_json_atomic(note, {"settings": kind, "accuracy": found})
    return Task(name, network.eval(), settings)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


class FlattenedLoRA(nn.Module):
    """LoRA on a kernel flattened to a matrix (c_out, c_in kh kw), in groups or not.

    For one group this is peft's LoRA of a convolution; in groups peft asks for a rank that they
    divide, and reads the channels of all of them.
    """

    def __init__(self, weight: Tensor, rank: int, scaling: float) -> None:
        super().__init__()
        width = weight[0].numel()
        self.down = nn.Parameter(torch.empty(rank, width).uniform_(-1, 1) / math.sqrt(width))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.scaling = scaling

    def delta(self) -> Tensor:
        return self.scaling * (self.up @ self.down)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta().reshape(weight.shape)


@dataclass
class Adapted:
    """A network that is ready to be fine-tuned.

    Attributes:
        network: What is called.
        penalty: What its loss has added; None for nothing.
        rank: Of its adapters, if any.
    """

    network: nn.Module
    penalty: Callable[[], Tensor] | None = None
    rank: int | None = None

    def counts(self) -> tuple[int, int]:
        """Trained parameters without the head's, and all there are without adapters."""
        trained = sum(
            p.numel()
            for n, p in self.network.named_parameters()
            if p.requires_grad and ".head." not in f".{n}"
        )
        adapters = ("lava_", ".parametrizations.weight.0.")
        whole = sum(
            p.numel()
            for n, p in self.network.named_parameters()
            if not any(word in n for word in adapters)
        )
        return trained, whole


def adapt(
    network: Network | TextNetwork,
    method: MethodName,
    settings: LavaBenchmark,
    *,
    rank: int | None = None,
    strength: float | None = None,
    **lava: Any,
) -> Adapted:
    """Give a network's convolutions (or what else it names) adapters; the head is always trained.

    Args:
        network: A pre-trained network; it is changed.
        method: head: nothing else is trained; full: all; lora: :class:`FlattenedLoRA`; lava:
            without the orthogonality term; lava_term: with it; lava_wide: with it, at the rank that
            has about as many parameters as LoRA at the given one.
        settings: The benchmark's.
        rank: Default: the benchmark's.
        strength: The term's; default: the benchmark's.
        lava: Further settings of :class:`LavaConfig`.
    """
    rank = rank or settings.rank
    modules = adapted_modules(network)
    if method == "full":
        return Adapted(network.requires_grad_(True))
    network.requires_grad_(False)
    if method == "lora":
        for module in modules.values():
            change = FlattenedLoRA(_weight(module), rank, 1.0)
            parametrize.register_parametrization(module, "weight", change)
            module.parametrizations.weight.original.requires_grad_(False)  # pyright: ignore
    penalty, used = None, rank if method != "head" else None
    if method.startswith("lava"):
        if method == "lava_wide":
            shapes = [_weight(module).shape for module in modules.values()]
            flat = sum(shape[0] + shape[1:].numel() for shape in shapes)
            sides = sum(sum(shape) for shape in shapes)
            rank = used = max(1, round(rank * flat / sides))
        lam = settings.orthogonality if strength is None else strength
        config = LavaConfig(
            r=rank,
            lava_alpha=rank,
            target_modules=list(modules),
            orthogonality=0.0 if method == "lava" else lam,
            **lava,
        )
        model = get_peft_model(network, config)
        penalty = OrthogonalityLoss(model)
        network.head.requires_grad_(True)
        return Adapted(model, penalty, used)
    network.head.requires_grad_(True)
    return Adapted(network, penalty, used)


def finetune(
    adapted: Adapted,
    data: Pictures,
    settings: LavaBenchmark,
    learning_rate: float,
    seed: int,
    *,
    steps: int | None = None,
    at_step: Callable[[int], None] | None = None,
) -> list[float]:
    """AdamW at a constant learning rate without weight decay, as the paper's toy experiment.

    Args:
        adapted: The network.
        data: Its ``train`` part is used.
        settings: Batch size and number of steps.
        learning_rate: The learning rate.
        seed: Of the batches.
        steps: Default: the settings'.
        at_step: Called with the number of steps done, the network's mode being the trained one's.

    Returns:
        The loss of each step, without penalty.
    """
    network, (pictures, labels) = adapted.network, data.train
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(5_000 + seed)
    losses = []
    network.train()
    if at_step is not None:
        at_step(0)
    for step in range(steps or settings.steps):
        chosen = torch.randint(len(labels), (settings.batch,), generator=generator)
        loss = nn.functional.cross_entropy(network(pictures[chosen]), labels[chosen])
        losses.append(loss.item())
        if adapted.penalty is not None:
            loss = loss + adapted.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if at_step is not None:
            at_step(step + 1)
            network.train()
    network.eval()
    return losses


@torch.no_grad()
def accuracy(network: nn.Module, pictures: tuple[Tensor, Tensor]) -> float:
    """Share of right answers, the network in eval mode for it."""
    mode = network.training
    network.eval()
    right = sum(
        int((network(part).argmax(1) == labels).sum())
        for part, labels in zip(pictures[0].split(128), pictures[1].split(128))
    )
    network.train(mode)
    return right / len(pictures[1])
