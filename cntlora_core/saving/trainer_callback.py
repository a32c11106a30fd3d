"""Checkpoints of transformers' Trainer, converted for the stock base as they are written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cntlora_core.adapter.record import RECORD_FILE, InitializationRecord, record_of
from cntlora_core.saving.conversion import convert_adapter
from cntlora_core.saving.record_reading import load_record

TOLERANCE = 1e-3
"""How far two initialisations may be apart, relative to their norm, and count as one."""


class ConvertedCheckpoints(TrainerCallback):
    """Writes each checkpoint of a Trainer a second time, as an adapter for the stock base.

    ``output_dir/converted/checkpoint-N`` stands beside ``output_dir/checkpoint-N``, and is removed
    with it. (Within it, the Trainer would take it for an adapter of its own when it resumes.) A run
    that is resumed on another initialisation than its checkpoint's is refused.

    Args:
        folder: Where they go, in place of ``output_dir/converted``.
        compress: See :func:`cntlora_core.save_converted`.

    Example:
        >>> trainer = Trainer(model=model, args=args, train_dataset=data,
        ...     callbacks=[ConvertedCheckpoints()])
    """

    def __init__(self, folder: str | Path | None = None, *, compress: bool = False) -> None:
        self.folder, self.compress = folder, compress

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_kwargs: Any,
    ) -> None:
        """Refuse to go on from a checkpoint of another initialisation.

        Raises:
            ValueError: naming the checkpoint.
        """
        checkpoint = _checkpoint(args, state)
        for folder in _initialised(checkpoint) if state.global_step else ():
            name = "default" if folder == checkpoint else folder.name
            if not _has_initialisation(model, name, load_record(folder)):
                raise ValueError(
                    f"{checkpoint} was trained on another initialisation than this model's, whose "
                    "weights it does not fit: make the model by "
                    f"cntlora_core.load_initialized(base, {str(folder)!r}, is_trainable=True)"
                )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Convert the checkpoint that has just been written."""
        if not state.is_world_process_zero:
            return
        checkpoint = _checkpoint(args, state)
        target = Path(self.folder or checkpoint.parent / "converted")
        for folder in _initialised(checkpoint):
            below = folder.relative_to(checkpoint)
            convert_adapter(folder, target / checkpoint.name / below, compress=self.compress)
        for old in target.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if not (checkpoint.parent / old.name).exists():
                shutil.rmtree(old, ignore_errors=True)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _initialised(checkpoint: Path) -> list[Path]:
    """The folders of a checkpoint that hold an adapter of a rewritten base."""
    return sorted(path.parent for path in checkpoint.rglob(RECORD_FILE))


def _has_initialisation(model: Any, adapter_name: str, wanted: InitializationRecord) -> bool:
    while not isinstance(model, PeftModel):
        if not isinstance(getattr(model, "module", None), nn.Module):
            return False
        model = model.module  # within DistributedDataParallel
    if adapter_name not in model.peft_config:
        return False
    found = record_of(model, adapter_name)
    if found is None or found.fingerprints.keys() != wanted.fingerprints.keys():
        return False
    lost = size = 0.0
    for name, factors in wanted.plan.factors.items():
        delta = factors.delta()
        lost += float((found.plan.factors[name].delta() - delta).norm() ** 2)
        size += float(delta.norm() ** 2)
    return lost <= TOLERANCE**2 * size
