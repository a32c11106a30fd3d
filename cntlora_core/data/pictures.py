"""One picture: from whatever a user has to an upright RGB image, and from there to a tensor.

Whatever Pillow opens is taken: any size, any mode, phone photos with a rotation tag or a colour
profile, transparent cut-outs, scans of 16 bits, the first frame of an animation.
"""

from __future__ import annotations

import hashlib
import io
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cntlora_core.data.framing import covering, frame

MAX_PIXELS = 150_000_000
"""A picture with more pixels is refused: decoded it takes over 450 MB (a phone has up to 108)."""

# Names, not "all": some of Pillow's formats start other programs (EPS: Ghostscript).
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000")


# A file of the ISO base media kind names its brand in bytes 8 to 12.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")


@dataclass(frozen=True, eq=False)
class UprightPicture:
    """A picture as it is used.

    Attributes:
        rgb: mode RGB, upright, sRGB, on white where it was transparent.
        mask: mode L, 255 where the picture was opaque; None if it was so everywhere.
        notes: what there is to say about it.
    """

    rgb: Image.Image
    mask: Image.Image | None
    notes: tuple[str, ...]


def read_picture(path: Path) -> UprightPicture:
    """The picture in a file, as `upright_rgb` makes it.

    HEIC, which phones write, is read where the package pillow-heif is installed.

    Raises:
        Exception: any; Pillow's decoders raise anything on a damaged file. See `why_unreadable`.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    Image.init()
    if _brand(path) in _HEIF_BRANDS and "HEIF" not in Image.OPEN:
        _register_heif()
    known = [name for name in _FORMATS if name in Image.OPEN]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Image.open(path, formats=known) as image:
            picture = upright_rgb(image)
    said = {str(w.message).strip() for w in caught if w.category in (UserWarning, RuntimeWarning)}
    return UprightPicture(picture.rgb, picture.mask, (*picture.notes, *sorted(said)))


def upright_rgb(image: Image.Image) -> UprightPicture:
    """A new image, mode RGB, upright, sRGB, its transparency, and what there is to say about it.

    Transparency is laid on white. Grey values of 16 bits are scaled to 8; floats are read as 0..1,
    or as 0..255 if they exceed 1. Of an animation the first frame is taken.

    Raises:
        Image.DecompressionBombError: more than `MAX_PIXELS` pixels.
        Exception: what Pillow raises when the image is decoded only now.
    """
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    notes: list[str] = []
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a phone's photo
        notes.append(f"has {getattr(image, 'n_frames', 'several')} frames, the first one is used")
    image.load()
    profile = image.info.get("icc_profile")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a damaged tag, raised as anything from struct.error to SyntaxError
        notes.append("its EXIF data is damaged, a rotation in it is ignored")
    image, mask = _eight_bit(image), None
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(_to_srgb(image, profile), mask=alpha)
        mask = None if alpha.getextrema() == (255, 255) else alpha
        if alpha.getextrema() == (0, 0):
            notes.append("is transparent throughout, so it becomes a white picture")
    else:
        rgb = _to_srgb(image, profile)
    if all(len(set(band.getextrema())) == 1 for band in rgb.split()):
        notes.append("is a single flat colour")
    rgb.info = {}  # its profile and tags are applied: a copy that is saved must not repeat them
    return UprightPicture(rgb, mask, tuple(notes))


def picture_from_array(array: np.ndarray, label: str) -> Image.Image:
    """An 8 bit image from (h, w), (h, w, 1|3|4), uint8 or floats in 0..1; `label` for messages.

    Raises:
        TypeError, ValueError: another dtype, shape or range.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        hint = " Pass the images of a batch one by one." if array.ndim == 4 else ""
        raise ValueError(f"{label} must have shape (h, w[, 1|3|4]), got {array.shape}.{hint}")
    if 0 in array.shape:
        raise ValueError(f"{label} has no pixels: shape {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= -0.5 and high <= 1.5):  # also true of NaN
            raise ValueError(f"{label}: floats must be in 0..1, got {low:g}..{high:g}")
        array = np.rint(np.clip(array, 0.0, 1.0) * 255.0).astype(np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"{label} must be uint8 or floating point, got {array.dtype}")
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)


def to_model_tensor(
    image: Image.Image,
    size: int | tuple[int, int],
    *,
    crop: Literal["center", "random"] = "center",
    generator: torch.Generator | None = None,
    flip: bool = False,
) -> Tensor:
    """The picture as a tensor (3, height, width), float32 in [-1, 1].

    The largest part of the shape of `size` is resized to it with antialiasing (Lanczos): the
    middle, or a place that `generator` draws (needed for crop="random"). `flip` mirrors left and
    right after the crop. Only that part is resampled, so that a panorama costs no more.

    Args:
        image: the picture.
        size: width and height, or the side of a square.

    Raises:
        ValueError: an unknown crop, a random crop without a generator, a size below 1.
    """
    width, height = (size, size) if isinstance(size, int) else size
    if min(width, height) < 1:
        raise ValueError(f"resolution must be at least 1 pixel, got {min(width, height)}")
    if crop not in ("center", "random"):
        raise ValueError(f"crop must be 'center' or 'random', got {crop!r}")
    if crop == "random" and generator is None:
        raise ValueError("crop='random' needs a generator, so that a run can be repeated")
    part = frame(image.size, (width, height), generator if crop == "random" else None)
    rgb = image if image.mode == "RGB" else upright_rgb(image).rgb
    resized = rgb.resize((width, height), Image.Resampling.LANCZOS, box=part.box)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1)
    if flip:
        pixels = pixels.flip(-1)
    return (pixels / 127.5 - 1.0).contiguous()


def shrunk(image: Image.Image, resolution: int) -> Image.Image:
    """The image with its shortest side reduced to `resolution`; a smaller one as it is."""
    if min(image.size) <= resolution:
        return image
    return image.resize(covering(image.size, (resolution, resolution)), Image.Resampling.LANCZOS)


def pixel_digest(image: Image.Image) -> str:
    """SHA-256 (hex) of an image's mode, size and pixels, whatever file they are in."""
    header = f"{image.mode} {image.width} {image.height}\n".encode()
    return hashlib.sha256(header + image.tobytes()).hexdigest()


def why_unreadable(path: Path, error: Exception) -> str:
    """The reason, for people, why `read_picture` raised `error`."""
    if isinstance(error, Image.DecompressionBombError):
        return f"too large ({error}), at most {MAX_PIXELS // 10**6} megapixels: scale it down"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty (0 bytes)"
    if isinstance(error, Image.UnidentifiedImageError):
        brand = _brand(path)
        if brand in _HEIF_BRANDS and "HEIF" not in Image.OPEN:
            return "HEIC needs a package: pip install pillow-heif, or save it as JPEG or PNG"
        if brand in _AVIF_BRANDS and "AVIF" not in Image.OPEN:
            return (
                "AVIF needs Pillow 11.3 or newer: pip install --upgrade pillow, or save it as PNG"
            )
        return "its content is no picture that Pillow can read"
    return f"damaged or incomplete: {error or type(error).__name__}"


def _brand(path: Path) -> bytes:
    """Of the kinds HEIC and AVIF, whatever the file is called; empty for others."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return b""
    return head[8:] if head[4:8] == b"ftyp" else b""


def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    except ImportError:
        return  # the picture is then refused, and `why_unreadable` names the package
    register_heif_opener()


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits, 32 bits or floats (modes I;16, I, F) as mode L."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    top = float(values.max(initial=0.0))
    scale = 1 / 257 if image.mode != "F" else 255.0 if top <= 1.0 else 1.0
    if top * scale > 255.5:
        scale = 255.0 / top
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A new RGB image; an embedded profile (Display P3 of a phone, CMYK of a print) is applied."""
    if not profile:
        return image.convert("RGB")
    try:
        from PIL import ImageCms
    except ImportError:  # a Pillow built without colour management
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).casefold():
            return image.convert("RGB")
        colours = image if image.mode == "CMYK" else image.convert("RGB")
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(colours, source, target, outputMode="RGB")
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        converted = None  # damaged or of another mode: show what a viewer without profiles shows
    return converted if converted is not None else image.convert("RGB")
