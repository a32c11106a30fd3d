"""LAVA on a network under one of its initialisations."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from cntlora_core.benchmark.lava.finetuning import Adapted, adapt
from cntlora_core.benchmark.lava.networks import Network, adapted_modules
from cntlora_core.benchmark.lava.pictures import Pictures
from cntlora_core.benchmark.lava.settings import LavaBenchmark
from cntlora_core.config import CNTLoRAConfig, Constraint
from cntlora_core.lava import LavaConfig, OrthogonalityLoss, get_lava_model

if TYPE_CHECKING:
    from cntlora_core.benchmark.lava.networks import TextNetwork


def initialized(
    network: Network | TextNetwork,
    initialization: str,
    data: Pictures,
    settings: LavaBenchmark,
    seed: int,
) -> tuple[Adapted, dict[str, Any]]:
    """Wrap a network's convolutions, and what there is to say of the initialisation.

    Args:
        network: A pre-trained network; it is changed.
        initialization: ``orthogonal`` or ``lora``, which read nothing, or a constraint of
            CNTLoRA's.
        data: What the closed forms read: up to four batches of its ``train`` part.
        settings: The benchmark's.
        seed: Of what is random in the initialisation.
    """
    began = time.perf_counter()
    if initialization in ("orthogonal", "lora"):
        adapted = adapt(network, "lava_term", settings, init_weights=initialization)
        return adapted, {
            "initialization_seconds": time.perf_counter() - began,
            "initialization_error": 0.0,
        }
    config = LavaConfig(
        r=settings.rank,
        lava_alpha=settings.rank,
        target_modules=list(adapted_modules(network)),
        orthogonality=settings.orthogonality,
    )
    closed_form = CNTLoRAConfig(
        constraint=cast(Constraint, initialization), rank_budget="fixed", seed=seed
    )
    network.eval()
    batches = [_without_empty_columns(b) for b in data.train[0].split(settings.batch)[:4]]
    model = get_lava_model(
        network.requires_grad_(False),
        config,
        closed_form,
        batches,
        forward_fn=lambda model, batch: model(batch),
        mask_fn=None if batches[0].is_floating_point() else lambda batch: batch != 0,
    )
    network.head.requires_grad_(True)
    report = model.lava_report
    found = {
        "initialization_seconds": time.perf_counter() - began,
        "initialization_error": report.relative_error,
        "plain_modules": len(report.plain),
    }
    return Adapted(model, OrthogonalityLoss(model), settings.rank), found


def _without_empty_columns(batch: Tensor) -> Tensor:
    """Tokens (n, length) up to the longest text, as the network cuts them; pictures as they are."""
    return batch if batch.is_floating_point() else batch[:, : int((batch != 0).sum(1).max())]
