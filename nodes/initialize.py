"""Initialise the LoRA from what the model does with the photos."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]

from cntlora_core.diffusion.settings import AdapterKind, AdapterSettings, Method, torch_dtype

from .initialization_options import (
    initialization_options,
    not_the_defaults,
    option_inputs,
)
from .pictures import image_tensor, shown
from .runtime import HostReporter, device_name, run_heavy, tell
from .sockets import (
    InitializationOptions,
    InitializationOptionsSocket,
    InitializationSocket,
    ModelChoice,
    ModelSocket,
    SubjectSocket,
    TrainingInitialization,
)
from .widgets import (
    ADVANCED,
    CATEGORY,
    HIDDEN,
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

SAVED_ORDER = (
    "rank_budget", "split", "shift", "shift_kind", "factorization", "subspace",
    "damping", "preserve_output", "min_rank", "rho", "passes", "start_seed",
    "adapter", "convolutions", "orthogonality", "unit", "solver", "from_lora",
)  # fmt: skip


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
            model.path,
            dtype=dtype,
            device=device_name(),
            clip_skip=model.clip_skip,
            prediction_type=model.prediction_type,
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
                InitializationOptionsSocket.Input(
                    "options",
                    optional=True,
                    tooltip="What few people change, from Initialisation Options.",
                ),
                *_later_inputs(),
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
        options: InitializationOptions | None = None,
        passes: int = AdapterSettings.init_passes,
        start_seed: int = 0,
        adapter: AdapterKind = AdapterSettings.adapter,
        from_lora: str = NO_FOLDER,
        **moved: Any,
    ) -> io.NodeOutput:
        from cntlora_core.figures.plots import rank_picture

        unseen = ""
        if options is None:  # what a graph holds that was saved before these had their own node
            options = initialization_options(**moved)
            unseen = not_the_defaults(options)
        lava = {"convolutions": options.convolutions, "orthogonality": options.orthogonality}
        settings = AdapterSettings(
            method=method,
            adapter=adapter,
            rank=rank,
            alpha=alpha or None,
            train_text_encoder=train_text_encoder,
            **(lava if adapter == "lava" else {}),
            init_passes=passes,
            cntlora=options.cntlora,
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
        if unseen:
            text += f"\nThis graph was saved with {unseen}. Initialisation Options takes its place."
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
            "vary. The paper has 128 for SD1.5.",
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


def _later_inputs() -> list[io.Input]:
    """In the order of the graphs that were saved before some of them moved to a node of their own.

    ComfyUI keeps the values of a saved graph by place. Those that moved still count, unseen.
    """
    moved = {widget.id: widget for widget in option_inputs(optional=True, extra_dict=HIDDEN)}
    widgets = moved | {widget.id: widget for widget in _advanced_inputs()}
    return [widgets[name] for name in SAVED_ORDER]


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "passes",
            default=default_of(AdapterSettings, "init_passes"),
            min=1,
            max=1000,
            optional=True,
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
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Seed of the noise in which the photos are read, and of random "
            "initialisations.",
        ),
        io.Combo.Input(
            "adapter",
            options=list(get_args(AdapterKind)),
            default=default_of(AdapterSettings, "adapter"),
            optional=True,
            extra_dict=ADVANCED,
            tooltip="lora: two matrices for each attention layer. lava: the UNet's "
            "convolutions learn too, with few weights for each; its methods are cross, self, shift "
            "and lora.",
        ),
        io.Combo.Input(
            "from_lora",
            options=lora_files(),
            default=NO_FOLDER,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Train this LoRA of ComfyUI's loras folder further, whoever made it. Its "
            "layers, ranks and alphas stay: of the other widgets, only train_text_encoder counts.",
        ),
    ]


NODES = [Initialize]
