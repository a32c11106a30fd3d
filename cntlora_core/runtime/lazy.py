"""Public names whose modules are imported when they are asked for: torch takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package.

    Args:
        package: Its ``__name__``.
        modules: By public name, the module that has it, relative to ``cntlora_core``.
    """

    def get(name: str) -> Any:
        if name in modules:
            return getattr(import_module(f"cntlora_core.{modules[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
