"""Generate images with a LoRA, and compare several LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from torch import Tensor

from cntlora_core.data.prompts import prompts_for_loras

from .pictures import image_tensor, shown
from .runtime import HostReporter, device_name, run_heavy
from .sockets import LoRAModel, LoRASocket, ModelChoice, ModelSocket
from .widgets import ADVANCED, CATEGORY, LARGEST_SEED, lines, numbers

if TYPE_CHECKING:
    from PIL import Image

    from cntlora_core.diffusion.pipeline import Pipeline
    from cntlora_core.diffusion.sampler import LoRAUse
    from cntlora_core.diffusion.settings import SamplingSettings

SCHEDULERS = ("model's own", "dpm++_karras", "dpm++", "euler", "euler_a", "ddim", "pndm", "unipc")
COMPARED = 6


def lora_use(lora: dict[str, Tensor], strength: float = 1.0) -> LoRAUse:
    """A LoRA from a socket, as the core generates images with it."""
    from cntlora_core.diffusion.sampler import LoRAUse

    return LoRAUse(Path(LoRAModel.of(lora).label), strength, lora)


def prompt_lines(text: str, loras: list[dict[str, Tensor]]) -> tuple[str, ...]:
    """One prompt for each line, with {token} and {class} as the LoRAs were taught them.

    Raises:
        ValueError: there is no prompt, or the LoRAs do not say what {token} and {class} are.
    """
    prompts = prompts_for_loras(lines(text), [LoRAModel.of(lora).metadata for lora in loras])
    if not prompts:
        raise ValueError("there is no prompt: write at least one line into prompts")
    return prompts


def sampling_settings(
    steps: int, guidance: float, negative_prompt: str, resolution: int, scheduler: str
) -> SamplingSettings:
    """The core's settings from what the widgets hold."""
    from cntlora_core.diffusion.settings import SamplingSettings

    return SamplingSettings(
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        resolution=resolution or None,
        scheduler=None if scheduler == SCHEDULERS[0] else scheduler,  # pyright: ignore[reportArgumentType]
    )


def load_pipeline(
    model: ModelChoice, loras: list[LoRAUse], scheduler: str | None, reporter: HostReporter
) -> Pipeline:
    from cntlora_core.diffusion.sampler import load_for_sampling

    reporter("loading the model", 0, 1, {})
    return load_for_sampling(
        model.path,
        loras,
        precision=model.precision,
        device=device_name(),
        scheduler=scheduler,
        clip_skip=model.clip_skip,
        prediction_type=model.prediction_type,
    )


class DrawPictures(io.ComfyNode):
    """The stock diffusers pipeline, for SD1.5 and for the small model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRASample",
            display_name="Generate Images (diffusers)",
            category=CATEGORY,
            description="Generates images with the model that was taught, with the LoRA or "
            "without. The small model needs this node. With SD1.5, Apply Subject LoRA and KSampler "
            "generate images too.",
            inputs=[
                ModelSocket.Input("model", tooltip="The model that generates the images."),
                LoRASocket.Input(
                    "lora", optional=True, tooltip="The LoRA; without it, the model as it was."
                ),
                io.String.Input(
                    "prompts",
                    default="a photo of sks dog in the snow",
                    multiline=True,
                    tooltip="One image for each line. {token} and {class} are filled in from the "
                    "LoRA.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.05,
                    tooltip="How strongly the LoRA acts; 1 as trained.",
                ),
                io.Int.Input(
                    "per_prompt", default=1, min=1, max=64, tooltip="Images for each prompt."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=True,
                    tooltip="Seed of the first image; the next image has the next seed.",
                ),
                *sampling_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The images, one batch."),
                io.String.Output(
                    display_name="prompts",
                    tooltip="The prompt of each image, a line each, for Measure Images.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelChoice,
        prompts: str,
        strength: float,
        per_prompt: int,
        seed: int,
        steps: int,
        guidance: float,
        negative_prompt: str,
        resolution: int,
        scheduler: str,
        lora: dict[str, Tensor] | None = None,
    ) -> io.NodeOutput:
        from cntlora_core.diffusion.sampler import generate

        given = [] if lora is None else [lora]
        asked = [prompt for prompt in prompt_lines(prompts, given) for _ in range(per_prompt)]
        settings = sampling_settings(steps, guidance, negative_prompt, resolution, scheduler)
        loras = [lora_use(lora, strength) for lora in given]
        seeds = list(range(seed, seed + len(asked)))

        def sample(reporter: HostReporter) -> list[Image.Image]:
            pipeline = load_pipeline(model, loras, settings.scheduler, reporter)
            return generate(pipeline, asked, settings, seeds=seeds, reporter=reporter)

        pictures = run_heavy(sample)
        return io.NodeOutput(image_tensor(pictures), "\n".join(asked), ui=shown(pictures))


class CompareLoRAs(io.ComfyNode):
    """One labelled grid: LoRAs by prompts, strengths and seeds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRACompare",
            display_name="Compare LoRAs (grid)",
            category=CATEGORY,
            description="The same prompts and seeds with each LoRA, side by side and labelled: "
            "methods, numbers of steps, strengths, seeds.",
            is_output_node=True,
            inputs=[
                ModelSocket.Input("model", tooltip="The model that generates the images."),
                *(
                    LoRASocket.Input(
                        f"lora_{i}",
                        optional=i > 1,
                        tooltip="A LoRA: a row of the grid. Its method and steps label it.",
                    )
                    for i in range(1, COMPARED + 1)
                ),
                io.String.Input(
                    "prompts",
                    default="a photo of sks dog\na photo of sks dog in the snow",
                    multiline=True,
                    tooltip="One column for each line. {token} and {class} are filled in from the "
                    "LoRAs.",
                ),
                io.String.Input(
                    "strengths",
                    default="1.0",
                    tooltip="Strengths of each LoRA, separated by commas, as in 0.6, 0.8, 1.0.",
                ),
                io.String.Input(
                    "seeds", default="0, 1", tooltip="Seeds of each prompt, separated by commas."
                ),
                io.Boolean.Input(
                    "with_base",
                    default=True,
                    label_on="yes",
                    label_off="no",
                    tooltip="A row for the model without a LoRA.",
                ),
                *sampling_inputs(),
            ],
            outputs=[io.Image.Output(display_name="grid", tooltip="The labelled grid.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelChoice,
        lora_1: dict[str, Tensor],
        prompts: str,
        strengths: str,
        seeds: str,
        with_base: bool,
        steps: int,
        guidance: float,
        negative_prompt: str,
        resolution: int,
        scheduler: str,
        lora_2: dict[str, Tensor] | None = None,
        lora_3: dict[str, Tensor] | None = None,
        lora_4: dict[str, Tensor] | None = None,
        lora_5: dict[str, Tensor] | None = None,
        lora_6: dict[str, Tensor] | None = None,
    ) -> io.NodeOutput:
        from cntlora_core.diffusion.compare import Comparison, compare

        given = [x for x in (lora_1, lora_2, lora_3, lora_4, lora_5, lora_6) if x is not None]
        comparison = Comparison(
            prompt_lines(prompts, given),
            numbers(strengths, float, "strengths"),
            numbers(seeds, int, "seeds"),
            with_base,
            sampling_settings(steps, guidance, negative_prompt, resolution, scheduler),
        )
        rows = [(LoRAModel.of(lora).label, lora_use(lora)) for lora in given]

        def sample(reporter: HostReporter) -> Image.Image:
            pipeline = load_pipeline(model, [], comparison.sampling.scheduler, reporter)
            return compare(pipeline, rows, comparison, reporter)

        grid = run_heavy(sample)
        return io.NodeOutput(image_tensor([grid]), ui=shown([grid]))


def sampling_inputs() -> list[Any]:
    """The widgets that :func:`sampling_settings` takes."""
    return [
        io.Int.Input("steps", default=30, min=1, max=1000, tooltip="Sampling steps."),
        io.Float.Input(
            "guidance",
            default=7.5,
            min=0.0,
            max=100.0,
            step=0.5,
            tooltip="How closely the image follows the prompt (CFG). The small model likes 2.5.",
        ),
        io.String.Input("negative_prompt", default="", tooltip="What the images should not show."),
        io.Int.Input(
            "resolution",
            default=0,
            min=0,
            max=2048,
            step=8,
            extra_dict=ADVANCED,
            tooltip="Side of the images in pixels; 0 is the model's own.",
        ),
        io.Combo.Input(
            "scheduler",
            options=list(SCHEDULERS),
            default=SCHEDULERS[0],
            extra_dict=ADVANCED,
            tooltip="The sampler.",
        ),
    ]


NODES = [DrawPictures, CompareLoRAs]
