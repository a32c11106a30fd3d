"""Results that are kept as they come, so that an interrupted experiment goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cntlora_core.benchmark.initialization_speed import machine
from cntlora_core.runtime.files import write_json_atomic


class ResultFile:
    """One experiment's results, by key, in one JSON file.

    Args:
        path: The file; read if it is there.
        identity: What results depend on.

    Raises:
        ValueError: if the file holds results of other settings.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        identity = json.loads(json.dumps(dict(identity)))
        self.content: dict[str, Any] = {"settings": identity, "machine": machine(), "cells": {}}
        if path.is_file():
            found = json.loads(path.read_text("utf-8"))
            differing = sorted(
                key
                for key in identity.keys() | found["settings"].keys()
                if identity.get(key) != found["settings"].get(key)
            )
            if differing:
                raise ValueError(
                    f"{path} holds results of other settings ({', '.join(differing)} differ): "
                    "choose another output folder, or delete the file"
                )
            self.content = found

    @property
    def cells(self) -> dict[str, Any]:
        return self.content["cells"]

    def keep(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result under a key; made, timed and written if it is not there yet."""
        if key not in self.cells:
            began = time.perf_counter()
            found = make()
            self.cells[key] = found | {"seconds": round(time.perf_counter() - began, 3)}
            self.write()
        return self.cells[key]

    def write(self, summary: Any = None) -> None:
        if summary is not None:
            self.content["summary"] = summary
        write_json_atomic(self.path, self.content)
