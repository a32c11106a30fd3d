"""The graph that a LoRA was trained with, for the header of its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .host import command_line

PROMPT = "prompt"
WORKFLOW_KEYS = (PROMPT, "workflow")


def workflow_header(hidden: Any) -> dict[str, str]:
    """The prompt and the workflow as ComfyUI's own savers write them; dropped on the canvas, a
    safetensors file opens as the workflow in it.

    Args:
        hidden: The node's hidden inputs; None where no prompt runs it.

    Returns:
        Nothing where ComfyUI was started with --disable-metadata.
    """
    if hidden is None or command_line.disable_metadata:
        return {}
    found = {} if hidden.prompt is None else {PROMPT: json.dumps(hidden.prompt)}
    return found | {name: json.dumps(value) for name, value in (hidden.extra_pnginfo or {}).items()}


def shareable_header(header: Mapping[str, str]) -> dict[str, str]:
    """A LoRA's header for a further file: without the workflow under --disable-metadata."""
    left_out = WORKFLOW_KEYS if command_line.disable_metadata else ()
    return {name: text for name, text in header.items() if name not in left_out}
