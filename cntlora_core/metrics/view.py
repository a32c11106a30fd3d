"""Fidelity for people: a table, a text, and a sheet of the pictures with their scores.

Scores are shown times 100, as papers print them.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from rich.table import Table

from cntlora_core.figures.sheets import comparison_sheet
from cntlora_core.metrics.fidelity import NAMES, Fidelity

ALL_PICTURES = "pictures without prompts"
SHOWN_PER_PROMPT = 4
SHOWN_WITHOUT_PROMPT = 8


def fidelity_table(
    results: Sequence[Fidelity], balances: Sequence[float | None] | None = None
) -> Table:
    """One row for each set of pictures; ``balances`` is a last column, see `metrics.steps`."""
    table = Table(title="Fidelity, times 100")
    table.add_column("pictures of", overflow="fold")
    for heading in (*NAMES.values(), "pictures"):
        table.add_column(heading, justify="right")
    if balances is not None:
        table.add_column("balance", justify="right")
    for i, result in enumerate(results):
        more = () if balances is None else (_percent(balances[i]),)
        table.add_row(result.label, *_numbers(result), str(result.pictures), *more)
    return table


def prompt_table(result: Fidelity) -> Table:
    """One row for each prompt."""
    table = Table(title=f"{result.label}, by prompt")
    table.add_column("prompt", overflow="fold")
    for heading in (*NAMES.values(), "pictures"):
        table.add_column(heading, justify="right")
    for row in result.by_prompt:
        numbers = (_percent(row.dino), _percent(row.clip_i), _percent(row.clip_t))
        table.add_row(row.prompt, *numbers, str(row.pictures))
    return table


def fidelity_text(result: Fidelity) -> str:
    """One line: "DINO 64.6, CLIP-I 80.1, CLIP-T 27.4"."""
    known = zip(NAMES.values(), _numbers(result), strict=True)
    return ", ".join(f"{name} {number}" for name, number in known if number != "-")


def fidelity_report(results: Sequence[Fidelity]) -> str:
    """A few lines of text: each set of pictures, and below it its prompts."""
    found = []
    for result in results:
        found.append(f"{result.label} ({result.pictures}): {fidelity_text(result)}")
        found += [
            f"  {row.prompt}: "
            + ", ".join(f"{name} {_percent(getattr(row, key))}" for key, name in NAMES.items())
            for row in result.by_prompt
        ]
        found += result.notes
    return "\n".join(found)


def fidelity_sheet(
    photos: Sequence[Image.Image],
    results: Sequence[Fidelity],
    pictures: Sequence[tuple[Sequence[Image.Image], Sequence[str] | None]],
    *,
    side: int = 96,
) -> Image.Image:
    """The real pictures above; below, a row for each prompt and a column for each set.

    Args:
        photos: Of the subject.
        results: A heading for each column: its label and its scores.
        pictures: The pictures of each column, with their prompts.
        side: Side of a picture in pixels.
    """
    columns = [f"{result.label}: {fidelity_text(result)}" for result in results]
    return pictures_sheet(photos, columns, pictures, side=side)


def pictures_sheet(
    photos: Sequence[Image.Image],
    columns: Sequence[str],
    pictures: Sequence[tuple[Sequence[Image.Image], Sequence[str] | None]],
    *,
    side: int = 96,
) -> Image.Image:
    """As :func:`fidelity_sheet`, under any headings: one for each set of pictures."""
    cells: dict[str, list[list[Image.Image]]] = {}
    for column, (images, prompts) in enumerate(pictures):
        for image, prompt in zip(images, prompts or [ALL_PICTURES] * len(images), strict=True):
            row = cells.setdefault(prompt, [[] for _ in pictures])
            most = SHOWN_PER_PROMPT if prompts else SHOWN_WITHOUT_PROMPT
            if len(row[column]) < most:
                row[column].append(image)
    return comparison_sheet(photos, list(cells.items()), columns, side=side)


def _numbers(result: Fidelity) -> tuple[str, str, str]:
    return _percent(result.dino), _percent(result.clip_i), _percent(result.clip_t)


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}"
