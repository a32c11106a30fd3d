"""Class images for prior preservation: given, or drawn by the model itself, cached and reused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from cntlora_core.data.photos import PhotoSet, load_photos
from cntlora_core.diffusion.pipeline import StableDiffusionParts
from cntlora_core.diffusion.sampler import draw
from cntlora_core.diffusion.settings import PriorSettings, SamplingSettings
from cntlora_core.files import atomic_write, folder_within, safe_name, write_json_atomic
from cntlora_core.progress import Reporter, silent


def cache_folder(settings: PriorSettings) -> Path:
    """The folder for what can be made again: the given one, or the user's cache."""
    if settings.cache is not None:
        return Path(settings.cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cntlora"


def class_images(
    parts: StableDiffusionParts,
    class_prompt: str,
    settings: PriorSettings,
    *,
    resolution: int,
    seed: int = 0,
    reporter: Reporter = silent,
) -> PhotoSet:
    """The images of the class: from the user's folder, else from the cache, else drawn now.

    Drawn images are kept under a key of model, prompt, resolution, sampling settings and seed. An
    interrupted drawing goes on where it stopped, and asking for more draws only what is missing.
    """
    if settings.class_images is not None:
        return load_photos(
            settings.class_images, read_captions=False, resolution=resolution, shrink=True
        )
    folder = generated_folder(parts, class_prompt, settings, resolution=resolution, seed=seed)
    folder = folder_within(cache_folder(settings), "class_images", folder.name)
    wanted = [folder / f"{i:05d}.png" for i in range(settings.num_class_images)]
    missing = [i for i, path in enumerate(wanted) if not path.is_file()]
    if missing:
        _draw_missing(parts, class_prompt, settings, wanted, missing, resolution, seed, reporter)
    photos = load_photos(folder, read_captions=False)
    names = {path.name for path in wanted}
    kept = tuple(p for p in photos.photos if p.path is not None and p.path.name in names)
    return PhotoSet(photos=kept, skipped=photos.skipped, warnings=())


def generated_folder(
    parts: StableDiffusionParts,
    class_prompt: str,
    settings: PriorSettings,
    *,
    resolution: int,
    seed: int,
) -> Path:
    """Where drawn images of this model, prompt and settings are kept."""
    key = {
        "model": parts.fingerprint,
        "prompt": class_prompt,
        "resolution": resolution,
        "steps": settings.class_steps,
        "guidance": settings.class_guidance,
        "seed": seed,
        "precision": str(parts.unet.dtype),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder(settings) / "class_images" / f"{safe_name(class_prompt)}-{digest}"


def _draw_missing(
    parts: StableDiffusionParts,
    class_prompt: str,
    settings: PriorSettings,
    wanted: list[Path],
    missing: list[int],
    resolution: int,
    seed: int,
    reporter: Reporter,
) -> None:
    stage, total = "drawing class images", len(wanted)
    write_json_atomic(
        wanted[0].parent / "about.json",
        {"model": parts.source, "prompt": class_prompt, "resolution": resolution, "seed": seed},
    )
    pipeline = parts.pipeline()
    size = 16 if resolution <= 128 else 4 if resolution <= 512 else 1
    sampling = SamplingSettings(
        steps=settings.class_steps,
        guidance=settings.class_guidance,
        resolution=resolution,
        batch_size=size,
    )
    for start in range(0, len(missing), size):
        chosen = missing[start : start + size]
        before = total - len(missing) + start
        reporter(stage, before, total, {})
        pictures = draw(
            pipeline,
            [class_prompt] * len(chosen),
            sampling,
            seeds=[seed * 1_000_003 + i for i in chosen],
            reporter=lambda _s, _d, _t, values, n=before: reporter(stage, n, total, values),
        )
        for index, picture in zip(chosen, pictures, strict=True):
            with atomic_write(wanted[index]) as temporary:
                picture.save(temporary, format="PNG")
        reporter(stage, before + len(chosen), total, {"image": pictures[-1]})
