"""SAM on one kind of object, without a prompt: as in Conv-LoRA (openreview eZscMer8L0)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.runtime.reading import user_path
from cntlora_core.tasks.data import (
    PICTURES,
    Mapped,
    TableFormat,
    read_tables,
    require_columns,
    require_picture,
    require_splits,
)
from cntlora_core.tasks.images import open_picture, pixels
from cntlora_core.tasks.loading import load_model
from cntlora_core.tasks.mask_scores import MASK_SCORES, mask_rows
from cntlora_core.tasks.presets import SEGMENTATION
from cntlora_core.tasks.recipes import SegmentationSettings
from cntlora_core.tasks.run import TaskResult, run_task
from cntlora_core.tasks.scores import mean_of_each
from cntlora_core.tasks.settings import Plan, planned, preset_named
from cntlora_core.tasks.trainer import Task

ImageAndMask = tuple[Any, Any]
"""Two pictures, each a path or a Pillow image. In a mask what is above half of white counts, or
above 0 where it has 0 and 1 alone."""

_SPLITS = {
    "train": ("train", "TrainDataset", "Train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "TestDataset", "Test"),
}
_IMAGES = ("images", "image", "Images", "Imgs", "Image", "ShadowImages", "input")
_MASKS = ("masks", "mask", "Masks", "GT", "GroundTruth", "Mask", "ShadowMasks", "labels")
_ENDINGS = ("", "_segmentation", "_mask", "_gt")
_NO_IMAGE = "_superpixels"
"""How pictures end that lie among ISIC's images and are none."""


def train_segmentation(
    settings: SegmentationSettings,
    reporter: Reporter = silent,
    *,
    model: nn.Module | None = None,
    data: Mapping[str, Sequence[ImageAndMask]] | None = None,
    **options: Any,
) -> TaskResult:
    """Fine-tune SAM to segment one kind of object.

    Args:
        settings: All settings.
        reporter: Told of all long work.
        model: A SamModel instead of the one that the settings name.
        data: Instead of the data that the settings name: by split (``train`` and others to measure
            on) images and masks.
        options: See :func:`.run_task`.

    Raises:
        ValueError: for data of another form, naming the split or the file.
        FileNotFoundError: if model, data, an image or a mask are not there.
    """
    plan = planned(settings, preset_named(SEGMENTATION, settings.preset, "segmentation"))
    return run_task(segmentation_task(plan, settings, model=model, data=data), plan, reporter,
                    **options)  # fmt: skip


def segmentation_task(
    plan: Plan,
    settings: SegmentationSettings,
    *,
    model: nn.Module | None = None,
    data: Mapping[str, Sequence[ImageAndMask]] | None = None,
) -> Task:
    """Model, data and metric; see :func:`train_segmentation`."""
    from transformers import SamModel

    preset = plan.preset
    if data is None:
        if not preset.data:
            raise ValueError("give data: a folder with the splits' images and masks")
        data = read_pairs(preset.data, _IMAGES, _MASKS, _SPLITS)
    require_splits(data)
    base: Any = model if model is not None else load_model(SamModel, plan)
    side = base.config.vision_config.image_size
    loss_of = LOSSES[settings.loss or preset.options["loss"]]
    samples = {name: Mapped(pairs, _Sample(side)) for name, pairs in data.items()}

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return loss_of(mask_logits(model, batch), batch["labels"])

    def measure(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        logits = mask_logits(model, batch)
        return loss_of(logits, batch["labels"]), mask_rows(logits.sigmoid(), batch["labels"])

    best = preset.options["best"]
    return Task(
        name=settings.preset,
        model=base,
        train=samples["train"],
        splits={name: split for name, split in samples.items() if name != "train"},
        collate=_collate,
        measure=measure,
        score=partial(mean_of_each, MASK_SCORES),
        best=best,
        lower_is_better=best == "balanced_error_rate",
        loss=loss,
        forward_fn=lambda model, batch: mask_logits(model, batch),
    )


def mask_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """SAM's mask without a prompt, (n, 1, h, w), as large as its input."""
    kernel = next(p for n, p in model.named_parameters() if "patch_embed.projection" in n)
    images = batch["pixel_values"].to(kernel)
    found = model(pixel_values=images, multimask_output=False).pred_masks[:, 0].float()
    return nn.functional.interpolate(found, images.shape[-2:], mode="bilinear", align_corners=False)


def structure_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy and intersection over union, both weighted towards edges (arXiv 2006.11392).

    A pixel weighs 1, and up to 5 more the more the masks around it differ from its own.

    Args:
        logits: (n, 1, h, w).
        masks: 0 or 1, of that shape.
    """
    around = nn.functional.avg_pool2d(masks, 31, stride=1, padding=15)
    weight = 1 + 5 * (around - masks).abs()
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    entropy = (weight * entropy).sum((2, 3)) / weight.sum((2, 3))
    found = logits.sigmoid()
    both = (found * masks * weight).sum((2, 3))
    either = ((found + masks) * weight).sum((2, 3)) - both
    return (entropy + 1 - (both + 1) / (either + 1)).mean()


def balanced_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy in which object and background of an image weigh the same.

    Args:
        logits: (n, 1, h, w).
        masks: 0 or 1, of that shape.
    """
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    share = masks.mean((2, 3), keepdim=True)
    weight = masks * (1 - share) + (1 - masks) * share
    return (weight * entropy).sum((2, 3)).div(weight.sum((2, 3)).clamp_min(1e-6)).mean()


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "structure": structure_loss,
    "balanced": balanced_loss,
}


def read_pairs(
    source: str,
    images: Sequence[str],
    targets: Sequence[str],
    splits: Mapping[str, tuple[str, ...]],
) -> dict[str, list[ImageAndMask]]:
    """Images and what belongs to them, by split.

    Args:
        source: A folder with ``train.csv``, ``test.csv`` and so on, with the columns ``image`` and
            ``label``, or with a folder for each split. In it is a folder of images and one of their
            masks, in which a file has the image's name, with or without ``_segmentation`` or
            ``_mask``; or a folder for each part, of that form.
        images: Names that the folder of images may have.
        targets: Names that the other folder may have.
        splits: Names that the folders and files of a split may have.

    Raises:
        FileNotFoundError: if a folder or a file is missing.
        ValueError: if a list lacks a column.
    """
    root = user_path(source)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    if any((root / f"{name}.csv").is_file() for name in splits["train"]):
        return _from_lists(root, splits)
    found: dict[str, list[ImageAndMask]] = {}
    for split, names in splits.items():
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if folder is None:
            continue
        parts = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        for part in parts:
            pictures = next((part / name for name in images if (part / name).is_dir()), None)
            others = next((part / name for name in targets if (part / name).is_dir()), None)
            if pictures is not None and others is not None:
                name = split if part is folder or split == "train" else part.name
                found.setdefault(name, []).extend(_matched(pictures, others))
    if not found:
        raise FileNotFoundError(
            f"{root} holds no split: train.csv and test.csv with the columns image and label are "
            f"expected, or train/{images[0]}, train/{targets[0]}, test/{images[0]} and "
            f"test/{targets[0]}"
        )
    return found


@dataclass(frozen=True)
class _Sample:
    side: int

    def __call__(self, pair: ImageAndMask) -> tuple[Tensor, Tensor]:
        size = (self.side, self.side)
        image = pixels(open_picture(pair[0]), size, Image.Resampling.BILINEAR)
        mask = np.asarray(open_picture(pair[1], "RGB").resize(size, Image.Resampling.NEAREST))
        bright = mask.max(axis=2)  # of a palette's or a labelling tool's colours, too
        return image, torch.from_numpy(bright > bright.max() // 2).float()[None]


def _collate(samples: list[tuple[Tensor, Tensor]]) -> Mapping[str, Tensor]:
    return {
        "pixel_values": torch.stack([image for image, _ in samples]),
        "labels": torch.stack([mask for _, mask in samples]),
    }


def _matched(images: Path, others: Path) -> list[ImageAndMask]:
    by_stem = {path.stem: path for path in sorted(others.iterdir()) if _is_picture(path)}
    pairs = []
    for path in sorted(images.iterdir()):
        if _is_picture(path) and not path.stem.endswith(_NO_IMAGE):
            stems = [path.stem + ending for ending in _ENDINGS if path.stem + ending in by_stem]
            if not stems:
                raise FileNotFoundError(f"{others} holds nothing that belongs to {path}")
            pairs.append((path, by_stem[stems[0]]))
    return pairs


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES


def _from_lists(root: Path, splits: Mapping[str, tuple[str, ...]]) -> dict[str, list[ImageAndMask]]:
    found: dict[str, list[ImageAndMask]] = {}
    for split, rows in read_tables(str(root), TableFormat((), splits)).items():
        where = f"the list of split {split!r} in {root}"
        require_columns(rows, ("image", "label"), where)
        found[split] = [
            (
                require_picture(root / row["image"], f"{where}, row {i}"),
                require_picture(root / row["label"], f"{where}, row {i}"),
            )
            for i, row in enumerate(rows)
        ]
    return found
