"""Choose the model that is to be taught."""

from __future__ import annotations

from typing import get_args

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]

from cntlora_core.diffusion.settings import JobSettings, Precision, TrainingSettings

from .sockets import ModelChoice, ModelSocket
from .widgets import ADVANCED, CATEGORY, default_of, model_names, model_path


class LoadModel(io.ComfyNode):
    """A Stable Diffusion 1.5 model, checked but not yet in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRALoadModel",
            display_name="Load SD1.5 to Teach",
            category=CATEGORY,
            description="Chooses the Stable Diffusion 1.5 model that is to learn your subject: a "
            "checkpoint, a diffusers folder, or the small model that comes with this pack.",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=model_names(),
                    tooltip="A Stable Diffusion 1.5 model or a fine-tune of it, from ComfyUI's "
                    "checkpoints or diffusers folder. The small model generates 64 px images "
                    "and trains in minutes on a CPU: good for trials.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(get_args(Precision)),
                    default=default_of(TrainingSettings, "precision"),
                    extra_dict=ADVANCED,
                    tooltip="Number format of the model while it is in use. float32 is exact; "
                    "bfloat16 and float16 halve the memory and lose a little.",
                ),
                io.Int.Input(
                    "clip_skip",
                    default=default_of(JobSettings, "clip_skip"),
                    min=1,
                    max=12,
                    extra_dict=ADVANCED,
                    tooltip="Which layer of the text encoder is read, from the last: 1 is that. "
                    "Models of drawings often want 2 (CLIP Set Last Layer: -2).",
                ),
            ],
            outputs=[ModelSocket.Output(display_name="model", tooltip="The model to teach.")],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None) -> bool | str:
        """Say at once, in words, if the file is no Stable Diffusion 1.5 model."""
        from cntlora_core.diffusion.checkpoint import require_sd15

        if checkpoint is None:  # it comes from another node, which has not run yet
            return True
        try:
            require_sd15(model_path(checkpoint))
        except (OSError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, precision: str, clip_skip: int = 1) -> str:
        """Changes when the file does, also under the same name."""
        from cntlora_core.diffusion.fingerprint import fingerprint_model

        return f"{fingerprint_model(model_path(checkpoint))} {precision} {clip_skip}"

    @classmethod
    def execute(cls, checkpoint: str, precision: Precision, clip_skip: int = 1) -> io.NodeOutput:
        return io.NodeOutput(ModelChoice(checkpoint, model_path(checkpoint), precision, clip_skip))


NODES = [LoadModel]
