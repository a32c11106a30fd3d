"""Flags from elsewhere: ``--config FILE`` (TOML, or a run's ``run.json``), ``--preset NAME``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cntlora_core.diffusion.presets import preset
from cntlora_core.runtime.reading import read_json_object, reading, require_file, user_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

FLAG, PRESET = "--config", "--preset"
_FLAT = ("subject", "output", "prior", "adapter", "training", "sampling")
"""Sections that only group a file's settings; any other is a part of its flags' names."""

_OF_ONE_CALL = ("resume", "overwrite")
"""What a run's record says of how it was called, and not of what it was."""


def with_config(arguments: Sequence[str]) -> list[str]:
    """Arguments in which ``--config FILE`` and train's ``--preset NAME`` are what they stand for.

    The flags of a preset come first, then those of files, so that a file's win over a preset's, and
    those of the command line over both. A file may name a preset itself.

    Raises:
        ValueError: if a file is no TOML or JSON, or holds what no flag can say; for an unknown
            preset.
        FileNotFoundError: if there is no such file.
    """
    trains = arguments[:1] == ["train"]
    given: dict[str, list[str]] = {FLAG: [], PRESET: []} if trains else {FLAG: []}
    rest = []
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option not in given:
            rest.append(word)
            continue
        name = value if equals else next(words, None)
        if name is None:
            raise ValueError(f"{option} needs a {'file' if option == FLAG else 'name'}")
        given[option].append(name)
    files = [dict(_read(user_path(name))) for name in given[FLAG]]
    named = [file.pop(PRESET[2:]) for file in files if trains and PRESET[2:] in file]
    presets = [preset(name) for name in (*named, *given.get(PRESET, ()))]
    flags = [flag for settings in (*presets, *files) for flag in _flags(settings)]
    names = 2 if rest[:1] in (["task"], ["bench"]) else 1  # these have commands of their own
    return [*rest[:names], *flags, *rest[names:]]


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".json":
        content = read_json_object(path, "a file of settings")
        settings = content.get("settings", content)
        if settings is not content and isinstance(settings, dict):
            settings = {key: value for key, value in settings.items() if key not in _OF_ONE_CALL}
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: its settings are no table of names and values")
        return settings
    require_file(path, "a file of settings")
    with reading(path, "settings in TOML"):
        return tomllib.loads(path.read_text("utf-8"))


def _flags(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Lists before single values: a list takes all words up to the next flag."""
    for key, value in sorted(settings.items(), key=lambda item: not isinstance(item[1], list)):
        name = f"{prefix}{key}".replace("_", "-")
        if name == "cntlora.constraint":
            continue  # the method says it
        if isinstance(value, Mapping):
            yield from _flags(value, prefix if key in _FLAT else f"{name}.")
        elif isinstance(value, list):
            if any(not isinstance(v, (str, int, float)) or str(v).startswith("-") for v in value):
                raise ValueError(f"{key} is {value!r}, which no flag can say")
            if value:
                yield f"--{name}"
                yield from map(str, value)
        elif isinstance(value, bool):
            yield f"--{name}" if value else f"--{prefix}no-{key}".replace("_", "-")
        elif isinstance(value, (str, int, float)):
            yield f"--{name}={value}"
        elif value is not None:
            raise ValueError(f"{key} is {value!r}, which no flag can say")
