"""Reading what a user hands over: paths, JSON and safetensors files that may be damaged or lie.

This is the one place where the libraries' errors become words. A reader opens a file inside
`reading`, where its path is known; whatever is raised there names the file and says what to do.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch import Tensor

HEADER_LIMIT = 100_000_000
"""Bytes that a safetensors header may have: the limit of the format."""

JSON_LIMIT = 100_000_000
"""Bytes of the largest JSON file that is read (a tokenizer's has 4 million)."""

_REASON_LENGTH = 300
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""The data types of a safetensors file that weights may have."""


class UnreadableFileError(ValueError):
    """A file that cannot be read as what it should be; the message names it and says what to do."""


@contextmanager
def reading(
    path: str | Path, what: str, advice: str = "Download or copy it again."
) -> Iterator[None]:
    """Turns what a library raises over the file or folder at ``path`` into words.

    An error whose message names the path already is in words and passes as it is; so do an error
    of a missing package, and CUDA running out of memory, which no file is to blame for.

    Args:
        path: What is read, as the user knows it.
        what: What it should be, with its article: "a LoRA".
        advice: What to do, a sentence.

    Raises:
        UnreadableFileError: whatever else was raised within the block, as its cause.
    """
    try:
        yield
    except (ImportError, NameError):
        raise
    except Exception as error:  # tokenizers raises bare ones, torch and diffusers a dozen kinds
        said = str(path) in str(error) and type(error) is not OSError  # transformers' own are
        if said or type(error).__name__ == "OutOfMemoryError":
            raise
        raise UnreadableFileError(
            f"{path} cannot be read as {what}: {reason(error)}. {advice}"
        ) from error


def reason(error: BaseException) -> str:
    """What an error says, in one line, short, and with its kind where the text alone says little.

    Errors that torch and others raise over hundreds of layers are cut.
    """
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if lacks_memory(error):
        return "it asks for more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if not isinstance(error, (ValueError, OSError)) or " " not in text:
        text = f"{type(error).__name__}: {text}"
    text = text if len(text) <= _REASON_LENGTH else f"{text[:_REASON_LENGTH]} ..."
    return text.rstrip(".")


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, or what torch raises for a CPU and for a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory"))


def user_path(text: str | Path) -> Path:
    """A path as a user wrote it, with ``~`` filled in.

    Raises:
        ValueError: it is empty, holds a zero byte, or begins with the home folder of a user who
            does not exist or has none.
    """
    if not str(text).strip():
        raise ValueError(f"the path {str(text)!r} is empty: give the name of a file or folder")
    if "\0" in str(text):
        raise ValueError(f"the path {str(text)!r} has a zero byte, which no file name can have")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"the path {str(text)!r} begins with a home folder that is not known here: write the "
            "folder out in place of ~"
        ) from error


def require_file(path: Path, what: str) -> None:
    """Checks that ``path`` is a regular file; opening a pipe would wait for ever.

    Args:
        path: The file.
        what: What it should be, with its article.

    Raises:
        FileNotFoundError: nothing is there.
        UnreadableFileError: something else than a file is there, or the system refuses to look.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}: give the name of {what}") from None
    except (OSError, ValueError) as error:
        raise UnreadableFileError(
            f"{path} cannot be opened: {reason(error)}. Give the name of {what}."
        ) from error
    if not stat.S_ISREG(mode):
        kinds = {
            stat.S_ISDIR: "a folder",
            stat.S_ISFIFO: "a named pipe",
            stat.S_ISSOCK: "a socket",
        }
        found = next((name for test, name in kinds.items() if test(mode)), "a device")
        raise UnreadableFileError(f"{path} is {found}, not a file: give the name of {what}.")


def read_json_object(path: Path, what: str = "a JSON file") -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: nothing is there.
        UnreadableFileError: it is no JSON object, is nested too deeply, or is larger than
            `JSON_LIMIT`.
    """
    require_file(path, what)
    with reading(path, what):
        if path.stat().st_size > JSON_LIMIT:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, over {JSON_LIMIT:,}")
        return json_object(path.read_text("utf-8"))


def json_object(text: str) -> dict[str, Any]:
    """The object in a JSON text.

    Raises:
        ValueError: it is no JSON object, or nested too deeply.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("this JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"this is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("this JSON does not hold an object")
    return content


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in a safetensors file: bytes ``start`` to ``end`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def parse_header(raw: bytes, size: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors and the strings of a safetensors header, checked against the file's size.

    Args:
        raw: The header's JSON, without the eight bytes of its length.
        size: Bytes of the whole file.

    Raises:
        ValueError: it is no such header, an entry is not what the format asks for, or tensors
            overlap, leave holes or end before or after the file.
    """
    content = json_object(raw.decode("utf-8"))
    metadata = content.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("__metadata__ does not map names to texts")
    first = 8 + len(raw)
    entries = {name: _entry(name, value, first) for name, value in content.items()}
    position, last = first, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise ValueError(f"the bytes of {name!r} and of {last!r} overlap or leave a hole")
        position, last = entry.end, name
    if position != size:
        raise FileSizeError(position, size)
    return entries, metadata


class FileSizeError(ValueError):
    """A file that is shorter or longer than its header says."""

    def __init__(self, expected: int, size: int) -> None:
        what = "is truncated" if size < expected else "has bytes after its last tensor"
        super().__init__(f"the file {what}: it should have {expected:,} bytes and has {size:,}")


def _entry(name: str, value: Any, first: int) -> TensorEntry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _whole_numbers(shape) or not _whole_numbers(offsets):
        raise ValueError(f"the header's entry of {name!r} is no dtype, shape and data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r} has the data_offsets {offsets}")
    if dtype not in _BYTES:
        raise ValueError(f"{name!r} has the data type {dtype!r}, which is not known here")
    if math.prod(shape) * _BYTES[dtype] != offsets[1] - offsets[0]:
        raise ValueError(
            f"{name!r} of shape {_shape(shape)} and type {dtype} has {offsets[1] - offsets[0]:,} "
            "bytes"
        )
    return TensorEntry(dtype, tuple(shape), first + offsets[0], first + offsets[1])


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _shape(shape: list[int]) -> str:
    return str(shape) if len(shape) < 8 else f"[{len(shape)} sides]"


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are, in one pass that makes no copy."""
    if not tensor.numel():
        return True
    tensor = tensor.detach()
    low, high = tensor.float().aminmax() if tensor.element_size() < 2 else tensor.aminmax()
    return math.isfinite(float(low)) and math.isfinite(float(high))


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text for a terminal: control characters and what is no Unicode appear as escapes.

    What a file says of itself may hold escapes that move the cursor, retitle the window or hide
    what stands beside them. Line feeds and tabs stay.
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)
