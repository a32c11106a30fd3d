"""What the nodes use of ComfyUI, imported in one place."""

from __future__ import annotations

import comfy.model_management as model_management  # pyright: ignore[reportMissingImports]
import folder_paths  # pyright: ignore[reportMissingImports]
from comfy.utils import ProgressBar  # pyright: ignore[reportMissingImports]
from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]

__all__ = ["ComfyExtension", "ProgressBar", "folder_paths", "io", "model_management"]
