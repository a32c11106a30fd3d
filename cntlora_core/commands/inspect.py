"""``cntlora inspect``: what a LoRA file holds."""

from __future__ import annotations

import json
from dataclasses import dataclass

import tyro

from cntlora_core.runtime.flags import UserPath
from cntlora_core.runtime.progress import Reporter, stage_progress


@dataclass(frozen=True)
class Inspect:
    """What a LoRA is: base model, method, ranks, norms and spectra of any LoRA file.

    Attributes:
        file: A LoRA of kohya's, diffusers' or peft's make, a folder that peft saved, or the output
            folder of `cntlora train`.
        model: The base model (a .safetensors file, or a folder of diffusers or transformers), for
            norms relative to the frozen weights.
        output: Folder for the pictures; default: beside the file.
        json: Print JSON instead of tables.
        pictures: Draw the rank allocation and the spectra.
    """

    file: tyro.conf.Positional[UserPath]
    model: UserPath | None = None
    output: UserPath | None = None
    json: bool = False
    pictures: bool = True

    def after_cancel(self) -> str:
        return ""

    def run(self, reporter: Reporter) -> None:
        from cntlora_core.inspection.inspect import inspect_lora
        from cntlora_core.inspection.view import draw_pictures, show

        inspection = inspect_lora(
            self.file, model=self.model, progress=stage_progress(reporter, "measuring layers")
        )
        if not self.json:
            show(inspection)
        pictures = draw_pictures(inspection, self.output) if self.pictures else []
        if self.json:
            found = inspection.to_dict() | {"pictures": [str(path) for path in pictures]}
            print(json.dumps(found, indent=2, allow_nan=False))
        else:
            for path in pictures:
                print(path)
