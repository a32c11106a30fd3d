"""What few people change in an initialisation: a node of its own, and where it stood before."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]

from cntlora_core.config import CNTLoRAConfig, Factorization, RankBudget, Solver, Subspace, Unit
from cntlora_core.diffusion.settings import AdapterSettings

from .sockets import InitializationOptions, InitializationOptionsSocket
from .widgets import CATEGORY, default_of

SHIFT_KINDS = ("a number", "random (normal)")


class Options(io.ComfyNode):
    """The rare settings of *Initialise the LoRA*."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRAInitializationOptions",
            display_name="Initialisation Options",
            category=CATEGORY,
            description="What the initialisation computes, in detail. Without this node, the "
            "defaults that it shows are taken.",
            inputs=option_inputs(),
            outputs=[
                InitializationOptionsSocket.Output(
                    display_name="options", tooltip="To Initialise the LoRA."
                )
            ],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        return io.NodeOutput(initialization_options(**widgets))


def initialization_options(
    shift: float = default_of(CNTLoRAConfig, "shift"),
    shift_kind: str = SHIFT_KINDS[0],
    convolutions: bool = AdapterSettings.convolutions,
    orthogonality: float = AdapterSettings.orthogonality,
    **others: Any,
) -> InitializationOptions:
    """The core's settings from what the widgets hold.

    Args:
        shift: The number.
        shift_kind: One of SHIFT_KINDS; whether the number counts.
        convolutions: As in AdapterSettings.
        orthogonality: As in AdapterSettings.
        others: Fields of CNTLoRAConfig.
    """
    cntlora = CNTLoRAConfig(shift=shift if shift_kind == SHIFT_KINDS[0] else "normal", **others)
    return InitializationOptions(cntlora, convolutions, orthogonality)


def not_the_defaults(options: InitializationOptions) -> str:
    """The settings that differ from the defaults, as name=value; empty where none does."""
    usual = InitializationOptions(
        CNTLoRAConfig(), AdapterSettings.convolutions, AdapterSettings.orthogonality
    )
    now, before = (
        {**dataclasses.asdict(o), **dataclasses.asdict(o.cntlora)} for o in (options, usual)
    )
    return ", ".join(
        f"{name}={value}"
        for name, value in now.items()
        if name != "cntlora" and value != before[name]
    )


def option_inputs(**common: Any) -> list[io.Input]:
    """The widgets of this node; what is given holds for each."""
    return [
        io.Combo.Input(
            "rank_budget",
            options=list(get_args(RankBudget)),
            default=default_of(CNTLoRAConfig, "rank_budget"),
            **common,
            tooltip="ranks: layers that need more get more, at the same total of ranks. "
            "parameters: at the same size of the LoRA. fixed: every layer gets the same rank.",
        ),
        io.Float.Input(
            "split",
            default=default_of(CNTLoRAConfig, "split"),
            min=0.0,
            max=1.0,
            step=0.05,
            **common,
            tooltip="Which of the two matrices carries the initialisation. More than 0.5 brings "
            "the subject out more, less keeps closer to the prompt.",
        ),
        io.Float.Input(
            "shift",
            default=default_of(CNTLoRAConfig, "shift"),
            min=-1000.0,
            max=1000.0,
            step=0.1,
            **common,
            tooltip="Only for the method shift: how far what the model knew is taken to be from "
            "your photos.",
        ),
        io.Combo.Input(
            "shift_kind",
            options=list(SHIFT_KINDS),
            default=SHIFT_KINDS[0],
            **common,
            tooltip="Only for the method shift: the number above, or a random matrix in its place.",
        ),
        io.Combo.Input(
            "factorization",
            options=list(get_args(Factorization)),
            default=default_of(CNTLoRAConfig, "factorization"),
            **common,
            tooltip="How the initialisation is divided into two matrices. qr has no split "
            "to choose.",
        ),
        io.Combo.Input(
            "subspace",
            options=list(get_args(Subspace)),
            default=default_of(CNTLoRAConfig, "subspace"),
            **common,
            tooltip="principal uses what your photos show most of; full uses all, noise too.",
        ),
        io.Float.Input(
            "damping",
            default=default_of(CNTLoRAConfig, "damping"),
            min=0.0,
            max=100.0,
            step=0.001,
            round=0.0001,
            **common,
            tooltip="Only for the unit mean: holds back directions that your photos hardly show; "
            "more is gentler.",
        ),
        io.Boolean.Input(
            "preserve_output",
            default=default_of(CNTLoRAConfig, "preserve_output"),
            label_on="yes",
            label_off="no",
            **common,
            tooltip="Begin the training at exactly the pre-trained model.",
        ),
        io.Int.Input(
            "min_rank",
            default=default_of(CNTLoRAConfig, "min_rank"),
            min=1,
            max=1280,
            **common,
            tooltip="No layer gets less than this where ranks vary.",
        ),
        io.Float.Input(
            "rho",
            default=default_of(CNTLoRAConfig, "rho"),
            min=1.0,
            max=100.0,
            step=0.1,
            **common,
            tooltip="No layer gets more than this many times the rank where ranks vary.",
        ),
        io.Boolean.Input(
            "convolutions",
            default=default_of(AdapterSettings, "convolutions"),
            label_on="yes",
            label_off="no",
            **common,
            tooltip="Only for lava: teach the convolutions, or the attention alone.",
        ),
        io.Float.Input(
            "orthogonality",
            default=default_of(AdapterSettings, "orthogonality"),
            min=0.0,
            max=100.0,
            step=0.01,
            round=1e-6,
            **common,
            tooltip="Only for lava: how strongly the training keeps what it learns in directions "
            "of their own; 0 is off.",
        ),
        io.Combo.Input(
            "unit",
            options=list(get_args(Unit)),
            default=default_of(CNTLoRAConfig, "unit"),
            **common,
            tooltip="least-change measures what the photos show such that each layer changes "
            "least; mean measures all layers alike, and changes those that read text much more.",
        ),
        io.Combo.Input(
            "solver",
            options=list(get_args(Solver)),
            default=default_of(CNTLoRAConfig, "solver"),
            **common,
            tooltip="exact takes longer in wide layers; the report says how far off fast may be.",
        ),
    ]


NODES = [Options]
