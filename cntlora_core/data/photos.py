"""A subject's photos, or a class's images, from a folder or from memory.

A file that does not work is named with the reason, and the rest is used; each picture is made
upright RGB by `pictures`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cntlora_core.data.captions import CAPTION_SUFFIXES, read_caption
from cntlora_core.data.framing import enlarged_notes, frame
from cntlora_core.data.masks import fitted_mask, mask_files, mask_picture, masked_stem
from cntlora_core.data.pictures import (
    UprightPicture,
    picture_from_array,
    pixel_digest,
    read_picture,
    shrunk,
    to_model_tensor,
    upright_rgb,
    why_unreadable,
)
from cntlora_core.runtime.reading import user_path

__all__ = [
    "Photo",
    "PhotoSet",
    "SkippedFile",
    "load_photos",
    "photo_names",
    "photos_from_images",
    "pixel_digest",
    "to_model_tensor",
]

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif",
    ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".mpo", ".png", ".tif", ".tiff", ".webp",
))
_BESIDE_PHOTOS = frozenset((
    ".txt", ".caption", ".json", ".md", ".csv", ".yaml", ".yml", ".ini", ".db", ".xmp", ".aae",
))
# fmt: on
ONLY_ONE_PHOTO = "only one photo: its pose and background are learnt too; 4 to 6 are better"
_IGNORED = ", so the whole photo is learnt"


@dataclass(frozen=True, eq=False)
class Photo:
    """One picture.

    Attributes:
        path: where it came from; None if it was handed over in memory.
        image: mode RGB, upright, sRGB.
        caption: its own caption, placeholders not yet filled in; None: the instance prompt.
        digest: SHA-256 (hex) of the size and the pixels of `image`.
        mask: mode L, of the image's size: white is learnt, black is not; None: all is. See `masks`.
    """

    path: Path | None
    image: Image.Image
    caption: str | None
    digest: str
    mask: Image.Image | None = None


@dataclass(frozen=True)
class SkippedFile:
    """A file that could not be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class PhotoSet:
    """Photos in the natural order of their names, what was left out, what a user should know.

    Attributes:
        recipe: names all that generated images follow from; sets of the same recipe differ by the
            rounding of the machine at most. Empty for images that were given.
    """

    photos: tuple[Photo, ...]
    skipped: tuple[SkippedFile, ...]
    warnings: tuple[str, ...]
    recipe: str = ""


def load_photos(
    folder: str | Path,
    *,
    read_captions: bool = True,
    resolution: int | None = None,
    shrink: bool = False,
) -> PhotoSet:
    """Loads the pictures of a folder, not of its subfolders; hidden files are ignored.

    Rotation tags and colour profiles are applied, transparency is laid on white, and of an
    animation the first frame is taken, see `pictures.upright_rgb`. A picture's transparency, or a
    mask file of its name, becomes its mask, see `masks`.

    Args:
        folder: the folder.
        read_captions: takes the caption file beside each picture, see `captions.read_caption`.
        resolution: side of the training pictures in pixels; smaller photos are warned about.
        shrink: reduces larger photos to `resolution` (shortest side) at once, so that a folder of
            a thousand class images fits in memory.

    Raises:
        FileNotFoundError, NotADirectoryError: no such folder.
        ValueError: no usable picture in it (says what there is instead).
    """
    if shrink and resolution is None:
        raise ValueError("shrink=True needs a resolution to reduce the photos to")
    folder = _checked_folder(folder)
    entries = sorted(
        (path for path in folder.iterdir() if not path.name.startswith(".")), key=natural_key
    )
    files = [path for path in entries if not path.is_dir()]
    photos: list[Photo] = []
    skipped: list[SkippedFile] = []
    notes: list[str] = []
    masks = mask_files(files, folder, IMAGE_SUFFIXES)
    for path in files:
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES and masked_stem(path) is not None:
            continue
        if suffix not in IMAGE_SUFFIXES:
            if suffix not in _BESIDE_PHOTOS:
                skipped.append(SkippedFile(path, "not a known kind of picture"))
            continue
        try:
            picture = read_picture(path)
        except Exception as error:  # Pillow's decoders raise anything on a damaged file
            skipped.append(SkippedFile(path, why_unreadable(path, error)))
            continue
        notes += (f"{path.name}: {note}" for note in picture.notes)
        image, mask = picture.rgb, _mask_of(picture, masks.get(path.stem), notes)
        if resolution is not None:
            square = frame(image.size, (resolution, resolution))
            notes += enlarged_notes([path.name], [square])
            if shrink:
                image, mask = shrunk(image, resolution), None
        caption = read_caption(path) if read_captions else None
        if caption is not None and caption.problem:
            notes.append(caption.problem)
        text = caption.text if caption else None
        photos.append(Photo(path, image, text, pixel_digest(image), mask))
    if not photos:
        raise ValueError(_nothing_in(folder, entries, skipped))
    if read_captions:
        notes += _orphans(files, masks)
    return PhotoSet(tuple(photos), tuple(skipped), (*notes, *_set_notes(photos)))


def photos_from_images(
    images: Sequence[Image.Image | np.ndarray],
    captions: Sequence[str | None] | None = None,
    masks: Sequence[Image.Image | np.ndarray | None] | None = None,
) -> PhotoSet:
    """Photos from pictures in memory, treated as `load_photos` treats files.

    Args:
        images: Pillow images, or arrays (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) with uint8
            values or floats in 0..1 (a little beyond is clipped: upscalers overshoot).
        captions: one for each image, or None.
        masks: one for each image, or None; arrays (h, w). Without one, a picture's transparency is
            its mask.

    Raises:
        TypeError, ValueError: an image of another kind or shape (says which one), no image at all,
            a mask of another shape than its image, or a number of captions or masks that does not
            fit.
    """
    if isinstance(images, (Image.Image, np.ndarray)):
        raise TypeError("images must be a sequence of pictures, got a single one: put it in a list")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(images)} images but {len(captions)} captions: give one for each")
    if masks is not None and len(masks) != len(images):
        raise ValueError(f"{len(images)} images but {len(masks)} masks: give one for each")
    if len(images) == 0:
        raise ValueError("no images were given: 4 to 6 photos of the subject are needed")
    photos: list[Photo] = []
    notes: list[str] = []
    for number, given in enumerate(images, start=1):
        label = f"image {number}"
        if isinstance(given, np.ndarray):
            given = picture_from_array(given, label)
        elif not isinstance(given, Image.Image):
            raise TypeError(
                f"{label} must be a PIL image or a numpy array, got {type(given).__name__}"
            )
        try:
            picture = upright_rgb(given)
        except Exception as error:  # as in load_photos: a lazily opened file is decoded here
            raise ValueError(f"{label} cannot be read: {error}") from error
        notes += (f"{label}: {note}" for note in picture.notes)
        caption = captions[number - 1] if captions is not None else None
        mask = masks[number - 1] if masks is not None else None
        if mask is not None:
            mask = _given_mask(mask, picture.rgb.size, f"the mask of {label}", notes)
        else:
            mask = _transparency(picture)
        photos.append(Photo(None, picture.rgb, caption, pixel_digest(picture.rgb), mask))
    return PhotoSet(tuple(photos), (), (*notes, *_set_notes(photos)))


def photo_names(photos: Sequence[Photo]) -> list[str]:
    """What messages call each photo: its file's name, or its number."""
    return [p.path.name if p.path else f"image {i}" for i, p in enumerate(photos, start=1)]


def natural_key(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Sorts 2.jpg before 10.jpg, without regard to case."""
    parts = re.split(r"([0-9]+)", path.name.casefold())
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p], path.name


def _checked_folder(given: str | Path) -> Path:
    if not str(given).strip():
        raise ValueError("the photos' folder is empty: give the folder with 4 to 6 photos")
    folder = user_path(given)
    if os.path.isfile(folder):
        raise NotADirectoryError(f"{folder} is a file: give the folder it is in, {folder.parent}")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder}: give the folder with the photos")
    return folder


def _set_notes(photos: Sequence[Photo]) -> list[str]:
    """What there is to say about the photos as a set."""
    notes = []
    if len(photos) == 1:
        notes.append(ONLY_ONE_PHOTO)
    first: dict[str, str] = {}
    for name, photo in zip(photo_names(photos), photos):
        if photo.digest in first:
            notes.append(f"{name} is the same picture as {first[photo.digest]}: it counts twice")
        first.setdefault(photo.digest, name)
    return notes


def _mask_of(picture: UprightPicture, path: Path | None, notes: list[str]) -> Image.Image | None:
    """A picture's mask: from its file if there is one, else its transparency."""
    if path is None:
        return _transparency(picture)
    try:
        mask = mask_picture(read_picture(path))
    except Exception as error:  # as for photos
        notes.append(f"{path.name}: {why_unreadable(path, error)}{_IGNORED}")
        return None
    try:
        return fitted_mask(mask, picture.rgb.size)
    except ValueError as error:
        notes.append(f"{path.name} {error}{_IGNORED}")
        return None


def _transparency(picture: UprightPicture) -> Image.Image | None:
    alpha = picture.mask
    return None if alpha is None or not alpha.getbbox() else fitted_mask(alpha, picture.rgb.size)


def _given_mask(
    given: Image.Image | np.ndarray, size: tuple[int, int], label: str, notes: list[str]
) -> Image.Image | None:
    if isinstance(given, np.ndarray):
        given = picture_from_array(given, label)
    mask = mask_picture(upright_rgb(given))
    if not mask.getbbox():  # what ComfyUI hands on for a picture without one
        notes.append(f"{label} is black throughout{_IGNORED}")
        return None
    try:
        return fitted_mask(mask, size)
    except ValueError as error:
        raise ValueError(f"{label} {error}") from error


def _orphans(files: Sequence[Path], masks: Mapping[str, Path]) -> list[str]:
    """Captions and masks that belong to no picture."""
    stems = {
        path.stem
        for path in files
        if path.suffix.lower() in IMAGE_SUFFIXES and masked_stem(path) is None
    }
    captions = [path for path in files if path.suffix.lower() in CAPTION_SUFFIXES]
    lost = [path for path in captions if path.stem not in stems]
    lost += [path for stem, path in masks.items() if stem not in stems]
    return [f"{path.name} is not used: no picture has this name" for path in lost]


def _nothing_in(folder: Path, entries: Sequence[Path], skipped: Sequence[SkippedFile]) -> str:
    text = f"no usable picture in {folder}: "
    if skipped:
        text += "; ".join(f"{s.path.name}: {s.reason}" for s in skipped[:5])
        return text + (f"; and {len(skipped) - 5} more" if len(skipped) > 5 else "")
    subfolders = [path.name + os.sep for path in entries if path.is_dir()]
    others = [path.name for path in entries if not path.is_dir()]
    if subfolders:
        text += f"there are only subfolders ({', '.join(subfolders[:5])}): give one of them. "
    elif others:
        text += f"there are only other files ({', '.join(others[:5])}). "
    else:
        text += "the folder is empty. "
    return text + "Put 4 to 6 photos of the subject there (JPEG, PNG, WebP, ...)."
