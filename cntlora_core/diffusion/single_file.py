"""Writing a model as one file in the original layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from cntlora_core.diffusion.original_layout import original_key, part_of_tensor
from cntlora_core.diffusion.pipeline import StableDiffusionParts
from cntlora_core.runtime.files import atomic_write


def to_original_layout(parts: StableDiffusionParts) -> dict[str, torch.Tensor]:
    """The model's weights under the names and in the shapes of a single-file checkpoint.

    Tensors share their memory with the model's where that is possible. The attention layers of the
    VAE are 1x1 convolutions there, (out, in, 1, 1); diffusers keeps them as (out, in).

    Raises:
        ValueError: a part is built differently from SD1.5's, and the layout has no place for it.
    """
    tensors: dict[str, torch.Tensor] = {}
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for part, model in {**parts.networks, "vae": parts.vae}.items():
        for name, tensor in model.state_dict().items():
            if name.endswith("position_ids"):
                continue
            if part == "vae" and ".attentions." in name and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            prefix = parts.family.prefixes[part]
            key = original_key(part, name, model.config, prefix)
            if key.endswith((".in_proj_weight", ".in_proj_bias")):
                joined.setdefault(key, {})[name.split(".")[-2]] = tensor
            else:
                tensors[key] = part_of_tensor(name, key, tensor).contiguous()
    for key, thirds in joined.items():
        tensors[key] = torch.cat([thirds[f"{letter}_proj"] for letter in "qkv"])
    return tensors


def save_single_file(
    parts: StableDiffusionParts, path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Saves a model as one ``.safetensors`` file in the original layout, in the dtype it has.

    ``path`` holds the old file or the new one, never a half, see ``files.atomic_write``.

    Args:
        parts: the model.
        path: of the file.
        metadata: goes into the file's header.

    Raises:
        ValueError: a part is built differently from SD1.5's.
        OSError: the file cannot be written.
    """
    tensors = to_original_layout(parts)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_write(path, needed_bytes=needed) as unfinished:
        mode = unfinished.stat().st_mode  # safetensors 0.8 leaves 0600 whatever the umask is
        save_file(tensors, unfinished, {"format": "pt", **(metadata or {})})
        unfinished.chmod(mode)
