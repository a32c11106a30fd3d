"""From a saved adapter of a rewritten base back to the model that trained it."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from cntlora_core.adapter.inject import AdapterPlan, inject_adapter, match_convolutions
from cntlora_core.adapter.record import InitializationRecord, fingerprints_of, is_marked
from cntlora_core.lava.inject import inject_lava
from cntlora_core.lora_file.reading import PEFT_CONFIG, PEFT_WEIGHTS
from cntlora_core.saving.conversion import read_adapter_config
from cntlora_core.saving.record_reading import load_record


def load_initialized(
    base: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """Load what ``model.save_pretrained`` or a Trainer's checkpoint holds of an adapter.

    Where the initialisation rewrote the base, the stock base is rewritten in the same way before
    the trained weights are loaded; training goes on from there, and
    :func:`cntlora_core.save_converted` makes an adapter for the stock base as before. An adapter
    that fits the stock base is loaded as ``PeftModel.from_pretrained`` does.

    Args:
        base: The stock base model, in the data type that it was initialised in; it is wrapped, and
            its weights are rewritten in place.
        folder: With adapter_config.json.
        adapter_name: What the adapter is called in the model.
        is_trainable: Whether it is to be trained on; give True to resume.

    Raises:
        FileNotFoundError: if a file of the adapter is missing.
        ValueError: if a file is damaged, the base has adapters already, or its weights are not
            those that the initialisation was taken out of. The base is then as it was.
    """
    folder = Path(folder)
    values = read_adapter_config(folder)
    if not is_marked(values):
        model = PeftModel.from_pretrained(
            base, folder, adapter_name=adapter_name, is_trainable=is_trainable
        )
        match_convolutions(model)
        return model
    record = load_record(folder)
    _check_base(base, record, folder)
    for field in ("init_lora_weights", "init_weights"):
        if field in values:
            values[field] = True
    try:
        config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**values))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / PEFT_CONFIG} is damaged: {error}") from error
    config.inference_mode = not is_trainable
    plan = record.plan
    if isinstance(plan, AdapterPlan):
        model = inject_adapter(base, config, plan, adapter_name, record.method)[0]  # pyright: ignore[reportArgumentType]
    else:
        model = inject_lava(base, config, plan, adapter_name, record.method)[0]  # pyright: ignore[reportArgumentType]
    if (folder / PEFT_WEIGHTS).is_file():
        model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
    return model


def _check_base(base: nn.Module, record: InitializationRecord, folder: Path) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError("the base model has adapters already: give the stock model, unwrapped")
    modules = dict(base.named_modules())
    missing = [name for name in record.plan.factors if name not in modules]
    if missing:
        raise ValueError(f"{folder} is an adapter of another model: there is no {missing[0]!r}")
    found = fingerprints_of({name: modules[name] for name in record.fingerprints})
    for name, now in found.items():
        before = record.fingerprints[name]
        if now != before:
            raise ValueError(
                f"the initialisation in {folder} was taken out of other weights than this model's: "
                f"{name!r} was {_in_words(before)} and is {_in_words(now)} now. Load the stock "
                "base model that training began with, in the same data type"
            )


def _in_words(fingerprint: str) -> str:
    kind, shape, digest = fingerprint.split(" ")
    return f"{kind} {shape} with the hash {digest[:8]}"
