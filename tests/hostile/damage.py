"""Ways to damage a file, each as a function of a sound file's bytes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

Change = Callable[[bytes], bytes]
"""A sound file's bytes in, a damaged one's out."""

DEEP = "[" * 100_000 + "]" * 100_000


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def entry(change: Callable[[dict[str, Any]], object], which: int = 0) -> Change:
    """Changes the header's entry of one tensor; what ``change`` returns, if a dict, replaces it."""

    def damaged(content: bytes) -> bytes:
        header, data = split(content)
        names = [name for name in header if name != "__metadata__"]
        found = change(header[names[which]])
        if found is not None:
            header[names[which]] = found
        return joined(header, data)

    return damaged


def whole_header(change: Callable[[dict[str, Any]], object]) -> Change:
    def damaged(content: bytes) -> bytes:
        header, data = split(content)
        return joined(change(header), data)

    return damaged


def _retyped(dtype: str) -> Change:
    """All tensors of another data type, in as many bytes of zeros as that takes."""
    sizes = {"BOOL": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8, "C64": 8, "F8_E8M0": 1}

    def damaged(content: bytes) -> bytes:
        header, _ = split(content)
        position = 0
        for name, found in header.items():
            if name == "__metadata__":
                continue
            count = sizes[dtype]
            for side in found["shape"]:
                count *= side
            found["dtype"], found["data_offsets"] = dtype, [position, position + count]
            position += count
        return joined(header, b"\x01" * position)

    return damaged


def _reshaped(shape: Callable[[int], list[int]]) -> Change:
    """All tensors of another shape with the same number of values."""

    def damaged(content: bytes) -> bytes:
        header, data = split(content)
        for name, found in header.items():
            if name != "__metadata__":
                count = 1
                for side in found["shape"]:
                    count *= side
                found["shape"] = shape(count)
        return joined(header, data)

    return damaged


def _scalars(content: bytes) -> bytes:
    header, _ = split(content)
    names = [name for name in header if name != "__metadata__"]
    return joined(
        {
            name: {"dtype": "F32", "shape": [], "data_offsets": [4 * i, 4 * i + 4]}
            for i, name in enumerate(names)
        },
        b"\x00" * (4 * len(names)),
    )


def _filled(pattern: bytes) -> Change:
    """All values the same four bytes."""

    def damaged(content: bytes) -> bytes:
        header, data = split(content)
        return joined(header, pattern * (len(data) // 4) + b"\x00" * (len(data) % 4))

    return damaged


def _reversed(found: dict[str, Any]) -> None:
    found["data_offsets"] = found["data_offsets"][::-1]


NAN, INFINITY = b"\x00\x7e\xc0\x7f", b"\x00\x00\x80\x7f"
"""Not a number (as float32; also as two float16), and infinity (as float32)."""

NO_SAFETENSORS: dict[str, Change] = {
    "empty": lambda content: b"",
    "three bytes": lambda content: b"abc",
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "web page": lambda content: b"<!DOCTYPE html><html><body>please log in</body></html>",
    "pickle": lambda content: pickle.dumps({"state_dict": {"x": [1.0] * 30}}, protocol=2),
    "zip": lambda content: b"PK\x03\x04" + b"\x00" * 100,
    "zeros": lambda content: b"\x00" * 200,
    "cut in the header": lambda content: content[:40],
    "cut in the data": lambda content: content[:-3],
    "trailing bytes": lambda content: content + b"\x00" * 7,
    "header longer than the file": lambda content: (1 << 40).to_bytes(8, "little") + content[8:],
    "header of negative length": lambda content: b"\xff" * 8 + content[8:],
    "header null": whole_header(lambda header: "null"),
    "header list": whole_header(lambda header: "[1, 2]"),
    "header text": whole_header(lambda header: '"tensors"'),
    "header deep": whole_header(lambda header: '{"x":' + DEEP + "}"),
    "header no JSON": whole_header(lambda header: '{"x": '),
    "header no UTF-8": lambda content: joined('{"\udcff": 1}', b""),
    "header twice the same tensor": whole_header(
        lambda header: '{"x": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "y": 3}'
    ),
}
"""Files that are no whole safetensors file."""

BAD_ENTRIES: dict[str, Change] = {
    "entry null": whole_header(lambda header: header | {list(header)[-1]: None}),
    "entry number": whole_header(lambda header: header | {list(header)[-1]: 5}),
    "entry without dtype": entry(lambda found: found.pop("dtype") and None),
    "entry without shape": entry(lambda found: found.pop("shape") and None),
    "entry without offsets": entry(lambda found: found.pop("data_offsets") and None),
    "unknown dtype": entry(lambda found: found.update(dtype="F3")),
    "dtype a number": entry(lambda found: found.update(dtype=3)),
    "dtype a list": entry(lambda found: found.update(dtype=["F32"])),
    "shape null": entry(lambda found: found.update(shape=None)),
    "shape of text": entry(lambda found: found.update(shape="32")),
    "shape of fractions": entry(lambda found: found.update(shape=[1.5, 2])),
    "shape negative": entry(lambda found: found.update(shape=[-1, 4])),
    "shape huge": entry(lambda found: found.update(shape=[2**40, 2**40])),
    "shape too large for its bytes": entry(
        lambda found: found.update(shape=[*found["shape"], 1000])
    ),
    "offsets reversed": entry(_reversed),
    "offsets negative": entry(lambda found: found.update(data_offsets=[-8, 0])),
    "offsets beyond the end": entry(lambda found: found.update(data_offsets=[0, 2**50])),
    "offsets of one number": entry(lambda found: found.update(data_offsets=[0])),
    "offsets of text": entry(lambda found: found.update(data_offsets=["0", "4"])),
    "offsets null": entry(lambda found: found.update(data_offsets=None)),
    "metadata a list": whole_header(lambda header: header | {"__metadata__": [1]}),
    "metadata nested": whole_header(lambda header: header | {"__metadata__": {"a": {"b": 1}}}),
}
"""Safetensors files whose header lies about a tensor."""

BAD_TENSORS: dict[str, Change] = {
    "all scalars": _scalars,
    "all one-dimensional": _reshaped(lambda count: [count]),
    "all three-dimensional": _reshaped(lambda count: [1, count, 1]),
    "int8": _retyped("I8"),
    "uint8": _retyped("U8"),
    "int32": _retyped("I32"),
    "int64": _retyped("I64"),
    "bool": _retyped("BOOL"),
    "complex": _retyped("C64"),
    "scales of a quantisation": _retyped("F8_E8M0"),
    "not a number": _filled(NAN),
    "infinite": _filled(INFINITY),
}
"""Sound safetensors files whose tensors cannot be a model's."""

BAD_JSON: dict[str, Change] = {
    "empty": lambda content: b"",
    "null": lambda content: b"null",
    "list": lambda content: b"[]",
    "number": lambda content: b"7",
    "cut": lambda content: content[: len(content) // 2],
    "no UTF-8": lambda content: b'{"a": "\xff\xfe"}',
    "deep": lambda content: b'{"a": ' + DEEP.encode() + b"}",
    "zeros": lambda content: b"\x00" * 64,
}
"""What no JSON object is."""


def json_with(**values: Any) -> Change:
    """The same object with other values."""
    return lambda content: json.dumps(json.loads(content) | values).encode()
