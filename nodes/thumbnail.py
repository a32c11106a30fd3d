"""A picture beside a LoRA file, where ComfyUI's model browser and others look for one."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from cntlora_core.runtime.files import atomic_write

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif")
MARK = b"CNTLoRA preview"
"""The comment in a JPEG by which a thumbnail of ours is told from a user's picture."""


def leave_thumbnail(lora: Path, picture: Image.Image) -> None:
    """Put a picture beside a LoRA, unless there is one that is not from here."""
    if _is_free(lora):
        with atomic_write(_own(lora)) as temporary:
            picture.convert("RGB").save(temporary, "JPEG", quality=90, comment=MARK)


def copy_thumbnail(source: Path, target: Path) -> None:
    """Give a copy of a LoRA file the thumbnail of the first, if that has one."""
    if _is_ours(_own(source)) and _is_free(target):
        with atomic_write(_own(target)) as temporary:
            shutil.copyfile(_own(source), temporary)


def _own(lora: Path) -> Path:
    return lora.with_suffix(SUFFIXES[0])


def _is_free(lora: Path) -> bool:
    names = [f"{lora.stem}{middle}{suffix}" for middle in ("", ".preview") for suffix in SUFFIXES]
    pictures = [path for name in names if (path := lora.with_name(name)).exists()]
    return all(path == _own(lora) and _is_ours(path) for path in pictures)


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.info.get("comment") == MARK
    except OSError:
        return False
