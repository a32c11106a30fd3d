"""Reading the record of an initialisation that lies beside an adapter, LoRA's or LAVA's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cntlora_core.adapter.record import FORMAT, RECORD_FILE, InitializationRecord
from cntlora_core.closed_form.factorization import Factors
from cntlora_core.initialization.plan import AdapterPlan
from cntlora_core.lava.factors import LavaFactors, LavaPlan


def load_record(folder: str | Path) -> InitializationRecord:
    """Read the record that lies in a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged, or of another format.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: it holds the initialisation that was taken out of the base "
            "model, without which the adapter beside it fits no model. It is saved along with "
            "the adapter: copy it from there"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            header = json.loads(metadata["header"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        plan = _plan_of(header, tensors)
        return InitializationRecord(plan, header["method"], dict(header["fingerprints"]))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of an initialisation: {error}") from error


def _plan_of(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterPlan | LavaPlan:
    layers = header["layers"]
    if header["adapter"] == "lora":
        return AdapterPlan(
            {n: Factors(tensors[f"{n}.down"], tensors[f"{n}.up"], **v) for n, v in layers.items()},
            rewrites_base=True,
        )
    factors = {}
    for name, numbers in layers.items():
        spatial = [tensors[key] for k in "YX" if (key := f"{name}.{k}") in tensors]
        u, v = tensors[f"{name}.U"], tensors[f"{name}.V"]
        factors[name] = LavaFactors(u, v, tuple(spatial), **numbers)
    return LavaPlan(factors, rewrites_base=True)
