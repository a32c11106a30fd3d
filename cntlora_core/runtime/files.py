"""Writing files so that a reader finds the old one or the new one, never half of one.

Every writer of the package goes through `atomic_write`: the new content grows in a hidden file
beside the target, is flushed to the disk, and takes the target's name in one step.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from cntlora_core.runtime.reading import user_path

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: there an open file cannot be deleted, which serves the same end
    fcntl = None

_FULL_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file system, or a limit on file sizes, refuses a file this large",
}
_WINDOWS_DISK_FULL = (39, 112)
_LONGEST_NAME_IN_TEMP = 200  # bytes; file systems allow 255, and a suffix is added


@contextmanager
def atomic_write(path: str | Path, *, needed_bytes: int | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path`; it replaces `path` when the block ends well.

    The temporary file exists already and is empty: write into it in place. Any exception,
    KeyboardInterrupt too, removes it and leaves the old file as it was. What a killed process
    left behind is removed by the next write of the same path; the temporary file of a living
    writer is locked and stays. A symbolic link at `path` is replaced, never followed: in a shared
    folder somebody else may have planted it.

    Args:
        path: the file to create or replace; missing parent folders are created.
        needed_bytes: size of the new file, if known. Used for a check beforehand and in messages.

    Raises:
        OSError: the disk is full (says what is needed and what is free), the folder is not
            writable, or `path` is a folder or a device. The old file is untouched.
    """
    target = _checked_target(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        if needed_bytes is not None and needed_bytes > (free := _free_bytes(target.parent)):
            raise _disk_full(errno.ENOSPC, target, decimal(needed_bytes), free)
        temp, descriptor = _create_temp(target)
    except OSError as error:
        if error.strerror is None:  # ours
            raise
        raise _folder_error(target.parent, error) from error
    try:
        yield temp
        with temp.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temp, target)
    except Exception as error:
        number = _error_number(error)
        if number in _FULL_DISK:
            written = temp.stat().st_size if temp.exists() else 0
            temp.unlink(missing_ok=True)  # before measuring what is free without it
            needed = decimal(needed_bytes) if needed_bytes else f"over {decimal(written)}"
            raise _disk_full(number, target, needed, _free_bytes(target.parent)) from error
        if number in (errno.EACCES, errno.EPERM) and target.exists():
            raise _os_error(
                PermissionError,
                number,
                f"cannot replace {target}: {error}. If another program has it open, close that "
                "program or choose another name.",
            ) from error
        if number is not None and not isinstance(error, OSError):
            raise _os_error(OSError, number, f"cannot write {target}: {error}") from error
        raise
    finally:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)  # only now: the lock says that the writer is alive
    _sync_folder(target.parent)


def write_json_atomic(path: str | Path, value: Any, *, indent: int | None = 2) -> Path:
    """Writes `value` as UTF-8 JSON, see `atomic_write`; returns the path.

    Raises:
        TypeError, ValueError: `value` is not JSON (NaN and infinity are not); nothing is written.
        OSError: as `atomic_write`.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot write {path} as JSON: {error}") from error
    # A lone surrogate (a file name that is not UTF-8) has no UTF-8 form: keep it as an escape.
    content = text.encode("utf-8", "backslashreplace")
    with atomic_write(path, needed_bytes=len(content)) as temp:
        temp.write_bytes(content)
    return Path(path)


def finite_or_null(value: Any) -> Any:
    """A JSON value with None for numbers that are not finite, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_safetensors_atomic(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes a safetensors file, see `atomic_write`; returns the path.

    Tensors may be on any device, not contiguous, and share memory; each is stored in full. The
    file is serialised in memory first (safetensors' own writer makes a temporary file under a name
    of its own, which nobody would clean up after a kill), so saving needs its size once more.

    Raises:
        TypeError: a tensor or a metadata value has the wrong type.
        OSError: as `atomic_write`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save

    metadata = dict(metadata or {})
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(
                f"safetensors metadata maps str to str, got {key!r}: {text!r}. Use json.dumps."
            )
    try:
        content = save(_storable(tensors), metadata=metadata or None)
    except SafetensorError as error:
        raise ValueError(f"cannot store these tensors in {path}: {error}") from error
    with atomic_write(path, needed_bytes=len(content)) as temp:
        temp.write_bytes(content)
    return Path(path)


def require_writable_folder(path: str | Path, needed_bytes: int = 0) -> Path:
    """Creates the folder if it is missing, tries a file in it, and returns it.

    Raises:
        ValueError: an empty path.
        NotADirectoryError: a file is in the way (says which).
        PermissionError: the folder cannot be created or written to.
        OSError: less than `needed_bytes` free (says both), or anything else the system says.
    """
    if not str(path).strip():
        raise ValueError("the folder's name is empty: give the folder to write to")
    folder = user_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # without a name where the system can do that
            pass
    except OSError as error:
        raise _folder_error(folder, error) from error
    if needed_bytes > (free := _free_bytes(folder)):
        raise _disk_full(errno.ENOSPC, folder, decimal(needed_bytes), free)
    return folder


def path_within(folder: Path, *names: str) -> Path:
    """`folder / names[0] / ...`, for writing.

    `folder` is the user's own choice and may be a symbolic link; the folders within it may not:
    in a shared place somebody else may have planted the link, to have files written elsewhere.

    Raises:
        OSError: one of the names is a symbolic link.
    """
    for name in names:
        folder = folder / name
        if folder.is_symlink():
            raise _os_error(
                OSError,
                errno.ELOOP,
                f"{folder} is a symbolic link, which is not followed when writing: remove it or "
                "choose another folder",
            )
    return folder


def folder_within(folder: Path, *names: str) -> Path:
    """Creates the folder `path_within(folder, *names)` and returns it.

    Raises:
        OSError: as `path_within` and `require_writable_folder`.
    """
    return require_writable_folder(path_within(folder, *names))


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def user_cache() -> Path:
    """The user's folder for what can be made again.

    Raises:
        ValueError: the user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cntlora"
    except RuntimeError as error:
        raise ValueError(
            "there is no home folder to keep class images and encoded photos in: name a folder "
            "with --cache"
        ) from error


def _checked_target(path: str | Path) -> Path:
    if not str(path).strip():
        raise ValueError("the file's name is empty: give the file to write")
    given = user_path(path)
    target = Path(os.path.realpath(given.parent)) / given.name
    if target.is_symlink():
        return target  # replaced, wherever it points
    if target.is_dir():
        raise _os_error(
            IsADirectoryError, errno.EISDIR, f"{target} is a folder: give a file name inside it"
        )
    if target.exists() and not target.is_file():
        raise _os_error(OSError, errno.EINVAL, f"{target} is no regular file: choose another name")
    return target


def _temp_pattern(target: Path) -> re.Pattern[str]:
    return re.compile(re.escape(_temp_prefix(target)) + r"[0-9a-f]{8}\.tmp")


def _temp_prefix(target: Path) -> str:
    encoded = os.fsencode(target.name)
    if len(encoded) > _LONGEST_NAME_IN_TEMP:
        return f".{hashlib.sha256(encoded).hexdigest()[:32]}."
    return f".{target.name}."


def _create_temp(target: Path) -> tuple[Path, int | None]:
    """A new empty file beside `target`, and the descriptor that holds its lock (None: no locks)."""
    while True:
        temp = target.with_name(f"{_temp_prefix(target)}{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if fcntl is None:
            os.close(descriptor)
            return temp, None
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink > 0:
            return temp, descriptor
        os.close(descriptor)  # a concurrent writer took it for stale before it was locked


def _remove_stale(target: Path) -> None:
    pattern = _temp_pattern(target)
    for name in os.listdir(target.parent):
        if not pattern.fullmatch(name):
            continue
        temp = target.parent / name
        with suppress(OSError):  # alive, or somebody else's: not ours to remove
            if fcntl is None:
                temp.unlink()
                continue
            descriptor = os.open(temp, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temp.unlink()
            finally:
                os.close(descriptor)


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU, contiguous, no two sharing memory: what safetensors accepts."""
    storable: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if not hasattr(tensor, "untyped_storage"):
            raise TypeError(f"{name!r} must be a torch.Tensor, got {type(tensor).__name__}")
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        storable[name] = tensor
    return storable


def _error_number(error: Exception) -> int | None:
    """The errno of an OSError, or the one that safetensors has put into its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    if type(error).__name__ != "SafetensorError" or not found:
        return None
    number = int(found.group(1))
    if os.name == "nt":
        return errno.ENOSPC if number in _WINDOWS_DISK_FULL else errno.EIO
    return number


def _disk_full(number: int, path: Path, needed: str, free: int) -> OSError:
    return _os_error(
        OSError,
        number,
        f"cannot write {path}: {_FULL_DISK[number]}. Needed: {needed}; free: {decimal(free)}. "
        "What was there before is untouched. Free some space or choose another folder.",
    )


def _folder_error(folder: Path, error: OSError) -> OSError:
    for candidate in (folder, *folder.parents):
        with suppress(OSError):
            if candidate.exists() and not candidate.is_dir():
                return _os_error(
                    NotADirectoryError,
                    errno.ENOTDIR,
                    f"cannot use {folder} as a folder: {candidate} is a file. "
                    "Remove it or choose another folder.",
                )
    reason = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _os_error(
            PermissionError,
            error.errno,
            f"cannot write to the folder {folder}: {reason}. "
            "Change its permissions or choose another folder.",
        )
    if error.errno in _FULL_DISK:
        return _disk_full(error.errno, folder, "room for one more file", 0)
    return _os_error(OSError, error.errno, f"cannot use {folder} as a folder: {reason}")


def _os_error(kind: type[OSError], number: int | None, message: str) -> OSError:
    """An OSError with an errno for programs whose text is the message alone, for people."""
    error = kind(message)
    error.errno = number
    return error


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    with suppress(OSError):  # some file systems refuse; the file itself is safe on the disk
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
