"""Links of the README and of the docs lead to files, and to headings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "cntlora_core/mini/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as forges make them."""
    titles = re.findall(r"^#+ +(.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_map_names_every_folder() -> None:
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    named = {name.split("/")[0] for name in re.findall(r"^\| `([a-z_/]+)/` ", text, re.MULTILINE)}
    assert named == {init.parent.name for init in (ROOT / "cntlora_core").glob("*/__init__.py")}
    for module in re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", text):
        assert (ROOT / "cntlora_core" / module).exists() or (ROOT / module).exists(), module
