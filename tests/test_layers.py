"""Imports between the package's folders point one way, and no two modules import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cntlora_core"
NAME = PACKAGE.name

# From the ground up: a folder imports from those before it and from itself.
LAYERS = (
    "runtime",
    "config",
    "layers",
    "activations",
    "closed_form",
    "lora_file",
    "initialization",
    "adapter",
    "lava",
    "saving",
    "methods",
    "data",
    "figures",
    "dynamics",
    "mini",
    "diffusion",
    "metrics",
    "tasks",
    "inspection",
    "mini.making",
    "benchmark",
    "commands",
    "cli",
)


def modules() -> dict[str, Path]:
    paths = [p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py")]
    paths.remove(Path("__init__.py"))
    return {".".join(p.with_suffix("").parts).removesuffix(".__init__"): PACKAGE / p for p in paths}


def layer_of(module: str) -> int:
    if module.startswith("mini.making"):
        return LAYERS.index("mini.making")
    return LAYERS.index(module.partition(".")[0])


def imports(module: str, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports anywhere, types and functions included."""
    found = set()
    for node in ast.walk(ast.parse(known[module].read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(NAME):
            base = (node.module or "").removeprefix(NAME).removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in known else base)
    return (found - {module}) & set(known)


KNOWN = modules()


@pytest.mark.parametrize("module", sorted(KNOWN))
def test_a_module_imports_from_its_own_folder_and_those_below(module: str) -> None:
    above = {m for m in imports(module, KNOWN) if layer_of(m) > layer_of(module)}
    assert not above, f"{module} imports from above: {sorted(above)}"


def test_no_modules_import_each_other() -> None:
    graph = {m: imports(m, KNOWN) for m in KNOWN}
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for other in sorted(graph[module]):
            follow(other, (*path, module))
        done.add(module)

    for module in sorted(graph):
        follow(module, ())
