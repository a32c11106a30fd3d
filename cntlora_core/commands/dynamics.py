"""``cntlora dynamics``: what gradients, updates and activations did while runs trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from cntlora_core.runtime.flags import UserPath
from cntlora_core.runtime.progress import Reporter


@dataclass(frozen=True)
class Dynamics:
    """Plot the training dynamics of runs over each other: loss, gradients, updates, activations.

    Attributes:
        runs: Output folders of runs that recorded them (`cntlora train --dynamics-every 10`, or
            DynamicsCallback in a Trainer), or their dynamics.jsonl.
        output: The picture, a PNG.
        title: Above it.
    """

    runs: tyro.conf.Positional[tuple[UserPath, ...]]
    output: UserPath = Path("dynamics.png")
    title: str = ""

    def after_cancel(self) -> str:
        return ""

    def run(self, reporter: Reporter) -> None:
        from cntlora_core.dynamics import plot_dynamics, read_dynamics
        from cntlora_core.dynamics.log import FILE_NAME
        from cntlora_core.runtime.file_names import distinct_names

        files = [run / FILE_NAME if run.is_dir() else run for run in self.runs]
        for file in files:
            if not file.is_file():
                raise ValueError(
                    f"there is no {file}: `cntlora train --dynamics-every 10` records dynamics"
                )
        inside = [file.name == FILE_NAME for file in files]
        names = distinct_names(
            [file.resolve().parent.name if i else file.stem for file, i in zip(files, inside)]
        )
        records = dict(zip(names, map(read_dynamics, files), strict=True))
        print(plot_dynamics(records, self.output, self.title))
