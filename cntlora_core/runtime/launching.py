"""What the processes of a launcher know of each other before torch is imported."""

from __future__ import annotations

import os


class OtherProcessError(RuntimeError):
    """Another process failed; the message says which, and with what."""


def launched() -> bool:
    """Whether a launcher (accelerate launch, torchrun) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
