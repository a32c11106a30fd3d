"""``cntlora methods``: the registry for people and for programs, a table and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from cntlora_core.methods.base import Method
from cntlora_core.methods.registry import METHODS
from cntlora_core.runtime.progress import Reporter


@dataclass(frozen=True)
class Methods:
    """The methods of initialisation: what each reads and changes, what a file can hold of it.

    Attributes:
        json: Print the whole records, as JSON.
    """

    json: bool = False

    def after_cancel(self) -> str:
        return ""

    def run(self, _reporter: Reporter) -> None:
        if self.json:
            print(methods_json())
            return
        Console(emoji=False).print(methods_table())


def methods_table() -> Table:
    """One row a method."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption="file: the rank of a LoRA file for image tools, against the rank r that was "
        "trained. Methods without one are runs to compare with, for other models than Stable "
        "Diffusion. pissa_niter_N takes 1 to 999; `cntlora train --from-lora FILE` "
        "initialises from a LoRA file instead. --json gives papers and reasons.",
        caption_justify="left",
    )
    for title in ("method", "what it does", "reads", "base", "file"):
        table.add_column(title, no_wrap=title != "what it does", overflow="fold")
    for method in METHODS.values():
        table.add_row(
            method.name,
            method.description,
            method.needs,
            base_in_words(method),
            file_in_words(method),
        )
    return table


def base_in_words(method: Method) -> str:
    if method.peft_type is None:
        return "all train"
    return "rewritten" if method.rewrites_base else "stay"


def file_in_words(method: Method) -> str:
    ranks = {None: "none", "as trained": "r", "trained minus initial": "2r"}
    return ranks[method.image_file]


def methods_json() -> str:
    """A list of records, in the registry's order."""
    return json.dumps([method.to_dict() for method in METHODS.values()], indent=2)
