"""File names made from what users write, valid on every system, different for different text."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

_RESERVED_ON_WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def safe_name(text: str, *, max_length: int = 80, fallback: str = "unnamed") -> str:
    """A file name made from user text: letters, digits, `-`, `_`, `.` of ASCII and nothing else.

    No separators, no leading dot or dash, no trailing dot, no name that Windows reserves. A space
    becomes `_`; text that loses anything else (a question mark, an accent, its end because it is
    too long) gets eight digits of its hash, so that it differs from other text. What differs in
    case, or in a space against `_`, needs `distinct_names`.
    """
    if max_length < 20:
        raise ValueError(f"max_length must be at least 20, got {max_length}")
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", plain)
    name = name.lstrip("._-").rstrip("._")
    if name != text.replace(" ", "_") and text.strip():
        name = f"{name or fallback}-{_digest_of(text)}"
    name = name or fallback
    if _RESERVED_ON_WINDOWS.fullmatch(name):
        name = f"name-{name}"
    if len(name) > max_length:
        name = _with_digest(name, text, max_length)
    return name


def distinct_names(
    texts: Sequence[str], *, max_length: int = 80, reserved: Iterable[str] = ()
) -> list[str]:
    """A file name for each text as `safe_name` makes it, all different, also where case is ignored.

    Args:
        texts: may hold the same text twice: the second name then ends in a number.
        max_length: of a name.
        reserved: names that are taken already.
    """
    taken = {name.casefold() for name in reserved}
    names: list[str] = []
    for text in texts:
        name = safe_name(text, max_length=max_length)
        if name.casefold() in taken:
            name = _with_digest(name, text, max_length)
        first, count = name, 1
        while name.casefold() in taken:
            count += 1
            name = f"{first[: max_length - len(str(count)) - 1]}-{count}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _with_digest(name: str, text: str, max_length: int) -> str:
    return f"{name[: max_length - 9].rstrip('._-')}-{_digest_of(text)}"
