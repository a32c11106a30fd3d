"""Run by test_processes.py: initialisations of tiny models under Accelerate, written down for the
test.

Usage: python many_processes.py FOLDER. Under each number of processes, every process leaves
FOLDER/<scenario>-<processes>-<rank>.safetensors with its factors and rewritten weights, or .txt
with its error. One process by itself leaves the same with 1 for the number of processes.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration, debug_launcher
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cntlora_core import CNTLoRAConfig, get_cntlora_model, initialize_lora_cntlora_weights
from cntlora_core.adapter.inject import adapter_layers
from cntlora_core.initialization.solve import plan_from_first
from cntlora_core.runtime.processes import Processes

FIXED = CNTLoRAConfig(rank_budget="fixed")


class Net(nn.Module):
    """q and k read one tensor, or two equal ones where a batch's first number is 1; ``rare`` is
    called only where it is positive."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(2, width, 2)
        self.q, self.k, self.rare = (nn.Linear(width, 4) for _ in range(3))

    def forward(self, x):
        h = torch.tanh(self.conv(x)).mean((2, 3))
        flag = float(x.flatten()[0])
        y = self.q(h) + self.k(h.clone() if flag == 1 else h)
        return y + self.rare(h) if flag > 0 else y


def batches(flags: list[float], size: int = 6) -> list[torch.Tensor]:
    made = []
    for i, flag in enumerate(flags):
        x = torch.randn(size, 2, 4, 4, generator=torch.Generator().manual_seed(i))
        x[0, 0, 0, 0] = flag
        made.append(x)
    return made


def part(all_of_them: list, shares: list[int]) -> list:
    """This process's share: so many batches for each rank, all of them for a lone process."""
    if not dist.is_initialized():
        return all_of_them
    first = sum(shares[: dist.get_rank()])
    return all_of_them[first : first + shares[dist.get_rank()]]


def initialize(data, config=FIXED, net: Net | None = None, **options) -> PeftModel:
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["conv", "q", "k", "rare"])
    return get_cntlora_model(net or Net(), lora, config, data, **options)


def uneven():
    return initialize(part(batches([-1, 0, 2, 2, -1, 0, 2]), [5, 2, 0]), CNTLoRAConfig())


def in_float64():
    data = [x.double() for x in batches([2, 2, 2])]
    return initialize(part(data, [2, 1, 0]), net=Net().double())


def a_point_is_called_on_one_process_only():
    return initialize(part(batches([-1, -1, 2, 2]), [2, 2, 0]))


def no_point_of_a_kind_is_called_anywhere():
    return initialize(part(batches([-1, -1, -1]), [2, 1, 0]))


def sharing_differs():
    return initialize(part(batches([2, 2, 1, 1]), [2, 2, 0]))


def sharing_ends():
    return initialize(part(batches([2, 2, 2, 1]), [2, 2, 0]))


def sharing_ends_in_a_stream():
    return initialize(iter(part(batches([2, 2, 2, 1]), [2, 2, 0])))


def wrapped():
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["q", "k"]))
    return initialize_lora_cntlora_weights(model, part(batches([2, 2, 2]), [1, 2, 0]))


def accelerate_dataloader():
    rows = TensorDataset(torch.cat(batches([2, 2, 2]))[:17])
    loader = DataLoader(rows, batch_size=2)
    if dist.is_initialized():
        even = DataLoaderConfiguration(even_batches=False)
        loader = Accelerator(cpu=True, dataloader_config=even).prepare(loader)
    return initialize(loader, forward_fn=lambda model, batch: model(batch[0]))


def non_finite():
    data = batches([2, 2, 2, 2])
    data[2][1] = float("nan")
    return initialize(part(data, [2, 2, 0]))


def no_batches():
    return initialize([])


def other_points():
    alone = not dist.is_initialized() or dist.get_rank() == 0
    return initialize(batches([2]), net=Net(5 if alone else 6))


def other_settings():
    alone = not dist.is_initialized() or dist.get_rank() == 0
    return initialize(batches([2]), CNTLoRAConfig(damping=0.1 if alone else 0.2))


def one_cannot_prepare():
    net = Net()
    if dist.is_initialized() and dist.get_rank() == 1:
        net.q = nn.Embedding(3, 3)
    return initialize(batches([2]), net=net)


def the_first_cannot_solve():
    def make():
        raise ZeroDivisionError("on the first")

    return plan_from_first(make, Processes())


def by_itself():
    if dist.is_initialized() and dist.get_rank() > 0:
        raise LookupError("takes no part")
    return initialize(batches([2, 2]), sum_across_processes=False)


def repeated_samples():
    """The warning about a dataloader that repeats samples, as the error text."""
    loader = DataLoader(TensorDataset(torch.cat(batches([2]))[:5]), batch_size=2)
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logging.getLogger("cntlora_core").addHandler(handler)
    if dist.is_initialized():
        loader = Accelerator(cpu=True).prepare(loader)
    initialize(loader, forward_fn=lambda model, batch: model(batch[0]))
    logging.getLogger("cntlora_core").removeHandler(handler)
    raise LookupError("; ".join(seen))


SCENARIOS = (
    uneven,
    in_float64,
    a_point_is_called_on_one_process_only,
    no_point_of_a_kind_is_called_anywhere,
    sharing_differs,
    sharing_ends,
    sharing_ends_in_a_stream,
    wrapped,
    accelerate_dataloader,
    non_finite,
    no_batches,
    other_points,
    other_settings,
    one_cannot_prepare,
    the_first_cannot_solve,
    by_itself,
    repeated_samples,
)


def run_all(folder: Path) -> None:
    processes, rank = 1, 0
    if "ACCELERATE_DEBUG_RDV_FILE" in os.environ:
        PartialState(cpu=True)
        processes, rank = dist.get_world_size(), dist.get_rank()
    for scenario in SCENARIOS:
        stem = folder / f"{scenario.__name__}-{processes}-{rank}"
        try:
            model = scenario()
        except Exception as error:
            stem.with_suffix(".txt").write_text(f"{type(error).__name__}: {error}")
            continue
        tensors = {"rows": torch.tensor(list(model.cntlora_report.rows.values()))}
        for name, layer in adapter_layers(model).items():
            tensors[f"{name}.down"] = layer.lora_A["default"].weight.detach()
            tensors[f"{name}.up"] = layer.lora_B["default"].weight.detach()
            tensors[f"{name}.base"] = layer.get_base_layer().weight.detach()
        save_file(tensors, stem.with_suffix(".safetensors"))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
    for number in (2, 3):
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()
        debug_launcher(run_all, (Path(sys.argv[1]),), num_processes=number)
