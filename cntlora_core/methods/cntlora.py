"""CNTLoRA's own variants as methods; ``CNTLoRAConfig`` holds their settings."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cntlora_core.config import CNTLoRAConfig, Constraint
from cntlora_core.methods.base import Method, StartReport, StartRequest, WrapFn, WrappedModel

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

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


def _wrap(constraint: Constraint) -> WrapFn:
    def wrap(model: nn.Module, lora_config: LoraConfig, request: StartRequest) -> WrappedModel:
        from cntlora_core.methods.peft_model import InitReport, get_cntlora_model

        config = settings_for(constraint, request.cntlora_config)
        config = dataclasses.replace(config, seed=config.seed + request.seed)
        assert request.batches is not None
        started = get_cntlora_model(
            model,
            lora_config,
            config,
            request.batches,
            forward_fn=request.forward_fn,
            mask_fn=request.mask_fn,
            progress=request.passes_progress,
        )
        report = started.cntlora_report
        assert isinstance(report, InitReport)
        return WrappedModel(
            started,
            StartReport(
                method=constraint,
                ranks=report.ranks,
                pass_seconds=report.capture_seconds,
                solve_seconds=report.solve_seconds,
                filled=report.filled,
                rounding=report.rounding,
            ),
            plan=started.cntlora_plan,  # pyright: ignore[reportArgumentType]
        )

    return wrap


def _method(constraint: Constraint, description: str) -> Method:
    return Method(
        name=constraint,
        description=description,
        paper=PAPER,
        needs="activations",
        rewrites_base=True,
        b_starts_at_zero=False,
        family="cntlora",
        image_file="trained minus start",
        wrap=_wrap(constraint),
    )


CNTLORA_METHODS = (
    _method("cross", "CNTLoRA-X: undoes the second moment of your data's activations (inverse)"),
    _method("self", "CNTLoRA-S: evens your data's activations out (inverse square root)"),
    _method("shift", "CNTLoRA-Sh: takes your data for a constant shift of what the model knew"),
)
