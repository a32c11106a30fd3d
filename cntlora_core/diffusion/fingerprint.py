"""Telling models apart by all their weights, whatever their names, places and dates."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from cntlora_core.diffusion.checkpoint import folder_weights
from cntlora_core.diffusion.family import family_of
from cntlora_core.runtime.files import user_cache, write_json_atomic
from cntlora_core.runtime.progress import Reporter, silent

KEPT_NAME = "fingerprints.json"
STAGE = "reading the model's weights (MB)"
SECONDS_OF_SILENCE = 2.0
_LARGE = 64_000_000
"""Bytes from which on a file's hash is kept: a smaller file takes a fraction of a second."""
_MOST_KEPT = 200
_CHUNK = 1 << 22
_UNSETTLED = 2_000_000_000
"""Nanoseconds: a file that was changed so lately may change again within the same time stamp."""


def fingerprint_model(path: str | Path, reporter: Reporter = silent) -> str:
    """16 hex digits that identify a checkpoint file or a diffusers folder.

    Args:
        path: The file or folder.
        reporter: Told the megabytes read, where that takes more than two seconds.

    Raises:
        CheckpointError: it is no model of a known family, or a part of the folder is missing.
    """
    path = Path(path)
    family = family_of(path)
    if not path.is_dir():
        return fingerprint_files([path], reporter)
    used = {file for part in family.parts for file in folder_weights(path, part)}
    used |= {path / part / "config.json" for part in family.parts}
    return fingerprint_files(sorted(used), reporter)


def fingerprint_files(files: Iterable[Path], reporter: Reporter = silent) -> str:
    """16 hex digits that identify the content of ``files``, whatever their names and places.

    A sha256 of every byte. That of a large file is kept in the user's cache, by the file's path,
    size, identity and times, so that the file is read once; without a writable cache it is kept
    for the length of the process.
    """
    files = list(files)
    total = sum(file.stat().st_size for file in files)
    started, before = time.monotonic(), 0

    def told(done: int) -> None:
        if time.monotonic() - started > SECONDS_OF_SILENCE:
            reporter(STAGE, (before + done) // 10**6, total // 10**6, {})

    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{_digest(file, told)};".encode())
        before += file.stat().st_size
    return digest.hexdigest()[:16]


_known: dict[str, tuple[list[int], str]] = {}


def _digest(file: Path, told: Callable[[int], None]) -> str:
    """The sha256 of a file's bytes: the kept one, or computed now."""
    place, facts = os.path.realpath(file), _facts(file)
    large = facts[0] >= _LARGE
    if large:
        if place not in _known:
            _known.update(_kept())
        if place in _known and _known[place][0] == facts:
            return _known[place][1]
    digest, done = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            told(done)
    found = digest.hexdigest()
    settled = time.time_ns() - max(facts[1:3]) > _UNSETTLED and _facts(file) == facts
    if large and settled:
        _known[place] = (facts, found)
        with suppress(OSError, RuntimeError, ValueError):  # a cache that cannot be written
            entries = {**_kept(), place: _known[place]}
            latest = list(entries.items())[-_MOST_KEPT:]
            write_json_atomic(user_cache() / KEPT_NAME, dict(latest))
    return found


def _facts(file: Path) -> list[int]:
    """Size in bytes, times of the last change of content and of anything (ns), inode."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _kept() -> dict[str, tuple[list[int], str]]:
    with suppress(OSError, RuntimeError, ValueError, TypeError, AttributeError):
        content = json.loads((user_cache() / KEPT_NAME).read_text("utf-8"))
        return {str(place): (list(facts), str(found)) for place, (facts, found) in content.items()}
    return {}
