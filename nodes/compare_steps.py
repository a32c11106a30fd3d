"""The LoRAs that a training kept on the way, side by side and scored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from torch import Tensor

from .evaluate import encoder_inputs
from .pictures import image_tensor, shown
from .runtime import HostReporter, device_name, run_heavy, tell
from .sample import load_pipeline, lora_use, prompt_lines, sampling_inputs, sampling_settings
from .sockets import LoRAModel, LoRASocket, ModelChoice, ModelSocket, SubjectSocket
from .widgets import CATEGORY, LARGEST_SEED, encoder_source

if TYPE_CHECKING:
    from cntlora_core.diffusion.sampler import LoRAUse
    from cntlora_core.diffusion.stages import Subject
    from cntlora_core.metrics.steps import StepComparison


def steps_of(lora: LoRAModel) -> list[tuple[int, LoRAUse]]:
    """The snapshots of the run that a LoRA comes from, and the LoRA itself, by step.

    Raises:
        ValueError: it comes from no training, or from one that kept no snapshots.
    """
    from cntlora_core.diffusion.sampler import LoRAUse
    from cntlora_core.diffusion.snapshots import snapshots_in

    own = int(lora.metadata.get("ss_steps", 0))
    kept = [] if lora.path is None else snapshots_in(lora.path.parent)
    loras = [(s.step, LoRAUse(s.path)) for s in kept if s.step != own]
    if not loras:
        raise ValueError(
            "there are no snapshots to compare: connect the lora of Teach the Subject, with "
            "save_lora_every above 0 (under Show Advanced) when it was trained"
        )
    return sorted([*loras, (own, lora_use(lora))], key=lambda item: item[0])


class CompareSteps(io.ComfyNode):
    """A column for each snapshot of a run, and the best trade-off."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRACompareSteps",
            display_name="Compare Steps (best snapshot)",
            category=CATEGORY,
            description="The same prompts and seeds with every LoRA that the training kept on the "
            "way: too few steps do not show the subject, too many show nothing else. Scores them, "
            "and gives the LoRA of the best trade-off.",
            is_output_node=True,
            inputs=[
                ModelSocket.Input("model", tooltip="The model that generates the images."),
                SubjectSocket.Input("subject", tooltip="Your subject; its photos are compared."),
                LoRASocket.Input(
                    "lora", tooltip="From Teach the Subject, with save_lora_every above 0."
                ),
                io.String.Input(
                    "prompts",
                    default="a photo of {token} {class}\na photo of {token} {class} in the snow\n"
                    "a photo of {token} {class} on the beach",
                    multiline=True,
                    tooltip="One row for each line. Surroundings that the photos do not show tell "
                    "most. {token} and {class} are filled in from the LoRA.",
                ),
                io.Int.Input(
                    "per_prompt",
                    default=2,
                    min=1,
                    max=64,
                    tooltip="Images for each prompt and step. More make the scores surer.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=False,
                    tooltip="Seed of the first image of each prompt; the next has the next seed.",
                ),
                *sampling_inputs(),
                *encoder_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="The labelled grid."),
                io.String.Output(display_name="report", tooltip="Scores and balance of each step."),
                LoRASocket.Output(
                    display_name="best lora",
                    tooltip="The LoRA of the best step; the one that came in, where none is best.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelChoice,
        subject: Subject,
        lora: dict[str, Tensor],
        prompts: str,
        per_prompt: int,
        seed: int,
        steps: int,
        guidance: float,
        negative_prompt: str,
        resolution: int,
        scheduler: str,
        dino: str,
        clip: str,
    ) -> io.NodeOutput:
        import dataclasses

        from cntlora_core.metrics.encoders import load_encoders
        from cntlora_core.metrics.generation import GenerationSettings
        from cntlora_core.metrics.steps import compare_steps

        given = LoRAModel.of(lora)
        loras = steps_of(given)
        settings = sampling_settings(steps, guidance, negative_prompt, resolution, scheduler)
        asked = GenerationSettings(
            prompt_lines(prompts, [given]),
            per_prompt,
            sampling=dataclasses.replace(settings, seed=seed),
        )
        sources = encoder_source(dino, "vision"), encoder_source(clip, "clip")

        def look(reporter: HostReporter) -> StepComparison:
            reporter("loading the encoders", 0, 1, {})
            encoders = load_encoders(*sources, device=device_name(), local_files_only=True)
            return compare_steps(
                load_pipeline(model, [], settings.scheduler, reporter),
                loras,
                asked,
                photos=[photo.image for photo in subject.photos.photos],
                encoders=encoders,
                token=subject.prompts.token,
                reporter=reporter,
            )

        found = run_heavy(look)
        text = found.report()
        tell(text)
        best = dict(loras)[found.steps[-1] if found.best is None else found.best]
        chosen = given if best.tensors is not None else LoRAModel.read(best.path)
        return io.NodeOutput(image_tensor([found.sheet]), text, chosen, ui=shown([found.sheet]))


NODES = [CompareSteps]
