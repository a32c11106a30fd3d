"""A report as a list of blocks, written as Markdown with pictures and as one HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cntlora_core.runtime.files import atomic_write

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .25em .7em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
figcaption { color: #555; }
div { overflow-x: auto; }
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2

    def markdown(self) -> str:
        return f"{'#' * self.level} {self.text}"

    def html(self, _folder: Path) -> str:
        return f"<h{self.level}>{html.escape(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Paragraph:
    text: str

    def markdown(self) -> str:
        return self.text

    def html(self, _folder: Path) -> str:
        return f"<p>{html.escape(self.text)}</p>"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is a label."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [self.header, rule, *self.rows]
        return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in row)} |" for row in lines)

    def html(self, _folder: Path) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "\n".join(row(cells, "td") for cells in self.rows)
        return f"<div><table>\n{row(self.header, 'th')}\n{body}\n</table></div>"


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG file in the report's folder."""

    name: str
    caption: str

    def markdown(self) -> str:
        return f"![{self.caption}]({self.name})\n\n*{self.caption}*"

    def html(self, folder: Path) -> str:
        kind = "jpeg" if self.name.endswith(".jpg") else "png"
        data = base64.b64encode((folder / self.name).read_bytes()).decode()
        caption = html.escape(self.caption)
        return (
            f'<figure><img alt="{caption}" src="data:image/{kind};base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


Block = Heading | Paragraph | Table | Picture


def write_document(folder: Path, name: str, title: str, blocks: Sequence[Block]) -> list[Path]:
    """Write ``<name>.md`` and ``<name>.html``; the page holds its pictures and needs no network."""
    blocks = [Heading(title, 1), *blocks]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(block.html(folder) for block in blocks)
        + "\n</body></html>\n"
    )
    texts = {
        f"{name}.md": "\n\n".join(block.markdown() for block in blocks) + "\n",
        f"{name}.html": page,
    }
    for file, text in texts.items():
        with atomic_write(folder / file) as temporary:
            temporary.write_text(text, "utf-8")
    return [folder / file for file in texts]
