"""Image classification: VTAB-1K (arXiv 1910.04867), or folders of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cntlora_core.runtime.progress import Reporter, silent
from cntlora_core.runtime.reading import user_path
from cntlora_core.runtime.seeds import torch_seed
from cntlora_core.tasks.data import (
    PICTURES,
    Mapped,
    TableFormat,
    column_of,
    read_tables,
    require_columns,
    require_picture,
    require_splits,
)
from cntlora_core.tasks.images import open_picture, pixels
from cntlora_core.tasks.loading import load_model
from cntlora_core.tasks.presets import VISION
from cntlora_core.tasks.recipes import VisionSettings
from cntlora_core.tasks.run import TaskResult, run_task
from cntlora_core.tasks.settings import Plan, planned, preset_named
from cntlora_core.tasks.text import loss_of_classes, measure_classes, score_classes
from cntlora_core.tasks.trainer import Task

Picture = tuple[Any, int]
"""A picture (a path, a Pillow image) and its class."""

HEAD_DEVIATION = 2e-5
"""Of the weights of a fresh head; its biases are 0."""

_HUB = TableFormat(
    (),
    {
        "train": ("train",),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test",),
    },
)


def train_vision(
    settings: VisionSettings,
    reporter: Reporter = silent,
    *,
    model: nn.Module | None = None,
    data: Mapping[str, Sequence[Picture]] | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    **options: Any,
) -> TaskResult:
    """Fine-tune an image classifier.

    Args:
        settings: All settings.
        reporter: Told of all long work.
        model: Instead of the one that the settings name: with a head for the classes.
        data: Instead of the data that the settings name: by split (``train`` and others to measure
            on, the first of which chooses the checkpoint) pictures and their classes, from 0.
        transform: From a picture to what the model reads, (channels, height, width); default:
            resized by bicubic interpolation and normalised as ImageNet's.
        options: See :func:`.run_task`.

    Raises:
        ValueError: for data of another form, naming the split, the line or the class.
        FileNotFoundError: if model, data or a picture are not there.
    """
    plan = planned(settings, preset_named(VISION, settings.preset, "vision"))
    task = vision_task(plan, settings, model=model, data=data, transform=transform)
    return run_task(task, plan, reporter, **options)


def vision_task(
    plan: Plan,
    settings: VisionSettings,
    *,
    model: nn.Module | None = None,
    data: Mapping[str, Sequence[Picture]] | None = None,
    transform: Callable[[Any], Tensor] | None = None,
) -> Task:
    """Model, data and metric; see :func:`train_vision`."""
    from transformers import AutoModelForImageClassification

    preset = plan.preset
    name, classes = "image classification", None
    if data is None:
        if not preset.data:
            raise ValueError("give data: a folder in VTAB-1K's layout, one of classes, or a hub id")
        data, classes = read_pictures(preset.data, settings.tune)
        name = Path(preset.data).name
    require_splits(data)
    count = max(_count_classes(data), len(classes or ()))
    base: Any = model
    if base is None:
        base = load_model(
            AutoModelForImageClassification, plan, num_labels=count, ignore_mismatched_sizes=True
        )
        _fresh_head(base, settings.seed)
    elif (own := getattr(getattr(base, "config", None), "num_labels", count)) < count:
        raise ValueError(
            f"the data have the class {count - 1}, and the model {own} classes, from 0"
        )
    side = settings.image_size or preset.options["image_size"]
    make = transform or _Transform(side)
    samples = {key: Mapped(split, _Sample(make)) for key, split in data.items()}
    return Task(
        name=name,
        model=base,
        train=samples["train"],
        splits={key: split for key, split in samples.items() if key != "train"},
        collate=collate_pictures,
        measure=measure_classes,
        score=score_classes,
        best="accuracy",
        loss=loss_of_classes,
    )


def read_pictures(
    source: str, tune: bool = False
) -> tuple[dict[str, Sequence[Picture]], tuple[str, ...] | None]:
    """Pictures and classes by split, and the classes' names where there are any.

    Args:
        source: A folder with VTAB-1K's lists (``train800val200.txt``, ``test.txt``, and so on, with
            lines of a path and a class), a folder with one folder for each split and in it one for
            each class, or a hub id of a data set with the columns ``image`` and ``label``.
        tune: With lists: ``train800.txt`` and ``val200.txt`` instead of all 1000 and the test set.

    Raises:
        ValueError: for a list with a line of another form, naming it.
        FileNotFoundError: if a list, a picture or the data are not there.
    """
    root = user_path(source)
    if not root.is_dir():
        return _from_tables(source)
    if any(root.glob("train800*.txt")):
        lists = ("train800.txt", "val200.txt") if tune else ("train800val200.txt", "test.txt")
        names = ("train", "validation" if tune else "test")
        return {n: _from_list(root / file) for n, file in zip(names, lists, strict=True)}, None
    found = {
        split: folder
        for split, names in _HUB.splits.items()
        for folder in [next((root / name for name in names if (root / name).is_dir()), None)]
        if folder is not None
    }
    if "train" not in found:
        return _from_tables(source)
    classes = sorted(path.name for path in found["train"].iterdir() if path.is_dir())
    if not classes:
        raise FileNotFoundError(
            f"{found['train']} holds no folders of classes: one folder for each class is expected, "
            "with its pictures in it"
        )
    return {split: _from_classes(folder, classes) for split, folder in found.items()}, tuple(
        classes
    )


def collate_pictures(samples: list[tuple[Tensor, int]]) -> Mapping[str, Tensor]:
    """A batch of pictures of one size, and their classes."""
    return {
        "pixel_values": torch.stack([picture for picture, _ in samples]),
        "labels": torch.tensor([label for _, label in samples]),
    }


@dataclass(frozen=True)
class _Transform:
    side: int

    def __call__(self, picture: Any) -> Tensor:
        return pixels(picture, (self.side, self.side))


@dataclass(frozen=True)
class _Sample:
    transform: Callable[[Any], Tensor]

    def __call__(self, sample: Picture) -> tuple[Tensor, int]:
        picture, label = sample
        return self.transform(open_picture(picture)), label


class _Table(Dataset[Picture]):
    def __init__(self, rows: Any, image: str, label: str) -> None:
        self.rows, self.image, self.labels = rows, image, rows[label]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Picture:
        return self.rows[index][self.image], self.labels[index]


def _fresh_head(model: Any, seed: int) -> None:
    head = getattr(model, "classifier", None)
    if isinstance(head, nn.Linear):
        generator = torch.Generator().manual_seed(torch_seed(seed))
        with torch.no_grad():
            head.weight.copy_(HEAD_DEVIATION * torch.randn(head.weight.shape, generator=generator))
            head.bias.zero_()


def _labels(samples: Any) -> Sequence[int]:
    """The classes alone: a table's pictures need not be decoded for them."""
    return samples.labels if isinstance(samples, _Table) else [label for _, label in samples]


def _count_classes(data: Mapping[str, Sequence[Picture]]) -> int:
    highest = 0
    for split, samples in data.items():
        for i, label in enumerate(_labels(samples)):
            if isinstance(label, bool) or not isinstance(label, int) or label < 0:
                raise ValueError(
                    f"split {split!r}, sample {i}: the class {label!r} is not a whole number from 0"
                )
            highest = max(highest, label)
    return highest + 1


def _from_list(path: Path) -> list[Picture]:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: VTAB-1K's layout has train800.txt, val200.txt, "
            "train800val200.txt and test.txt beside the images"
        )
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if not name or not label.isdigit():
            raise ValueError(
                f"{path}, line {number}: {line!r} is not a path, a blank and the number of a class"
            )
        found.append((require_picture(path.parent / name, f"{path}, line {number}"), int(label)))
    return found


def _from_classes(folder: Path, classes: Sequence[str]) -> list[Picture]:
    unknown = {p.name for p in folder.iterdir() if p.is_dir()} - set(classes)
    if unknown:
        raise ValueError(
            f"{folder} has the class {sorted(unknown)[0]!r}, which the training data have not"
        )
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in PICTURES
    ]


def _from_tables(
    source: str,
) -> tuple[dict[str, Sequence[Picture]], tuple[str, ...] | None]:
    found: dict[str, Sequence[Picture]] = {}
    classes = None
    for split, rows in read_tables(source, _HUB).items():
        where = f"split {split!r} of {source}"
        image = column_of(rows, ("image", "img"), where)
        label = column_of(rows, ("label", "labels", "fine_label"), where)
        require_columns(rows, (image, label), where)
        kind = getattr(rows, "features", {}).get(label)
        classes = tuple(getattr(kind, "names", ())) or None
        found[split] = _Table(rows, image, label)  # pyright: ignore[reportArgumentType]
    return found, classes
