"""The ComfyUI entry point, and nothing else.

ComfyUI loads this folder under whatever name it has there. Nothing happens before it calls
``comfy_entrypoint``, so that pytest may collect this file too; the installed package lacks it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """The extension with all nodes; empty, with a line in the log, where something is missing."""
    return import_module(".nodes.entry", __name__).extension(Path(__file__).parent, __name__)
