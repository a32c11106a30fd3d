"""Which file is meant by a path, and what the record of its run says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cntlora_core.runtime.reading import read_json_object

RUN_RECORD, RUN_STATE = "run.json", "state.safetensors"


def find_lora(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The LoRA, and what the record of its run says."""
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there is no LoRA and no run at {path}: give a .safetensors file, or a folder of "
            "peft's or of a run"
        )
    if not os.path.isdir(path):
        record = _record(path.parent)
        own = record is not None and record["export"]["file"] == path.name
        return path, _run_facts(record) if own and record is not None else None
    if record := _record(path):
        return path / record["export"]["file"], _run_facts(record)
    if (path / RUN_STATE).is_file():
        raise ValueError(
            f"{path} holds a run that is not finished: go on with `cntlora train --resume`"
        )
    files = [file for file in sorted(path.glob("*.safetensors")) if file.name != RUN_STATE]
    if len(files) > 1:
        raise ValueError(f"{path} holds several files: name one of {[f.name for f in files]}")
    is_adapter = files and files[0].name == "adapter_model.safetensors"
    return (files[0], None) if files and not is_adapter else (path, None)


def _record(folder: Path) -> dict[str, Any] | None:
    file = folder / RUN_RECORD
    if not file.is_file():
        return None
    try:
        record = read_json_object(file)
        name = record["export"]["file"]
        if Path(name).name != name:
            return None  # it would lead out of the folder
        _run_facts(record)
        return record
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # another program's


def _run_facts(record: dict[str, Any]) -> dict[str, Any]:
    """What a run's record says; raises KeyError, TypeError and such where it is none."""
    export, seconds = record["export"], record.get("seconds") or {}
    ranks, error = export.get("trained_ranks") or {}, export.get("relative_error")
    return {
        "model": record.get("model", {}).get("source"),
        "prompts": record.get("prompts"),
        "steps": int(export.get("step", len(record.get("history", [])))),
        "seconds": {str(stage): float(value) for stage, value in seconds.items()},
        "trained_ranks": {str(name): int(rank) for name, rank in ranks.items()},
        "relative_error": None if error is None else float(error),
        "notes": record.get("notes", []),
    }
