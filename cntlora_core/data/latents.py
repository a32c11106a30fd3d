"""Photos encoded once: the VAE's posterior of each, in memory and in a cache on disk.

Kept are the parameters of the posterior, mean and standard deviation, not a sample of it: training
draws from it anew at each step, as if the VAE were still there. After `encode_latents` the VAE is
not needed and its memory can be freed.

A cached entry is found by a key over everything its content depends on (pixels, VAE and its dtype,
resolution, crop, flip, format version), so an edited photo or another VAE is never confused with
an old entry, and by its own checksum, so a damaged file is made again.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cntlora_core.data.framing import frame, nearest_bucket
from cntlora_core.data.masks import loss_weights
from cntlora_core.data.photos import Photo, PhotoSet, to_model_tensor
from cntlora_core.runtime.files import require_writable_folder, save_safetensors_atomic
from cntlora_core.runtime.modes import evaluating

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Crop = Literal["center", "random"]
FORMAT_VERSION = 2
"""To be raised when `to_model_tensor` or the meaning of an entry changes."""


@dataclass(frozen=True, eq=False)
class LatentSet:
    """Posteriors of n encoded pictures, on the CPU. With flips, n is twice the number of photos:
    first all photos as they are, then all of them mirrored.

    Attributes:
        mean: n of float32 (c, h, w), not scaled; h and w are those of the picture's bucket.
        std: n of float32 (c, h, w), not scaled.
        digests: of the photo behind each entry.
        photo_index: of the photo behind each entry, to find its prompt.
        flipped: whether the entry is the mirrored photo.
        scaling_factor: of the VAE (0.18215 for SD1.5); `sample` applies it.
        from_cache: how many entries were read from the disk.
        weights: n of float32 (h, w) or None, the loss weight of each latent by the photo's mask,
            of mean 1; None: all latents count alike.
    """

    mean: tuple[Tensor, ...]
    std: tuple[Tensor, ...]
    digests: tuple[str, ...]
    photo_index: tuple[int, ...]
    flipped: tuple[bool, ...]
    scaling_factor: float
    from_cache: int
    weights: tuple[Tensor | None, ...]

    def __len__(self) -> int:
        return len(self.digests)

    def sample(self, index: int, generator: torch.Generator) -> Tensor:
        """A latent (c, h, w), float32, as the UNet wants it: scaling_factor * (mean + std * noise).

        The noise is drawn on the generator's device and the result is there too.
        """
        device = generator.device
        mean, std = self.mean[index].to(device), self.std[index].to(device)
        noise = torch.randn(mean.shape, generator=generator, device=device)
        return self.scaling_factor * (mean + std * noise)


def encode_latents(
    photos: PhotoSet | Sequence[Photo],
    vae: AutoencoderKL,
    *,
    resolution: int,
    crop: Crop = "center",
    bucket_step: int | None = None,
    flip: bool = False,
    unmasked_weight: float = 1.0,
    cache_dir: str | Path | None = None,
    vae_fingerprint: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> LatentSet:
    """Encodes each photo once, one at a time, on the VAE's device, in float32.

    In half precision SD1.5's VAE is off by several standard deviations of its posterior (bfloat16)
    or overflows (float16), and each photo is encoded once only.

    Args:
        photos: what to encode.
        vae: the autoencoder, best loaded in float32; it is left as it was.
        resolution: side of the square pictures, a multiple of the VAE's factor (8 for SD1.5).
        crop: "center", or "random": one place for each photo, drawn from its digest, hence the
            same in every run and epoch; it varies over photos, not over steps.
        bucket_step: encodes each photo at the bucket nearest to its shape, with sides of this
            multiple, see `framing`; None: at the square.
        flip: encodes the mirrored photos too.
        unmasked_weight: what the loss outside a photo's mask weighs, see `masks.loss_weights`; 1:
            masks change nothing.
        cache_dir: folder for the entries; None: no cache on disk.
        vae_fingerprint: names the VAE's weights (a hash of them); needed for a cache.
        progress: called as (done, total) before the first entry and after each; an exception that
            it raises ends the work, and what is cached by then is used next time.

    Raises:
        ValueError: no photos, a resolution that does not fit, a cache without a fingerprint, or a
            picture whose latents are not finite.
        OSError: the cache folder cannot be written to.
    """
    pictures = photos.photos if isinstance(photos, PhotoSet) else tuple(photos)
    entries = [(i, mirrored) for mirrored in ((False, True) if flip else (False,))
               for i in range(len(pictures))]  # fmt: skip
    _check(pictures, vae, resolution, crop)
    sizes = bucket_sizes(pictures, resolution, bucket_step)
    area = sum(sizes[i][0] * sizes[i][1] for i, _ in entries) // _downscaling(vae) ** 2
    folder = _cache_folder(cache_dir, vae_fingerprint, vae, area, len(entries))
    done: dict[str, tuple[Tensor, Tensor]] = {}
    keys: list[str] = []
    from_cache = 0
    encoder: Any = vae if vae.dtype == torch.float32 else copy.deepcopy(vae).float()
    # Outside inference mode: what is encoded here is an input of training.
    with torch.inference_mode(False), torch.no_grad(), evaluating(encoder):
        for count, (index, mirrored) in enumerate(entries):
            if progress is not None and count == 0:
                progress(0, len(entries))
            photo, size = pictures[index], sizes[index]
            key = cache_key(photo.digest, vae_fingerprint, vae.dtype, size, crop, mirrored)
            keys.append(key)
            path = folder / f"{key}.safetensors" if folder is not None else None
            if key not in done and path is not None and (cached := _read_entry(path, key)):
                done[key] = cached
                from_cache += 1
            if key not in done:
                pixels = _pixels(photo, size, crop, mirrored)
                name = photo.path.name if photo.path else f"image {index + 1}"
                done[key] = _posterior(pixels, encoder, name)
                if path is not None:
                    _write_entry(path, key, *done[key])
            if progress is not None:
                progress(count + 1, len(entries))
        weights = tuple(
            _weights(pictures[i], sizes[i], _downscaling(vae), crop, unmasked_weight, mirrored)
            for i, mirrored in entries
        )
    return LatentSet(
        mean=tuple(done[key][0] for key in keys),
        std=tuple(done[key][1] for key in keys),
        digests=tuple(pictures[i].digest for i, _ in entries),
        photo_index=tuple(i for i, _ in entries),
        flipped=tuple(mirrored for _, mirrored in entries),
        scaling_factor=float(vae.config["scaling_factor"]),
        from_cache=from_cache,
        weights=weights,
    )


def bucket_sizes(
    photos: Sequence[Photo], resolution: int, bucket_step: int | None
) -> list[tuple[int, int]]:
    """Width and height in pixels at which each photo is encoded, see `encode_latents`."""
    if bucket_step is None:
        return [(resolution, resolution)] * len(photos)
    return [nearest_bucket(photo.image.size, resolution, bucket_step) for photo in photos]


def cache_key(
    digest: str,
    vae_fingerprint: str,
    dtype: torch.dtype,
    size: tuple[int, int],
    crop: Crop,
    flipped: bool,
) -> str:
    """SHA-256 (hex) over everything that an entry's content depends on."""
    side_or_size = size[0] if size[0] == size[1] else size
    parts = (digest, vae_fingerprint, dtype, side_or_size, crop, flipped, FORMAT_VERSION)
    return hashlib.sha256(repr(tuple(map(str, parts))).encode()).hexdigest()


def _check(pictures: Sequence[Photo], vae: AutoencoderKL, resolution: int, crop: str) -> None:
    if not pictures:
        raise ValueError("there are no photos to encode")
    factor = _downscaling(vae)
    if resolution < factor or resolution % factor:
        nearest = max(1, round(resolution / factor)) * factor
        raise ValueError(
            f"resolution must be a multiple of {factor} for this VAE, got {resolution}: "
            f"{nearest} is the nearest"
        )
    if crop not in ("center", "random"):
        raise ValueError(f"crop must be 'center' or 'random', got {crop!r}")


def _downscaling(vae: AutoencoderKL) -> int:
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def _cache_folder(
    cache_dir: str | Path | None, fingerprint: str, vae: AutoencoderKL, area: int, n: int
) -> Path | None:
    if cache_dir is None:
        return None
    if not fingerprint:
        raise ValueError(
            "a latent cache needs vae_fingerprint (a hash of the VAE's weights): without it, "
            "latents of another VAE would be taken for this one's"
        )
    numbers = 2 * vae.config["latent_channels"] * area
    return require_writable_folder(cache_dir, 4 * numbers + 1024 * n)


def _place(photo: Photo) -> torch.Generator:
    """Of a random crop: the same for a photo, its mirror image and its mask."""
    return torch.Generator().manual_seed(int(photo.digest[:15], 16))


def _pixels(photo: Photo, size: tuple[int, int], crop: Crop, flipped: bool) -> Tensor:
    """(3, height, width)."""
    return to_model_tensor(photo.image, size, crop=crop, generator=_place(photo), flip=flipped)


def _weights(
    photo: Photo,
    size: tuple[int, int],
    downscaling: int,
    crop: Crop,
    unmasked_weight: float,
    flipped: bool,
) -> Tensor | None:
    if photo.mask is None or unmasked_weight == 1:
        return None
    part = frame(photo.image.size, size, _place(photo) if crop == "random" else None)
    latents = (size[0] // downscaling, size[1] // downscaling)
    return loss_weights(photo.mask, part, latents, unmasked_weight, flipped)


def _posterior(pixels: Tensor, vae: Any, name: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (c, h, w), float32, CPU."""
    weight = next(vae.parameters())
    distribution = vae.encode(pixels[None].to(weight.device, weight.dtype)).latent_dist
    if not bool(torch.isfinite(distribution.parameters).all()):  # unclamped: shows an infinity
        raise ValueError(
            f"the VAE's latents of {name} are not finite: its weights are damaged or no VAE of "
            "this model. Use another VAE."
        )
    return distribution.mean[0].cpu(), distribution.std[0].cpu()


def _checksum(mean: Tensor, std: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in (mean, std):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write_entry(path: Path, key: str, mean: Tensor, std: Tensor) -> None:
    metadata = {"key": key, "checksum": _checksum(mean, std)}
    save_safetensors_atomic({"mean": mean, "std": std}, path, metadata)


def _read_entry(path: Path, key: str) -> tuple[Tensor, Tensor] | None:
    """None if there is no such entry or it is not as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies, since these are views of the file, which Windows cannot replace while mapped.
            mean, std = file.get_tensor("mean").clone(), file.get_tensor("std").clone()
    except (OSError, SafetensorError):
        return None
    if metadata.get("key") != key or metadata.get("checksum") != _checksum(mean, std):
        return None
    return mean, std
