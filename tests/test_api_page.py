"""docs/api.md is what its script makes of today's docstrings."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "docs/make_api.py"


def test_the_api_page_is_up_to_date() -> None:
    made = runpy.run_path(str(SCRIPT))
    assert made["page"]() == made["PAGE"].read_text("utf-8"), "run: python docs/make_api.py"
