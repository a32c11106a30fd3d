"""Reading a model's weights from files, tensor by tensor, into memory of their own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cntlora_core.diffusion.checkpoint import CheckpointError, TensorEntry, read_header
from cntlora_core.diffusion.family import Family
from cntlora_core.diffusion.original_layout import original_key, part_of_tensor
from cntlora_core.runtime.reading import FLOATS, is_finite

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# Names of the VAE's attention layers in folders written before diffusers 0.17.
_OLD_VAE_ATTENTION = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
}


def names_in_file(path: Path, part: str, config: Any, family: Family) -> Callable[[str], list[str]]:
    """For a parameter of the model, the names that it may have in the file, likeliest first.

    Args:
        path: a diffusers folder, or a file in the original layout.
        part: ``unet``, ``vae`` or a text encoder.
        config: the part's configuration.
        family: of the model.
    """
    if path.is_dir():

        def names(name: str) -> list[str]:
            old = name
            for new_mark, old_mark in _OLD_VAE_ATTENTION.items():
                old = old.replace(new_mark, old_mark)
            bare = name.removeprefix("text_model.")
            return [name, f"text_model.{bare}", bare, old]
    else:

        def names(name: str) -> list[str]:
            key = original_key(part, name, config, family.prefixes[part])
            return [key, key.replace("transformer.text_model.", "transformer.")]

    return names


def fill_from_files(
    model: torch.nn.Module,
    files: list[Path],
    names: Callable[[str], list[str]],
    dtype: torch.dtype,
    device: str | torch.device,
) -> None:
    """Reads a model's parameters from files, one tensor at a time.

    Args:
        model: with empty parameters; those that are read replace them.
        files: safetensors files that hold them.
        names: of a parameter in the files, as :func:`names_in_file` has it.
        dtype: that they are given.
        device: where they go.

    Raises:
        CheckpointError: weights are missing, have other shapes, or are not finite.
    """
    state, missing = {}, []
    with ExitStack() as stack:
        places: dict[str, tuple[BinaryIO, TensorEntry]] = {}
        for file in files:
            stream = stack.enter_context(file.open("rb"))
            places.update((name, (stream, entry)) for name, entry in read_header(file).items())
        for name, empty in model.state_dict().items():
            found = next((key for key in names(name) if key in places), None)
            if name.endswith("position_ids"):
                state[name] = empty
            elif found is None:
                missing.append(names(name)[0])
            else:
                stream, entry = places[found]
                if entry.dtype not in FLOATS:
                    raise CheckpointError(
                        files[0],
                        f"{found} holds {entry.dtype}, and weights are floating-point numbers: "
                        "this is a quantised or damaged model.",
                    )
                tensor = part_of_tensor(name, found, _read(stream, entry))
                # 1x1 convolutions are stored as matrices by some tools, and the other way round.
                if [n for n in tensor.shape if n > 1] != [n for n in empty.shape if n > 1]:
                    raise CheckpointError(
                        files[0],
                        f"{found} has shape {tuple(tensor.shape)}, expected {tuple(empty.shape)}: "
                        "the model is built differently.",
                    )
                tensor = tensor.reshape(empty.shape).to(device, dtype).contiguous()
                if not is_finite(tensor):
                    raise CheckpointError(
                        files[0],
                        f"{found} has values that are not finite in {dtype}: the file is damaged, "
                        "or a wider data type is needed.",
                    )
                state[name] = tensor
    if missing:
        raise CheckpointError(
            files[0],
            f"{len(missing)} of {len(missing) + len(state)} weights are missing, as {missing[0]}.",
        )
    model.load_state_dict(state, assign=True)
    torch.nn.Module.to(model, device)


def _read(stream: BinaryIO, entry: TensorEntry) -> torch.Tensor:
    raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
    stream.seek(entry.start)
    stream.readinto(raw.numpy().data)  # pyright: ignore[reportAttributeAccessIssue]
    return raw.view(_DTYPES[entry.dtype]).reshape(entry.shape)
