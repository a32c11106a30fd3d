"""Choose the model that is to be taught, once for the training and for ComfyUI's own nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from torch import Tensor

from cntlora_core.diffusion.settings import (
    JobSettings,
    PredictionType,
    TrainingPrecision,
    TrainingSettings,
)

from .host import folder_paths
from .runtime import device_precision
from .sockets import ModelChoice, ModelSocket
from .widgets import ADVANCED, CATEGORY, SMALL_MODEL, default_of, model_names, model_path

MODELS_OWN = "model's own"


class LoadModel(io.ComfyNode):
    """A Stable Diffusion model, checked but not yet in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRALoadModel",
            display_name="Load Model to Teach",
            category=CATEGORY,
            description="Chooses the Stable Diffusion 1.5 or XL model that is to learn your "
            "subject: a checkpoint, a diffusers folder, or the small model that comes with this "
            "pack.",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=model_names(),
                    tooltip="A Stable Diffusion 1.5 or XL model or a fine-tune of it, from "
                    "ComfyUI's checkpoints or diffusers folder. The small model generates 64 px "
                    "images and trains in minutes on a CPU: good for trials.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(get_args(TrainingPrecision)),
                    default=default_of(TrainingSettings, "precision"),
                    extra_dict=ADVANCED,
                    tooltip="Number format of the model while it is in use. float32 is exact; "
                    "bfloat16 and float16 halve the memory and lose a little. auto: what "
                    "ComfyUI's device computes well in, bfloat16 on recent cards.",
                ),
                io.Int.Input(
                    "clip_skip",
                    default=default_of(JobSettings, "clip_skip"),
                    min=1,
                    max=12,
                    extra_dict=ADVANCED,
                    tooltip="Which layer of the text encoder is read, from the last: 1 is that. "
                    "Models of drawings often want 2. Open Model for KSampler sets the same.",
                ),
                io.Combo.Input(
                    "prediction_type",
                    options=[MODELS_OWN, *get_args(PredictionType)],
                    default=MODELS_OWN,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="What the model predicts. Its file says so, or it is epsilon; set "
                    "v_prediction for a v-prediction model whose file says nothing. Open Model for "
                    "KSampler sets the same.",
                ),
            ],
            outputs=[ModelSocket.Output(display_name="model", tooltip="The model to teach.")],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None) -> bool | str:
        """Say at once, in words, if the file is no Stable Diffusion 1.5 or XL model."""
        if checkpoint is None:  # it comes from another node, which has not run yet
            return True
        try:
            _schedule(model_path(checkpoint))
        except (OSError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls,
        checkpoint: str,
        precision: str,
        clip_skip: int = 1,
        prediction_type: str = MODELS_OWN,
    ) -> str:
        """Changes when the file does, also under the same name."""
        from cntlora_core.diffusion.fingerprint import fingerprint_model

        model = fingerprint_model(model_path(checkpoint))
        return f"{model} {precision} {clip_skip} {prediction_type}"

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        precision: TrainingPrecision,
        clip_skip: int = 1,
        prediction_type: str = MODELS_OWN,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            ModelChoice(
                checkpoint,
                model_path(checkpoint),
                device_precision() if precision == "auto" else precision,
                clip_skip,
                None if prediction_type == MODELS_OWN else prediction_type,  # pyright: ignore[reportArgumentType]
            )
        )


class OpenModel(io.ComfyNode):
    """The chosen model as ComfyUI's own MODEL, CLIP and VAE; loaded only where they are used."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CNTLoRAOpenModel",
            display_name="Open Model for KSampler",
            category=CATEGORY,
            description="Opens the model that is taught for ComfyUI's own nodes, in place of Load "
            "Checkpoint: the checkpoint is chosen once, for training and for sampling.",
            inputs=[
                ModelSocket.Input("model", tooltip="The chosen model, from Load Model to Teach."),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="To Apply Subject LoRA."),
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip="To Apply Subject LoRA; it reads the layer that clip_skip names.",
                ),
                io.Vae.Output(display_name="VAE", tooltip="To VAE Decode."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelChoice) -> io.NodeOutput:
        if model.name == SMALL_MODEL:
            raise ValueError(
                "KSampler cannot use the small model: generate images with Generate Images "
                "(diffusers), or choose a checkpoint of Stable Diffusion"
            )
        from cntlora_core.diffusion.family import family_of

        denoiser, clip, vae = _opened(model)
        if model.clip_skip > 1:
            clip = clip.clone()
            # ComfyUI counts from the last layer of all, SDXL from the last that it reads.
            unread = max(family_of(model.path).unread_layers.values(), default=0)
            clip.clip_layer(-model.clip_skip - unread)
        return io.NodeOutput(_as_it_predicts(denoiser, model), clip, vae)


def _opened(model: ModelChoice) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE; of a diffusers folder from the files that the training reads."""
    import comfy.sd  # pyright: ignore[reportMissingImports]

    from cntlora_core.diffusion.family import family_of

    embeddings = folder_paths.get_folder_paths("embeddings")
    if model.path.is_dir():
        texts = [_text_weights(model.path, part) for part in family_of(model.path).text_encoders]
        return (
            comfy.sd.load_diffusion_model_state_dict(_weights(model.path, "unet")),
            comfy.sd.load_text_encoder_state_dicts(texts, embedding_directory=embeddings),
            comfy.sd.VAE(sd=_weights(model.path, "vae")),
        )
    path = str(model.path)
    return comfy.sd.load_checkpoint_guess_config(path, embedding_directory=embeddings)[:3]


def _schedule(path: Path, prediction_type: PredictionType | None = None) -> dict[str, Any]:
    """The scheduler's settings that training and sampling go by.

    Raises:
        CheckpointError: the file or folder is no model of a known family.
    """
    from cntlora_core.diffusion.family import family_of
    from cntlora_core.diffusion.prediction import scheduler_config

    family = family_of(path)
    return scheduler_config(path, path if path.is_dir() else family.configs, prediction_type)


def _as_it_predicts(denoiser: Any, model: ModelChoice) -> Any:
    """A MODEL that is sampled by what it predicts in the training.

    ComfyUI reads neither a folder's scheduler nor a file's header, nor what a person chose.
    """
    schedule = _schedule(model.path, model.prediction_type)
    predicts = schedule.get("prediction_type", "epsilon")
    if predicts == "epsilon" and model.prediction_type is None:
        return denoiser
    from comfy_extras.nodes_model_advanced import (  # pyright: ignore[reportMissingImports]
        ModelSamplingDiscrete,
    )

    sampling = "eps" if predicts == "epsilon" else predicts
    zero_snr = bool(schedule.get("rescale_betas_zero_snr"))
    return ModelSamplingDiscrete().patch(denoiser, sampling, zero_snr)[0]


def _text_weights(folder: Path, part: str) -> dict[str, Tensor]:
    """With the level of names that ComfyUI looks for and transformers 5 leaves out."""
    whole = ("text_model.", "text_projection.")
    return {
        name if name.startswith(whole) else f"text_model.{name}": tensor
        for name, tensor in _weights(folder, part).items()
    }


def _weights(folder: Path, part: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    from cntlora_core.diffusion.checkpoint import folder_weights

    files = folder_weights(folder, part)
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


NODES = [LoadModel, OpenModel]
