"""CNTLoRA's own variants as methods; ``CNTLoRAConfig`` holds their settings."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cntlora_core.config import CNTLoRAConfig, Constraint
from cntlora_core.methods.base import InitializationRequest, Method, PlanFn, PlannedInitialization

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import LoraConfig

    from cntlora_core.layers.attachment import AttachmentPoint

PAPER = "arXiv 2507.08044"


def settings_for(constraint: Constraint, config: CNTLoRAConfig | None) -> CNTLoRAConfig:
    """The settings under a method's constraint; one that was given must not contradict it.

    Raises:
        ValueError: naming both.
    """
    config = config or CNTLoRAConfig(constraint=constraint)
    if config.constraint == constraint:
        return config
    if config.constraint != CNTLoRAConfig.constraint:
        raise ValueError(
            f"method={constraint!r} and cntlora.constraint={config.constraint!r} disagree: "
            "give the method alone"
        )
    return dataclasses.replace(config, constraint=constraint)


def ranks_and_scalings(
    lora_config: LoraConfig, points: Sequence[AttachmentPoint], config: CNTLoRAConfig
) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and scaling of each point as peft would give them.

    Raises:
        ValueError: if ``rank_budget`` would overwrite patterns of the configuration's own.
    """
    from cntlora_core.adapter.inject import configured_ranks

    if config.rank_budget != "fixed" and (lora_config.rank_pattern or lora_config.alpha_pattern):
        raise ValueError(
            "the configuration has a rank_pattern or alpha_pattern of its own, which the "
            f"ranks of rank_budget={config.rank_budget!r} would overwrite: leave them out, or "
            "use rank_budget='fixed'"
        )
    return configured_ranks(lora_config, [p.name for p in points])


def _plan(constraint: Constraint) -> PlanFn:
    def plan(request: InitializationRequest) -> PlannedInitialization:
        from cntlora_core.initialization.solve import solve

        config = settings_for(constraint, request.cntlora_config)
        config = dataclasses.replace(config, seed=config.seed + request.seed)
        assert request.batches is not None
        rank, scaling = request.rank, request.scaling
        if request.lora_config is not None:
            rank, scaling = ranks_and_scalings(request.lora_config, request.points, config)
        planned = solve(
            request.model,
            request.points,
            request.batches,
            config,
            rank=rank,
            scaling=scaling,
            forward_fn=request.forward_fn,
            mask_fn=request.mask_fn,
            progress=request.passes_progress,
            solve_progress=request.solve_progress,
        )
        return PlannedInitialization(*planned)

    return plan


def _method(constraint: Constraint, description: str) -> Method:
    return Method(
        name=constraint,
        description=description,
        paper=PAPER,
        needs="activations",
        rewrites_base=True,
        b_initialized_to_zero=False,
        family="cntlora",
        image_file="trained minus initial",
        plan=_plan(constraint),
    )


CNTLORA_METHODS = (
    _method("cross", "CNTLoRA-X: undoes the second moment of your data's activations (inverse)"),
    _method("self", "CNTLoRA-S: evens your data's activations out (inverse square root)"),
    _method("shift", "CNTLoRA-Sh: takes your data for a constant shift of what the model knew"),
)
