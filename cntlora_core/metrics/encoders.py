"""The encoders that measure images: one that sees (DINO), and one that also reads (CLIP).

Both are transformers' own classes, by hub id or folder, from safetensors files only. Pictures are
cut to their middle square first, so that no image processor squeezes them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from cntlora_core import mini
from cntlora_core.data.captions import encode_prompts
from cntlora_core.runtime.hub import why_not_fetched
from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.runtime.reading import (
    FLOATS,
    HEADER_LIMIT,
    is_finite,
    parse_header,
    read_json_object,
    reading,
    require_file,
    user_path,
)
from cntlora_core.runtime.threads import threads, threads_for_encoder

DINO = "facebook/dino-vits16"
"""The encoder of the subject in DreamBooth's protocol."""

CLIP = "openai/clip-vit-large-patch14"
"""The encoder of pictures and prompts."""

SMALL = "small"
"""Stands for the encoders that come with this package, made for pictures of 64 pixels."""

BATCH_SIZE = 16
_OTHER_ENCODER = (
    "Download the folder again, or give another, or 'small' for the encoders that come along."
)
_FILES = ("*.json", "*.txt", "*.safetensors")


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """Pictures to features.

    Attributes:
        model: A vision transformer of transformers'; its first token stands for the picture.
        processor: Its image processor.
        source: Where it came from.
    """

    model: Any
    processor: Any
    source: str

    def encode_images(self, pictures: Sequence[Image.Image], reporter: Reporter = silent) -> Tensor:
        """Features of length 1, float32 (n, d)."""
        return _encode_images(
            pictures,
            self.processor,
            lambda pixels: self.model(pixel_values=pixels).last_hidden_state[:, 0],
            self.model.device,
            self.model.config,
            reporter,
            "looking at pictures (DINO)",
        )


@dataclass(frozen=True, eq=False)
class ClipEncoder:
    """Pictures and prompts to features in one space.

    Attributes:
        model: A CLIPModel.
        processor: Its image processor.
        tokenizer: Of its text tower.
        source: Where it came from.
    """

    model: Any
    processor: Any
    tokenizer: Any
    source: str

    def encode_images(self, pictures: Sequence[Image.Image], reporter: Reporter = silent) -> Tensor:
        """Features of length 1, float32 (n, d)."""
        return _encode_images(
            pictures,
            self.processor,
            lambda pixels: _rows(self.model.get_image_features(pixel_values=pixels)),
            self.model.device,
            self.model.config.vision_config,
            reporter,
            "looking at pictures (CLIP)",
        )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
        """Features of length 1, float32 (n, d); and what of long prompts is not read."""
        encoded = encode_prompts(prompts, self.tokenizer)
        rows = []
        for start in range(0, len(prompts), BATCH_SIZE):
            tokens = encoded.input_ids[start : start + BATCH_SIZE].to(self.model.device)
            with threads(threads_for_encoder(self.model.config.vision_config)):
                rows.append(_rows(self.model.get_text_features(input_ids=tokens)).float().cpu())
        return functional.normalize(torch.cat(rows), dim=-1), encoded.messages


@dataclass(frozen=True, eq=False)
class Encoders:
    """What an evaluation measures with."""

    dino: ImageEncoder
    clip: ClipEncoder

    @property
    def sources(self) -> dict[str, str]:
        """Where both came from, for records."""
        return {"dino": self.dino.source, "clip": self.clip.source}

    def notes(self, pictures: Sequence[Image.Image]) -> tuple[str, ...]:
        """What a person should know who has these pictures measured by these encoders."""
        seen = {
            "DINO": (self.dino.source, self.dino.model.config.image_size),
            "CLIP": (self.clip.source, self.clip.model.config.vision_config.image_size),
        }
        side = max(min(picture.size) for picture in pictures)
        small = [name for name, (src, limit) in seen.items() if src == SMALL and side > limit]
        if not small:
            return ()
        return (
            f"the small {' and '.join(small)} encoder reads pictures of 64 px and was made for "
            f"those of the small model; these are of {side} px, so choose others for scores that "
            "mean something",
        )


def load_encoders(
    dino: str | Path = DINO,
    clip: str | Path = CLIP,
    *,
    device: str | torch.device = "cpu",
    local_files_only: bool = False,
) -> Encoders:
    """Load both encoders.

    Args:
        dino: Hub id or folder of a vision transformer; ``"small"`` is the package's own.
        clip: Hub id or folder of a CLIPModel with tokenizer; ``"small"`` likewise.
        device: Where they work.
        local_files_only: Take a hub id from the hub's cache, without network.

    Raises:
        FileNotFoundError: there is none, or it lacks a file.
        ValueError: it is of another kind.
    """
    return Encoders(
        load_image_encoder(dino, device=device, local_files_only=local_files_only),
        load_clip(clip, device=device, local_files_only=local_files_only),
    )


def load_encoders_for(
    model: str | Path | None,
    dino: str | Path | None = None,
    clip: str | Path | None = None,
    **loading: Any,
) -> Encoders:
    """The encoders that were asked for, else those that suit a model's images.

    Args:
        model: What generates the images: for the small model ``"small"`` is the default, for any
            other the hub's `DINO` and `CLIP`.
        dino: As in :func:`load_encoders`, which also says what is raised.
        clip: Likewise.
        loading: Device and so on, likewise.
    """
    small = model is not None and Path(model).resolve() == mini.model_path()
    return load_encoders(
        dino or (SMALL if small else DINO), clip or (SMALL if small else CLIP), **loading
    )


def load_image_encoder(
    source: str | Path = DINO,
    *,
    device: str | torch.device = "cpu",
    local_files_only: bool = False,
) -> ImageEncoder:
    """A vision transformer; see :func:`load_encoders`."""
    from transformers import AutoModel

    folder = find_encoder(source, "vision", local_files_only)
    kind = _model_type(folder)
    if kind == "clip":
        raise ValueError(f"{source} is a CLIP model; the subject is measured by one such as {DINO}")
    # ViT's pooling layer is not part of DINO's files, and would be random.
    options = {"add_pooling_layer": False} if kind == "vit" else {}
    with reading(folder, "an encoder of pictures", _OTHER_ENCODER):
        model = _load(AutoModel, folder, **options)
        if not hasattr(model.config, "image_size"):
            raise ValueError(f"a model of the kind {kind!r} encodes no pictures")
        encoder = ImageEncoder(model.to(device), _processor(folder), str(source))
        encoder.encode_images([Image.new("RGB", (8, 8))])  # do model and processor fit?
    return encoder


def load_clip(
    source: str | Path = CLIP,
    *,
    device: str | torch.device = "cpu",
    local_files_only: bool = False,
) -> ClipEncoder:
    """A CLIP model with its tokenizer; see :func:`load_encoders`."""
    from transformers import CLIPModel, CLIPTokenizer

    folder = find_encoder(source, "clip", local_files_only)
    if (kind := _model_type(folder)) != "clip":
        raise ValueError(f"{source} is a model of the kind {kind!r}; one such as {CLIP} is needed")
    with reading(folder, "a CLIP model", _OTHER_ENCODER):
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        encoder = ClipEncoder(
            _load(CLIPModel, folder).to(device), _processor(folder), tokenizer, str(source)
        )
        encoder.encode_images([Image.new("RGB", (8, 8))])  # do models and processors fit?
        encoder.encode_prompts(["a photo"])
    return encoder


def find_encoder(source: str | Path, kind: str, local_files_only: bool = False) -> Path:
    """The folder that was meant; a hub id is downloaded, safetensors files only.

    Args:
        source: Folder, hub id, or ``"small"``.
        kind: Which of the package's encoders ``"small"`` is: ``vision`` or ``clip``.
        local_files_only: Take a hub id from the hub's cache, without network.

    Raises:
        FileNotFoundError: with what is missing.
    """
    text = str(source)
    if text == SMALL:
        return mini.encoder_path(kind)
    folder = user_path(text)
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    text, allow_patterns=list(_FILES), local_files_only=local_files_only
                )
            )
        except Exception as error:  # the hub's client raises a dozen kinds
            raise FileNotFoundError(
                f"encoder {text}: {why_not_fetched(error, 'a model of transformers')} Give the "
                "folder of a model that you have, or 'small' for the encoders that come along."
            ) from error
    for pattern in ("config.json", "preprocessor_config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise FileNotFoundError(
                f"encoder {text}: {folder} holds no {pattern}; a model folder of transformers "
                "with its image processor, and with weights as safetensors, is needed"
            )
    return folder


def _model_type(folder: Path) -> str:
    kind = read_json_object(folder / "config.json", "a model's configuration").get("model_type")
    if not isinstance(kind, str):
        raise ValueError(
            f"{folder / 'config.json'} is no configuration of a model: its model_type is {kind!r}. "
            f"{_OTHER_ENCODER}"
        )
    return kind


def _load(kind: Any, folder: Path, **options: Any) -> Any:
    for file in folder.glob("*.safetensors"):
        require_file(file, "a .safetensors file")
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT, file.stat().st_size):
                raise ValueError(f"{file.name} is no safetensors file")
            entries, _ = parse_header(stream.read(length), file.stat().st_size)
        for name, entry in entries.items():
            if entry.dtype not in FLOATS and not name.endswith("position_ids"):
                raise ValueError(f"{file.name}: {name} holds {entry.dtype}, not weights")
    model, loading = kind.from_pretrained(
        str(folder),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    if lacking := [str(name) for name in loading["missing_keys"]]:
        raise ValueError(f"{len(lacking)} weights are missing, as {sorted(lacking)[0]}")
    for name, tensor in model.named_parameters():
        if not is_finite(tensor):
            raise ValueError(f"{name} has values that are not finite")
    return model.float().eval().requires_grad_(False)


def _processor(folder: Path) -> Any:
    """The image processor in its Pillow form, which needs no torchvision."""
    import transformers
    from transformers import AutoImageProcessor

    old = int(transformers.__version__.partition(".")[0]) < 5
    options: dict[str, Any] = {"use_fast": False} if old else {"backend": "pil"}
    return AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, **options)


@torch.no_grad()
def _encode_images(
    pictures: Sequence[Image.Image],
    processor: Any,
    encode: Any,
    device: torch.device,
    config: Any,
    reporter: Reporter,
    stage: str,
) -> Tensor:
    rows = []
    reporter(stage, 0, len(pictures), {})
    for start in range(0, len(pictures), BATCH_SIZE):
        squares = [_square(picture) for picture in pictures[start : start + BATCH_SIZE]]
        pixels = processor(images=squares, return_tensors="pt")["pixel_values"]
        with threads(threads_for_encoder(config)):
            rows.append(encode(pixels.to(device)).float().cpu())
        reporter(stage, start + len(squares), len(pictures), {})
    return functional.normalize(torch.cat(rows), dim=-1)


def _square(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    return ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC)


def _rows(features: Any) -> Tensor:
    """transformers 5 wraps CLIP's features, 4 hands them over bare."""
    return features if isinstance(features, Tensor) else features.pooler_output
