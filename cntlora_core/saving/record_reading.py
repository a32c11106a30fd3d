"""Reading the record of an initialisation that lies beside an adapter, LoRA's or LAVA's."""

from __future__ import annotations

from pathlib import Path

from cntlora_core.adapter.record import FORMAT, RECORD_FILE, InitializationRecord
from cntlora_core.initialization.plan import AdapterPlan
from cntlora_core.lava.factors import LavaPlan
from cntlora_core.runtime.reading import reading
from cntlora_core.runtime.tensor_file import read_tensors


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
    with reading(path, "a record of an initialisation"):
        header, tensors = read_tensors(path, FORMAT)
        kind = AdapterPlan if header["adapter"] == "lora" else LavaPlan
        plan = kind.of(header["layers"], tensors, rewrites_base=True)
        return InitializationRecord(plan, header["method"], dict(header["fingerprints"]))
