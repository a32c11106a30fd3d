"""Initialise the LoRA from what the model does with the photos."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]

from cntlora_core.config import CNTLoRAConfig, Factorization, RankBudget, Solver, Subspace, Unit
from cntlora_core.diffusion.settings import AdapterKind, AdapterSettings, Method, torch_dtype

from .pictures import image_tensor, shown
from .runtime import HostReporter, device_name, run_heavy, tell
from .sockets import (
    InitializationSocket,
    ModelChoice,
    ModelSocket,
    SubjectSocket,
    TrainingInitialization,
)
from .widgets import (
    ADVANCED,
    CATEGORY,
    LARGEST_SEED,
    NO_FOLDER,
    default_method,
    default_of,
    lora_file,
    lora_files,
    method_names,
    work_folder,
)

if TYPE_CHECKING:
    from cntlora_core.diffusion.stages import Initialization, Subject

SHIFT_KINDS = ("a number", "random (normal)")


def make_initialization(
    model: ModelChoice, subject: Subject, adapter: AdapterSettings, seed: int
) -> Initialization:
    """Load the model, let it read the photos, and plan the initialisation; then free the model."""
    from cntlora_core.diffusion.pipeline import load_stable_diffusion
    from cntlora_core.diffusion.stages import encode_subject, plan_initialization

    def plan(reporter: HostReporter) -> Initialization:
        reporter("loading the model", 0, 1, {})
        dtype = torch_dtype(model.precision)
        parts = load_stable_diffusion(
            model.path, dtype=dtype, device=device_name(), clip_skip=model.clip_skip
        )
        cache = work_folder() / "cache"
        encoded = encode_subject(parts, subject, cache=cache, reporter=reporter)
        return plan_initialization(parts, encoded, adapter, seed=seed, reporter=reporter)

    return run_heavy(plan)


class Initialize(io.ComfyNode):
    """Method, rank and the other settings of the initialisation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRAInitialize",
            display_name="Initialise the LoRA",
            category=CATEGORY,
            description="Initialises the LoRA: at random, or from what the model does with your "
            "photos. The plot shows the rank of each adapted layer.",
            inputs=[
                ModelSocket.Input("model", tooltip="The model that is to learn."),
                SubjectSocket.Input("subject", tooltip="What it is to learn."),
                *_main_inputs(),
                *_advanced_inputs(),
            ],
            outputs=[
                InitializationSocket.Output(
                    display_name="start", tooltip="To be connected to the training."
                ),
                io.Image.Output(
                    display_name="ranks", tooltip="Ranks of each part of the model, by depth."
                ),
                io.String.Output(display_name="report", tooltip="What was done, in a sentence."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelChoice,
        subject: Subject,
        method: Method,
        rank: int,
        alpha: float,
        train_text_encoder: bool,
        rank_budget: RankBudget,
        split: float,
        shift: float,
        shift_kind: str,
        factorization: Factorization,
        subspace: Subspace,
        damping: float,
        preserve_output: bool,
        min_rank: int,
        rho: float,
        passes: int,
        start_seed: int,
        adapter: AdapterKind,
        convolutions: bool,
        orthogonality: float,
        unit: Unit,
        solver: Solver,
        from_lora: str,
    ) -> io.NodeOutput:
        from cntlora_core.figures.plots import rank_picture

        cntlora = CNTLoRAConfig(
            rank_budget=rank_budget,
            split=split,
            shift=shift if shift_kind == SHIFT_KINDS[0] else "normal",
            factorization=factorization,
            subspace=subspace,
            unit=unit,
            damping=damping,
            solver=solver,
            preserve_output=preserve_output,
            min_rank=min_rank,
            rho=rho,
        )
        settings = AdapterSettings(
            method=method,
            adapter=adapter,
            rank=rank,
            alpha=alpha or None,
            train_text_encoder=train_text_encoder,
            convolutions=convolutions,
            orthogonality=orthogonality,
            init_passes=passes,
            cntlora=cntlora,
        )
        if file := lora_file(from_lora):  # it brings method, rank and alpha
            settings = AdapterSettings(from_lora=file, train_text_encoder=train_text_encoder)
        initialization = make_initialization(model, subject, settings, start_seed)
        picture = rank_picture(initialization.plan.ranks, f"{settings.method}: ranks")
        text = (
            initialization.report.summary()
            if initialization.report is not None
            else f"{method}, rank {rank}"
        )
        tell(text)
        return io.NodeOutput(
            TrainingInitialization(model, subject, initialization),
            image_tensor([picture]),
            text,
            ui=shown([picture]),
        )


def _main_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "method",
            options=method_names(),
            default=default_method(),
            tooltip="cross, self and shift are initialised from your photos (CNTLoRA). lora is the "
            "ordinary random initialisation; the rest are baselines to compare with.",
        ),
        io.Int.Input(
            "rank",
            default=default_of(AdapterSettings, "rank"),
            min=1,
            max=1280,
            tooltip="How much the LoRA can hold: the rank of each layer, on average where ranks "
            "vary. The small model takes 16.",
        ),
        io.Float.Input(
            "alpha",
            default=0.0,
            min=0.0,
            max=10000.0,
            step=1.0,
            tooltip="Scale of the LoRA: its output is multiplied by alpha / rank. 0 takes "
            "twice the rank.",
        ),
        io.Boolean.Input(
            "train_text_encoder",
            default=default_of(AdapterSettings, "train_text_encoder"),
            label_on="yes",
            label_off="no",
            tooltip="Teach the part that reads prompts as well. Binds the token better, and takes "
            "more memory.",
        ),
    ]


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "rank_budget",
            options=list(get_args(RankBudget)),
            default=default_of(CNTLoRAConfig, "rank_budget"),
            extra_dict=ADVANCED,
            tooltip="ranks: layers that need more get more, at the same total of ranks. "
            "parameters: at the same size of the LoRA. fixed: every layer gets the same rank.",
        ),
        io.Float.Input(
            "split",
            default=default_of(CNTLoRAConfig, "split"),
            min=0.0,
            max=1.0,
            step=0.05,
            extra_dict=ADVANCED,
            tooltip="Which of the two matrices carries the initialisation. More than 0.5 brings "
            "the subject out more, less keeps closer to the prompt.",
        ),
        io.Float.Input(
            "shift",
            default=default_of(CNTLoRAConfig, "shift"),
            min=-1000.0,
            max=1000.0,
            step=0.1,
            extra_dict=ADVANCED,
            tooltip="Only for the method shift: how far what the model knew is taken to be from "
            "your photos.",
        ),
        io.Combo.Input(
            "shift_kind",
            options=list(SHIFT_KINDS),
            default=SHIFT_KINDS[0],
            extra_dict=ADVANCED,
            tooltip="Only for the method shift: the number above, or a random matrix in its place.",
        ),
        io.Combo.Input(
            "factorization",
            options=list(get_args(Factorization)),
            default=default_of(CNTLoRAConfig, "factorization"),
            extra_dict=ADVANCED,
            tooltip="How the initialisation is divided into two matrices. qr has no split "
            "to choose.",
        ),
        io.Combo.Input(
            "subspace",
            options=list(get_args(Subspace)),
            default=default_of(CNTLoRAConfig, "subspace"),
            extra_dict=ADVANCED,
            tooltip="principal uses what your photos show most of; full uses all, noise too.",
        ),
        io.Float.Input(
            "damping",
            default=default_of(CNTLoRAConfig, "damping"),
            min=0.0,
            max=100.0,
            step=0.001,
            round=0.0001,
            extra_dict=ADVANCED,
            tooltip="Only for the unit mean: holds back directions that your photos hardly show; "
            "more is gentler.",
        ),
        io.Boolean.Input(
            "preserve_output",
            default=default_of(CNTLoRAConfig, "preserve_output"),
            label_on="yes",
            label_off="no",
            extra_dict=ADVANCED,
            tooltip="Begin the training at exactly the pre-trained model.",
        ),
        io.Int.Input(
            "min_rank",
            default=default_of(CNTLoRAConfig, "min_rank"),
            min=1,
            max=1280,
            extra_dict=ADVANCED,
            tooltip="No layer gets less than this where ranks vary.",
        ),
        io.Float.Input(
            "rho",
            default=default_of(CNTLoRAConfig, "rho"),
            min=1.0,
            max=100.0,
            step=0.1,
            extra_dict=ADVANCED,
            tooltip="No layer gets more than this many times the rank where ranks vary.",
        ),
        io.Int.Input(
            "passes",
            default=default_of(AdapterSettings, "init_passes"),
            min=1,
            max=1000,
            extra_dict=ADVANCED,
            tooltip="How often each photo is read, each time with other noise. More is steadier "
            "and slower.",
        ),
        io.Int.Input(
            "start_seed",
            display_name="seed",
            default=0,
            min=0,
            max=LARGEST_SEED,
            control_after_generate=False,
            extra_dict=ADVANCED,
            tooltip="Seed of the noise in which the photos are read, and of random "
            "initialisations.",
        ),
        io.Combo.Input(
            "adapter",
            options=list(get_args(AdapterKind)),
            default=default_of(AdapterSettings, "adapter"),
            extra_dict=ADVANCED,
            tooltip="lora: two matrices for each attention layer. lava: the UNet's "
            "convolutions learn too, with few weights for each; its methods are cross, self, shift "
            "and lora.",
        ),
        io.Boolean.Input(
            "convolutions",
            default=default_of(AdapterSettings, "convolutions"),
            label_on="yes",
            label_off="no",
            extra_dict=ADVANCED,
            tooltip="Only for lava: teach the convolutions, or the attention alone.",
        ),
        io.Float.Input(
            "orthogonality",
            default=default_of(AdapterSettings, "orthogonality"),
            min=0.0,
            max=100.0,
            step=0.01,
            round=1e-6,
            extra_dict=ADVANCED,
            tooltip="Only for lava: how strongly the training keeps what it learns in directions "
            "of their own; 0 is off.",
        ),
        io.Combo.Input(
            "unit",
            options=list(get_args(Unit)),
            default=default_of(CNTLoRAConfig, "unit"),
            extra_dict=ADVANCED,
            tooltip="least-change measures what the photos show such that each layer changes "
            "least; mean measures all layers alike, and changes those that read text much more.",
        ),
        io.Combo.Input(
            "solver",
            options=list(get_args(Solver)),
            default=default_of(CNTLoRAConfig, "solver"),
            extra_dict=ADVANCED,
            tooltip="exact takes longer in wide layers; the report says how far off fast may be.",
        ),
        io.Combo.Input(
            "from_lora",
            options=lora_files(),
            default=NO_FOLDER,
            extra_dict=ADVANCED,
            tooltip="Train this LoRA of ComfyUI's loras folder further, whoever made it. Its "
            "layers, ranks and alphas stay: of the other widgets, only train_text_encoder counts.",
        ),
    ]


NODES = [Initialize]
