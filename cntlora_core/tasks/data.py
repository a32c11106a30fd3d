"""Tables of samples: from the hub, from folders in the usual layouts, or from memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from cntlora_core.runtime.hub import why_not_fetched
from cntlora_core.runtime.reading import reading, reason, user_path
from cntlora_core.runtime.seeds import torch_seed

Row = Mapping[str, Any]
Rows = Sequence[Row]
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".tsv": "csv", ".csv": "csv"}
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class Mapped(Dataset[Any]):
    """A dataset whose samples are made when they are asked for."""

    def __init__(self, rows: Sequence[Any], make: Callable[[Any], Any]) -> None:
        self.rows, self.make = rows, make

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.make(self.rows[index])


def at_most(dataset: Any, count: int | None, seed: int) -> Any:
    """The dataset, or that many samples of it that are taken at random."""
    if count is None or count >= len(dataset):
        return dataset
    return Subset(dataset, shuffled(len(dataset), seed)[:count])


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below `count` in an order that the seed decides."""
    generator = torch.Generator().manual_seed(torch_seed(seed))
    return torch.randperm(count, generator=generator).tolist()


@dataclass(frozen=True)
class TableFormat:
    """How the files of a data set are laid out, where that is not plain from their names.

    Attributes:
        folders: Names that the folder of the data may have within the one that is given.
        splits: By split, the names that its files and its part of a hub's data may have.
        column_names: Of .tsv and .csv files without a header.
    """

    folders: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]]
    column_names: tuple[str, ...] = ()


def read_tables(source: str, layout: TableFormat, config: str | None = None) -> dict[str, Any]:
    """The splits of a data set that are there, each a ``datasets.Dataset``.

    Args:
        source: Hub id, or a folder with parquet, JSON, JSON-lines, TSV or CSV files that are named
            after their splits, or what ``save_to_disk`` wrote.
        layout: Names of folders and splits.
        config: The hub's name for a part of the data.

    Raises:
        ImportError: without the library ``datasets``; names the extra that brings it.
        FileNotFoundError: if there is no such data.
        ValueError: if files cannot be read as what they are named.
    """
    load_dataset, load_from_disk = _datasets()
    root = user_path(source)
    if not root.is_dir():
        if root.exists():
            raise FileNotFoundError(f"{source} is a file: give the folder that holds it")
        try:
            found: Any = load_dataset(source, config)
        except Exception as error:
            raise FileNotFoundError(
                f"data {source}: {why_not_fetched(error, 'a data set')}"
            ) from error
        return _named(found, layout, f"the hub's {source}")
    folder = _data_folder(root, layout)
    if (folder / "dataset_dict.json").is_file():
        return _named(load_from_disk(str(folder)), layout, str(folder))
    tables = {}
    for split, names in layout.splits.items():
        files = [path for path in sorted(folder.iterdir()) if _is_of(path, names)]
        if files:
            tables[split] = _read_files(load_dataset, files, layout)
    if not tables:
        expected = ", ".join(f"{names[0]}.*" for names in layout.splits.values())
        raise FileNotFoundError(
            f"{folder} holds no table named after a split ({expected}, as parquet, jsonl, json, "
            f"tsv or csv): it has {_listed(p.name for p in folder.iterdir())}"
        )
    return tables


def read_records(path: Path) -> list[dict[str, Any]]:
    """A JSON file with a list of records, or one record a line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    import json

    try:
        text = path.read_text("utf-8-sig")
        if path.suffix == ".jsonl":
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            found = json.loads(text)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {path}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {reason(error)}") from error
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise ValueError(f"{path} holds no list of records")
    return found


def require_columns(rows: Any, columns: Iterable[str], where: str) -> None:
    """Refuse a split that is empty or lacks a column.

    Raises:
        ValueError: naming the column that is missing, and those that there are.
    """
    if len(rows) == 0:
        raise ValueError(f"{where} is empty: there is no sample in it")
    there = list(getattr(rows, "column_names", None) or rows[0])
    for column in columns:
        if column not in there:
            raise ValueError(
                f"{where} has no column {column!r}; its columns are {', '.join(map(str, there))}"
            )


def require_splits(data: Mapping[str, Sequence[Any]]) -> None:
    """Refuse data without training samples, without any to measure on, or with an empty split.

    Raises:
        ValueError: naming the split.
    """
    if "train" not in data or len(data) < 2:
        raise ValueError(
            f"a split 'train' and one to measure on are needed; there are {', '.join(data)}"
        )
    for name, samples in data.items():
        if len(samples) == 0:
            raise ValueError(f"split {name!r} is empty: there is no sample in it")


def column_of(rows: Any, names: Sequence[str], where: str) -> str:
    """The first of several names that a column has.

    Raises:
        ValueError: if there is none of them.
    """
    there = list(getattr(rows, "column_names", None) or (rows[0] if len(rows) else ()))
    found = [name for name in names if name in there]
    if not found:
        require_columns(rows, names[:1], where)
    return found[0]


def require_picture(path: Path, where: str) -> Path:
    """Refuse a picture that is not there.

    Raises:
        FileNotFoundError: naming it and what refers to it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{where} names the image {path}, which is not there")
    return path


def _datasets() -> tuple[Any, Any]:
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise ImportError(
            "reading this data needs the library datasets: pip install 'cntlora[tasks]'"
        ) from error
    return load_dataset, load_from_disk


def _data_folder(root: Path, layout: TableFormat) -> Path:
    wanted = {name.lower() for name in layout.folders}
    inner = [path for path in sorted(root.iterdir()) if path.name.lower() in wanted]
    return next((path for path in inner if path.is_dir()), root)


def _is_of(path: Path, names: Sequence[str]) -> bool:
    stem = path.name.partition(".")[0]
    return path.suffix in KINDS and any(n == stem or stem.startswith(f"{n}-") for n in names)


def _read_files(load_dataset: Any, files: Sequence[Path], layout: TableFormat) -> Any:
    kind = KINDS[files[0].suffix]
    options: dict[str, Any] = {}
    if kind == "csv":  # "null" is a word like any other
        options["keep_default_na"] = False
        if files[0].suffix == ".tsv":
            options |= {"sep": "\t", "quoting": 3, "features": _words(files[0], layout)}
        if layout.column_names:
            options |= {"header": None, "names": list(layout.column_names)}
    chosen = [str(path) for path in files if KINDS[path.suffix] == kind]
    try:
        return load_dataset(kind, data_files=chosen, split="train", **options)
    except Exception as error:  # the library raises a dozen kinds
        cause = error.__cause__ or error
        raise ValueError(f"{files[0]} cannot be read as {kind}: {reason(cause)}") from error


def _words(path: Path, layout: TableFormat) -> Any:
    """All columns as text: a broken line must not decide what a column holds."""
    from datasets import Features, Value

    with reading(path, "a table"), path.open(encoding="utf-8-sig") as lines:
        names = layout.column_names or next(lines, "").rstrip("\r\n").split("\t")
    return Features({name: Value("string") for name in names})


def _named(found: Mapping[str, Any], layout: TableFormat, where: str) -> dict[str, Any]:
    tables = {
        split: next(found[name] for name in names if name in found)
        for split, names in layout.splits.items()
        if any(name in found for name in names)
    }
    if not tables:
        raise FileNotFoundError(
            f"{where} has none of the splits {_listed(layout.splits)}; it has {_listed(found)}"
        )
    return tables


def _listed(names: Iterable[str], most: int = 8) -> str:
    found = [str(name) for name in names]
    rest = f" and {len(found) - most} more" if len(found) > most else ""
    return (", ".join(found[:most]) or "nothing") + rest
