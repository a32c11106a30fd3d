"""What ComfyUI is handed: all nodes, or none and one line in the log that says why."""

from __future__ import annotations

import importlib.util
import logging
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from comfy_api.latest import ComfyExtension  # pyright: ignore[reportMissingImports]

CORE = "cntlora_core"
MODULES = (
    "load", "subject", "class_images", "initialization_options", "initialize", "train", "lora",
    "sample", "compare_steps", "evaluate", "inspect",
)  # fmt: skip

logger = logging.getLogger(__name__)


class CNTLoRAExtension(ComfyExtension):
    """The nodes, as ComfyUI asks for them."""

    def __init__(self, nodes: list[type]) -> None:
        self._nodes = nodes

    async def get_node_list(self) -> list[type]:
        return self._nodes


def extension(root: Path, package: str) -> CNTLoRAExtension:
    """All nodes; none where a Python package or this pack's own core cannot be had.

    Args:
        root: This pack's folder.
        package: The name that ComfyUI has given it as a module.
    """
    problem = missing_packages(root / "requirements.txt") or load_core(root, package)
    if problem:
        logger.error("CNTLoRA is not loaded: %s", problem)
        return CNTLoRAExtension([])
    nodes = [
        node for module in MODULES for node in import_module(f".{module}", f"{package}.nodes").NODES
    ]
    return CNTLoRAExtension(nodes)


def missing_packages(requirements: Path) -> str | None:
    """In words what is not installed, or too old, of the lines of a requirements file."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return _mend("the Python package packaging is not installed", requirements)
    wanting = []
    for line in requirements.read_text("utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line)
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wanting.append(f"{requirement} (not installed)")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wanting.append(f"{requirement} (installed: {found})")
    if not wanting:
        return None
    return _mend(f"it needs the Python packages {', '.join(wanting)}", requirements)


def _mend(problem: str, requirements: Path) -> str:
    command = f'"{sys.executable}" -m pip install -r "{requirements}"'
    return f"{problem}. Run {command} and start ComfyUI again."


def load_core(root: Path, package: str) -> str | None:
    """Make the core that lies beside the nodes importable, under its one name.

    Returns:
        What is wrong, in words, or None.
    """
    folder = root / CORE
    # A second name would be a second copy, with types and registrations of its own.
    sys.modules[f"{package}.{CORE}"] = None  # pyright: ignore[reportArgumentType]
    loaded = sys.modules.get(CORE)
    if loaded is not None:
        here = Path(str(loaded.__file__)).parent
        if here.resolve() == folder.resolve():
            return None
        return f"another copy of it is in use already, {here}; remove that one or {folder}"
    spec = importlib.util.spec_from_file_location(CORE, folder / "__init__.py")
    if spec is None or spec.loader is None:
        return f"{folder} is missing; clone or download the pack again"
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[CORE] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[CORE]
        return f"{folder} cannot be imported ({error}); clone or download the pack again"
    return None
