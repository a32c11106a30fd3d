"""``cntlora pick``: another step's LoRA becomes that of a run."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from cntlora_core.runtime.flags import UserPath
from cntlora_core.runtime.progress import Reporter


@dataclass(frozen=True)
class Pick:
    """Make a snapshot the LoRA of its run; the LoRA that the run had is kept as a snapshot.

    `cntlora inspect` and `--lora` take the run's folder for its LoRA, and so for the one picked.

    Attributes:
        run_folder: The output folder of `cntlora train --save-lora-every N`.
        step: Which of its LoRAs; `cntlora compare` shows them side by side.
    """

    run_folder: tyro.conf.Positional[UserPath]
    step: int

    def after_cancel(self) -> str:
        return "; the run is as it was, or has the LoRA that was picked"

    def run(self, _reporter: Reporter) -> None:
        from cntlora_core.diffusion.snapshots import pick_snapshot

        print(pick_snapshot(self.run_folder, self.step))
