"""Safetensors files of the library's own: tensors, a JSON header and the name of their format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cntlora_core.runtime.files import save_safetensors_atomic
from cntlora_core.runtime.reading import json_object

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(
    path: str | Path, form: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Path:
    """Write a file as a whole or not at all; returns its path.

    Raises:
        OSError: as :func:`~cntlora_core.runtime.files.atomic_write`.
    """
    return save_safetensors_atomic(tensors, path, {"format": form, "header": json.dumps(header)})


def read_tensors(path: str | Path, form: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, to be called within :func:`~.reading.reading`.

    Raises:
        ValueError: if the file is of another format.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != form:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {form!r}")
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    return json_object(metadata["header"]), tensors
