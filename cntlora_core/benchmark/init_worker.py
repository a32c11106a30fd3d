"""Measure one initialisation on one case, in a process of its own.

    python -m cntlora_core.benchmark.init_worker TASK.json RESULT.json

``RESULT.json`` is rewritten as the work goes on, so that whoever ends this process knows how far it
came. Bare forward passes over the same batches are timed in the same process, before and after.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from json import loads
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import nn
from torch.nn import Linear

from cntlora_core.benchmark.init_cases import INIT_CASES, InitCase, batches_of, build_case
from cntlora_core.benchmark.init_settings import CaseName
from cntlora_core.benchmark.peak import peak_bytes, reset_peak
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.layers.attachment import find_attachment_points
from cntlora_core.methods.peft_model import collect_moments, get_cntlora_model
from cntlora_core.runtime.files import write_json_atomic

SECONDS_BETWEEN_REPORTS = 2.0


@dataclass(frozen=True)
class InitTask:
    """One measurement.

    Attributes:
        case: The model and its data.
        method: The initialisation: "cntlora", "cntlora-fixed" (one rank for all), "eva", "corda",
            or a name of the registry of methods.
        quick: Tiny sizes.
        model: A checkpoint; None for random weights.
        threads: Of torch; None for its own choice.
        seed: Of random weights and data.
    """

    case: CaseName
    method: str
    quick: bool = False
    model: str | None = None
    threads: int | None = None
    seed: int = 0


class Forwards:
    """``forward_fn(model, batch)`` that counts, and tells of it now and then."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.count = 0
        self._tell, self._told = tell, 0.0

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> None:
        model(**batch)
        self.count += 1
        if time.monotonic() - self._told > SECONDS_BETWEEN_REPORTS:
            self._told = time.monotonic()
            self._tell(self.count)


def _cntlora(
    model: nn.Module, case: InitCase, quick: bool, batches: list, forward: Forwards
) -> PeftModel:
    config = case.lora_config(quick)
    return get_cntlora_model(model, config, CNTLoRAConfig(), batches, forward_fn=forward)


def _cntlora_fixed(
    model: nn.Module, case: InitCase, quick: bool, batches: list, forward: Forwards
) -> PeftModel:
    """One rank for all, as CorDA has it: no directions beyond it to share out."""
    config, settings = case.lora_config(quick), CNTLoRAConfig(rank_budget="fixed")
    return get_cntlora_model(model, config, settings, batches, forward_fn=forward)


def _eva(
    model: nn.Module, case: InitCase, quick: bool, batches: list, forward: Forwards
) -> PeftModel:
    """rho 2, as ours; padding left out by peft's own functions where there is a mask."""
    config = case.lora_config(quick, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    plain: dict[str, Any] = (
        {} if case.masked else {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    )
    initialize_lora_eva_weights(
        peft_model, batches, forward_fn=forward, show_progress_bar=False, **plain
    )
    return peft_model


def _corda(
    model: nn.Module, case: InitCase, quick: bool, batches: list, forward: Forwards
) -> PeftModel:
    corda = CordaConfig(corda_method="ipm")
    config = case.lora_config(quick, init_lora_weights="corda", corda_config=corda)

    def run_model() -> None:
        for batch in batches:
            forward(model, batch)

    preprocess_corda(model, config, run_model=run_model)
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    return peft_model


def _of_registry(
    name: str, model: nn.Module, case: InitCase, quick: bool, batches: list, forward: Forwards
) -> PeftModel:
    from cntlora_core.methods import initialize_adapter

    initialized = initialize_adapter(
        model, case.lora_config(quick), name, batches, forward_fn=forward
    )
    assert isinstance(initialized.model, PeftModel)
    return initialized.model


def check_method(name: str) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: saying what can.
    """
    from cntlora_core.methods import get_method

    if name in _INITIALIZATIONS:
        return
    method = get_method(name)
    if method.needs == "gradients" or name == "full":
        raise ValueError(
            f"method {name!r} {'needs a loss' if name != 'full' else 'initialises nothing'}, which "
            "these cases do not have: choose cntlora, eva, corda, or another of `cntlora methods`"
        )


_INITIALIZATIONS = {
    "cntlora": _cntlora,
    "cntlora-fixed": _cntlora_fixed,
    "eva": _eva,
    "corda": _corda,
}


def _batch_size(task: InitTask, case: InitCase, samples: int) -> int:
    """EVA skips batches with fewer rows than twice the rank; CorDA takes one sample at a time."""
    if task.method == "corda":
        return 1
    return samples if task.method == "eva" and not case.masked else case.batch


@torch.no_grad()
def measure(task: InitTask, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Time and memory of an initialisation.

    Args:
        task: What is measured.
        report: Called with what is known so far; ``started`` is there once the initialisation runs.

    Returns:
        ``forward_seconds`` of the bare passes over all batches, the mean of those before the
        initialisation and those after it, ``total_seconds`` of the initialisation,
        ``forwards_run`` by it, ``batches`` in the data, and in bytes the peak of resident memory
        in the bare passes (``forward_peak``) and in the initialisation (``method_peak``), and of
        the adapter's weights (``adapter_bytes``). For ours also its own ``capture_seconds`` and
        ``solve_seconds`` (the rest is peft's wrapping), ``distinct_inputs``, ``points``, and
        ``moment_bytes`` of the distinct second moments.
    """
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    case = INIT_CASES[task.case]
    checkpoint = None if task.model is None else Path(task.model)
    model, samples = build_case(case, checkpoint, task.quick, task.seed)
    batches = batches_of(samples, _batch_size(task, case, len(samples)))
    model(**batches[0])
    get_peft_model(nn.Sequential(Linear(1, 1)), LoraConfig(target_modules=["0"]))  # its imports
    gc.collect()
    reset_peak()
    before = _bare_seconds(model, batches)
    result: dict[str, Any] = {
        "forward_seconds": before,
        "forward_peak": peak_bytes(),
        "batches": len(batches),
        "threads": torch.get_num_threads(),
    }
    gc.collect()
    reset_peak()
    report(result | {"started": True, "forwards_run": 0})
    forward = Forwards(lambda count: report(result | {"started": True, "forwards_run": count}))
    start = time.perf_counter()
    direct = _INITIALIZATIONS.get(task.method)
    method = direct if direct is not None else partial(_of_registry, task.method)
    peft_model = method(model, case, task.quick, batches, forward)
    result["total_seconds"] = time.perf_counter() - start
    result["method_peak"] = peak_bytes()
    result["forwards_run"] = forward.count
    result["adapter_bytes"] = sum(
        p.numel() * p.element_size() for n, p in peft_model.named_parameters() if "lora_" in n
    )
    base = peft_model.unload()
    assert isinstance(base, nn.Module)
    # A machine's speed drifts: bare passes before and after bracket those of the initialisation.
    result["forward_seconds"] = (before + _bare_seconds(base, batches)) / 2
    if task.method.startswith("cntlora"):
        result |= _own_facts(peft_model, base, case, task.quick, batches)
    return result


def _bare_seconds(model: nn.Module, batches: list[Any]) -> float:
    start = time.perf_counter()
    for batch in batches:
        model(**batch)
    return time.perf_counter() - start


def _own_facts(
    peft_model: PeftModel, base: nn.Module, case: InitCase, quick: bool, batches: list[Any]
) -> dict[str, Any]:
    found: Any = peft_model.cntlora_report
    points = find_attachment_points(base, case.lora_config(quick))
    moments = collect_moments(base, points, batches[:1]).moments
    return {
        "capture_seconds": found.pass_seconds,
        "solve_seconds": found.solve_seconds,
        "points": found.points,
        "distinct_inputs": len(moments),
        "moment_bytes": sum(m.matrix.numel() * m.matrix.element_size() for m in moments),
    }


def task_to_json(task: InitTask) -> dict[str, Any]:
    """The task as JSON values, for another process."""
    return asdict(task)


def main() -> None:
    task_file, result_file = sys.argv[1:]
    task = InitTask(**loads(Path(task_file).read_text("utf-8")))

    def report(found: dict[str, Any]) -> None:
        write_json_atomic(result_file, found)

    report(measure(task, report))


if __name__ == "__main__":
    main()
