"""Depth-Anything to distances in metres: NYU depth v2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.runtime.reading import reading, user_path
from cntlora_core.runtime.seeds import torch_seed
from cntlora_core.tasks.data import Mapped, require_picture, require_splits
from cntlora_core.tasks.images import open_picture, pixels
from cntlora_core.tasks.loading import load_model, load_part
from cntlora_core.tasks.presets import DEPTH
from cntlora_core.tasks.recipes import DepthSettings
from cntlora_core.tasks.run import TaskResult, run_task
from cntlora_core.tasks.scores import mean_of_each
from cntlora_core.tasks.segmentation import read_pairs
from cntlora_core.tasks.settings import Plan, planned, preset_named
from cntlora_core.tasks.trainer import Task

ImageAndDepth = tuple[Any, Any]
"""A picture (a path, a Pillow image), and a depth image or an array of metres, (h, w)."""

DEPTH_SCORES = ("delta_1", "delta_2", "delta_3", "abs_rel", "rmse", "log10")
"""The columns of :func:`depth_rows`. Of the first three more is better, of the others less."""

NEAREST = 1e-3
"""Metres; a depth below is one that is not known."""

EIGEN_CROP = (45, 471, 41, 601)
"""Rows and columns of a 480 x 640 image that are measured (arXiv 1406.2283)."""

_SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}
_LISTS = {
    "train": ("train.txt", "nyudepthv2_train_files_with_gt.txt"),
    "test": ("test.txt", "nyudepthv2_test_files_with_gt.txt"),
}
_IMAGES = ("rgb", "images", "image")
_DEPTHS = ("depth", "depths", "sync_depth")


def train_depth(
    settings: DepthSettings,
    reporter: Reporter = silent,
    *,
    model: nn.Module | None = None,
    data: Mapping[str, Sequence[ImageAndDepth]] | None = None,
    **options: Any,
) -> TaskResult:
    """Fine-tune Depth-Anything to estimate distances in metres.

    The last layer is trained in full. A model of relative depth gets a new one.

    Args:
        settings: All settings.
        reporter: Told of all long work.
        model: A DepthAnythingForDepthEstimation with metric depth instead of the one that the
            settings name.
        data: Instead of the data that the settings name: by split (``train`` and others to measure
            on) images and depths.
        options: See :func:`.run_task`.

    Raises:
        ValueError: for data of another form, naming the split or the line.
        FileNotFoundError: if model, data, an image or a depth are not there.
    """
    plan = planned(settings, preset_named(DEPTH, settings.preset, "depth"))
    return run_task(depth_task(plan, settings, model=model, data=data), plan, reporter, **options)


def depth_task(
    plan: Plan,
    settings: DepthSettings,
    *,
    model: nn.Module | None = None,
    data: Mapping[str, Sequence[ImageAndDepth]] | None = None,
) -> Task:
    """Model, data and metric; see :func:`train_depth`."""
    preset = plan.preset
    furthest = settings.max_depth or preset.options["max_depth"]
    if data is None:
        if not preset.data:
            raise ValueError("give data: the folder of NYU depth v2")
        data = read_depths(preset.data)
    require_splits(data)
    base: Any = model if model is not None else _load(plan, furthest)
    size = settings.image_size or preset.options["image_size"]
    patch = base.config.patch_size
    if size[0] % patch or size[1] % patch:
        raise ValueError(
            f"image_size={tuple(size)}: both must be multiples of the model's patch, {patch}"
        )
    make = _Sample(tuple(size), settings.depth_scale)
    samples = {name: Mapped(pairs, make) for name, pairs in data.items()}

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return scale_invariant_loss(distances(model, batch), batch["labels"], furthest)

    def measure(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        found = distances(model, batch)
        value = scale_invariant_loss(found, batch["labels"], furthest)
        return value, depth_rows(found, batch["labels"], furthest)

    return Task(
        name=settings.preset,
        model=base,
        train=samples["train"],
        splits={name: split for name, split in samples.items() if name != "train"},
        collate=_collate,
        measure=measure,
        score=partial(mean_of_each, DEPTH_SCORES),
        best="delta_1",
        loss=loss,
        forward_fn=distances,
    )


def distances(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Metres, (n, h, w), as large as the batch's depths."""
    device = next(model.parameters()).device
    found = model(pixel_values=batch["pixel_values"].to(device)).predicted_depth.float()
    size = batch["labels"].shape[-2:]
    return nn.functional.interpolate(
        found[:, None], size, mode="bilinear", align_corners=True
    )[:, 0]  # fmt: skip


def scale_invariant_loss(found: Tensor, depths: Tensor, furthest: float) -> Tensor:
    """ZoeDepth's form of the scale-invariant logarithmic error (arXiv 2302.12288).

    ``10 sqrt(var(g) + 0.15 mean(g)^2)`` with g the difference of logarithms, over all pixels of the
    batch whose depth is known.

    Args:
        found: Metres, (n, h, w).
        depths: Metres, of that shape.
        furthest: Pixels beyond do not count, in metres.

    Raises:
        ValueError: if a batch has no pixel whose depth is known.
    """
    known = (depths > NEAREST) & (depths < furthest)
    if int(known.sum()) < 2:
        raise ValueError(
            f"a batch has no pixel of a depth between {NEAREST} and {furthest} m: is depth_scale, "
            "which depth images are divided by to give metres, right?"
        )
    difference = found[known].clamp_min(NEAREST).log() - depths[known].log()
    return 10 * (difference.var() + 0.15 * difference.mean() ** 2 + 1e-9).sqrt()


def depth_rows(found: Tensor, depths: Tensor, furthest: float) -> Tensor:
    """All scores of each image, float32 (n, 6), in the order of `DEPTH_SCORES`.

    An image of 480 x 640 is measured within Eigen's crop. One without a known depth has no scores.

    Args:
        found: Metres, (n, h, w).
        depths: Metres, of that shape.
        furthest: What is further does not count, and nothing further is found; in metres.
    """
    if depths.shape[-2:] == (480, 640):
        top, bottom, left, right = EIGEN_CROP
        found, depths = found[:, top:bottom, left:right], depths[:, top:bottom, left:right]
    rows = []
    for p, d in zip(found.clamp(NEAREST, furthest), depths, strict=True):
        known = (d > NEAREST) & (d < furthest)
        p, d = p[known], d[known]
        ratio = torch.maximum(p / d, d / p)
        within = [(ratio < 1.25**power).float().mean() for power in (1, 2, 3)]
        log10 = (p.log10() - d.log10()).abs().mean()
        rows.append(
            torch.stack(
                [*within, ((p - d).abs() / d).mean(), (p - d).square().mean().sqrt(), log10]
            )
        )
    return torch.stack(rows)


def read_depths(source: str) -> dict[str, list[ImageAndDepth]]:
    """Images and depth images of NYU depth v2, by split.

    Args:
        source: A folder with ``train.txt`` and ``test.txt`` (or the names that BTS and ZoeDepth
            give these lists) with lines of an image, its depth image and perhaps a focal length,
            or with ``train/rgb``, ``train/depth`` and so on. A list's paths are relative to the
            folder, or to ``train`` and ``test`` within it.

    Raises:
        FileNotFoundError: if a list or an image is missing.
        ValueError: for a line of another form, naming it.
    """
    root = user_path(source)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    lists = {
        split: next((root / name for name in names if (root / name).is_file()), None)
        for split, names in _LISTS.items()
    }
    if lists["train"] is None:
        return read_pairs(source, _IMAGES, _DEPTHS, _SPLITS)
    return {s: _from_list(path, root, s) for s, path in lists.items() if path is not None}


@dataclass(frozen=True)
class _Sample:
    size: tuple[int, ...]
    depth_scale: float

    def __call__(self, pair: ImageAndDepth) -> tuple[Tensor, Tensor]:
        image = pixels(open_picture(pair[0]), (self.size[0], self.size[1]))
        return image, metres(pair[1], self.depth_scale)


def metres(depth: Any, scale: float) -> Tensor:
    """A depth image, or an array of metres, as metres: float32 (h, w)."""
    if isinstance(depth, (str, Path)):
        with reading(Path(depth), "a depth image"), Image.open(depth) as picture:
            return metres(picture, scale)
    if isinstance(depth, Image.Image):
        return torch.from_numpy(np.asarray(depth).astype(np.float32)) / scale
    return torch.as_tensor(depth, dtype=torch.float32)


def _collate(samples: list[tuple[Tensor, Tensor]]) -> Mapping[str, Tensor]:
    sizes = {tuple(depth.shape) for _, depth in samples}
    if len(sizes) > 1 or any(len(size) != 2 for size in sizes):
        raise ValueError(f"the depths of a batch must have one size (h, w); they have {sizes}")
    return {
        "pixel_values": torch.stack([image for image, _ in samples]),
        "labels": torch.stack([depth for _, depth in samples]),
    }


def _load(plan: Plan, furthest: int) -> Any:
    from transformers import AutoConfig, DepthAnythingForDepthEstimation

    config = load_part(AutoConfig, plan.preset.model, "a model of transformers")
    was_metric = getattr(config, "depth_estimation_type", "metric") == "metric"
    config.depth_estimation_type, config.max_depth = "metric", furthest
    model = load_model(DepthAnythingForDepthEstimation, plan, config=config)
    if not was_metric:  # its last layer gives inverse distances, where the sigmoid is flat
        last = model.head.conv3
        generator = torch.Generator().manual_seed(torch_seed(plan.settings.seed))
        with torch.no_grad():
            last.weight.copy_(1e-3 * torch.randn(last.weight.shape, generator=generator))
            last.bias.zero_()
    return model


def _from_list(path: Path, root: Path, split: str) -> list[ImageAndDepth]:
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        where = f"{path}, line {number}"
        if len(words) < 2:
            raise ValueError(f"{where}: {line!r} is not an image and its depth image")
        if words[1] == "None":  # BTS's lists name images whose depth is not known
            continue
        inner = root / split if (root / split / words[0].lstrip("/")).is_file() else root
        image, depth = (inner / word.lstrip("/") for word in words[:2])
        found.append((require_picture(image, where), require_picture(depth, where)))
    return found
