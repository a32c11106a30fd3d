"""Writes docs/api.md from the docstrings of all public names.

python docs/make_api.py
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
PACKAGES = (
    "cntlora_core",
    "cntlora_core.diffusion",
    "cntlora_core.dynamics",
    "cntlora_core.lava",
    "cntlora_core.lora_file",
    "cntlora_core.methods",
    "cntlora_core.metrics",
    "cntlora_core.mini",
    "cntlora_core.tasks",
)
HEAD = """# API

All public names, from their docstrings. `python docs/make_api.py` writes this page.
"""


def page() -> str:
    """The whole page, as Markdown."""
    parts = [HEAD]
    for package in PACKAGES:
        module = import_module(package)
        parts.append(f"\n## {package}\n\n{_first_paragraph(module)}\n")
        parts += [_entry(name, getattr(module, name)) for name in sorted(module.__all__)]
    return "".join(parts)


def _first_paragraph(module: Any) -> str:
    return " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())


def _entry(name: str, value: Any) -> str:
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return f"\n### {name}\n\nA constant of type `{type(value).__name__}`.\n"
    text = inspect.cleandoc(value.__doc__ or "")  # its own: a parent's is another library's
    signature = "" if inspect.isclass(value) else _signature(value)
    return f"\n### {name}\n\n```\n{name}{signature}\n\n{text}\n```\n"


def _signature(function: Any) -> str:
    """One argument a line where the whole is long; addresses of defaults left out."""
    text = re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(function)))
    if len(text) < 90:
        return text
    signature = inspect.signature(function)
    lines = [f"    {line}," for line in _arguments(signature)]
    arrow = text.rpartition(" -> ")[2] if " -> " in text else ""
    return "(\n" + "\n".join(lines) + "\n)" + (f" -> {arrow}" if arrow else "")


def _arguments(signature: inspect.Signature) -> list[str]:
    found, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            found.append("*")
            starred = True
        found.append(re.sub(r" at 0x[0-9a-f]+", "", str(parameter)))
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
