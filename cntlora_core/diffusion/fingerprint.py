"""Telling models apart by their weights, quickly, and whatever their names, places and dates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from cntlora_core.diffusion.checkpoint import PARTS, folder_weights, read_header

_SAMPLE_BYTES = 256


def fingerprint_model(path: str | Path) -> str:
    """16 hex digits that identify a checkpoint file or a diffusers folder.

    Raises:
        CheckpointError: a part of the folder is missing, or a file is no safetensors file.
    """
    path = Path(path)
    if not path.is_dir():
        return fingerprint_files([path])
    used = {file for part in PARTS for file in folder_weights(path, part)}
    return fingerprint_files(sorted(used | {path / part / "config.json" for part in PARTS}))


def fingerprint_files(files: Iterable[Path]) -> str:
    """16 hex digits that identify the weights in ``files``, whatever their names, places and dates.

    A sha256 of each file's size, of the name, dtype, shape and place of each of its tensors, and of
    the 256 bytes in the middle of each; JSON files count in full. So about half a megabyte is read
    of a model of any size. A change that spares the middle of every tensor goes unnoticed; training
    changes all of a tensor.
    """
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.stat().st_size};".encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
            continue
        with path.open("rb") as stream:
            for name, entry in sorted(read_header(path).items()):
                digest.update(f"{name};{entry.dtype};{entry.shape};{entry.start};".encode())
                middle = (entry.start + entry.end - _SAMPLE_BYTES) // 2
                stream.seek(max(entry.start, middle))
                digest.update(stream.read(min(_SAMPLE_BYTES, entry.end - entry.start)))
    return digest.hexdigest()[:16]
