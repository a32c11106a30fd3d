"""What the tests of written files share: the mark of POSIX systems, a folder's names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX semantics")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
