"""What the nodes use of ComfyUI apart from its node classes, imported in one place."""

from __future__ import annotations

from typing import Any

import comfy.cli_args  # pyright: ignore[reportMissingImports]
import comfy.model_management  # pyright: ignore[reportMissingImports]
import comfy.utils  # pyright: ignore[reportMissingImports]
import folder_paths as comfy_folders  # pyright: ignore[reportMissingImports]

# As values, since type checkers do not have ComfyUI at hand.
ProgressBar: Any = comfy.utils.ProgressBar
model_management: Any = comfy.model_management
folder_paths: Any = comfy_folders
command_line: Any = comfy.cli_args.args
