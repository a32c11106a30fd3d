"""From a trained model to a LoRA file that is right on the stock checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cntlora_core.adapter.inject import AdapterPlan
from cntlora_core.diffusion.family import Networks
from cntlora_core.diffusion.settings import OutputSettings, torch_dtype
from cntlora_core.lora_file.algebra import (
    alpha_for,
    balance,
    total_relative_error,
    truncate,
    without_mid,
)
from cntlora_core.lora_file.families import SD15_FILES, FileFamily
from cntlora_core.lora_file.names import TEXT_MODEL
from cntlora_core.lora_file.writing import (
    LoRALayer,
    LoRALayers,
    collect_adapter,
    subtract_initial_layers,
    write_lora_file,
)
from cntlora_core.runtime.thread_pool import map_in_threads

if TYPE_CHECKING:
    from cntlora_core.diffusion.adapters import Plan
    from cntlora_core.lava.factors import LavaFactors, LavaPlan

Value = TypeVar("Value")

TRUNCATION_BOUND = 0.01
"""A file is truncated to the trained ranks where that loses at most this much of the adapter's
whole change of weight."""


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: The file (a folder in peft's layout).
        ranks: Rank of each layer in the file, by canonical name.
        trained_ranks: Rank of each layer while it was trained.
        relative_error: Frobenius error of the whole adapter, from truncation and from rounding to
            the precision of the file.
        truncation_error: What truncating to the trained ranks loses of it, done or not; 0 where
            the file's ranks are the trained ones anyway, None where it was not asked for.
    """

    path: Path
    ranks: dict[str, int]
    trained_ranks: dict[str, int]
    relative_error: float
    truncation_error: float | None = None

    @property
    def truncated(self) -> bool:
        return bool(self.truncation_error) and self.truncation_error <= TRUNCATION_BOUND

    def summary(self) -> str:
        """A sentence on ranks and errors, for the command's output and the file's metadata."""
        if self.truncated:
            ranks = f"truncated to the trained ranks, which loses {self.truncation_error:.2%}"
        elif self.truncation_error:
            ranks = (
                f"exact at up to twice the trained ranks: truncation would lose "
                f"{self.truncation_error:.2%}, over the bound of {TRUNCATION_BOUND:.0%}"
            )
        else:
            ranks = "exact in its ranks"
        return f"the LoRA file is {ranks}; relative error with rounding {self.relative_error:.2e}"


def trained_layers(networks: Networks, plan: Plan) -> tuple[LoRALayers, dict[str, int]]:
    """What the adapters add to the stock checkpoint, exactly, and the ranks that were trained.

    Where the frozen weight became ``W - s B0 A0`` the initialisation is subtracted, which doubles
    ranks.
    """
    if not isinstance(plan, AdapterPlan):
        from cntlora_core.lava.image_file import lora_layers

        return lora_layers(_lava_factors(networks, plan)), _canonical(plan.ranks)
    layers: LoRALayers = {}
    for component, network in networks.items():
        if plan.for_prefix(f"{component}.").factors:
            layers |= collect_adapter(network, prefix=component)
    ranks = {name: layer.rank for name, layer in layers.items()}
    if plan.rewrites_base:
        layers = subtract_initial_layers(layers, _initial_layers(plan))
    return layers, ranks


def export_lora(
    networks: Networks,
    plan: Plan,
    path: Path,
    settings: OutputSettings,
    metadata: Mapping[str, str],
    files: FileFamily = SD15_FILES,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write the trained adapter in the layout and precision that were asked for.

    What is left of a subtracted initialisation is factored anew, whatever the precision: its
    factors are large and nearly cancel, and tools cast them to half precision. With ``compress`` it
    is then truncated to the trained ranks, where this loses less than `TRUNCATION_BOUND` of the
    file.

    LAVA's convolutions go into a kohya file as ``lora_down``, ``lora_mid`` and ``lora_up``; in the
    other layouts, which know no mid, it is contracted into the down kernel, at the same rank and
    exactly. So it is where an initialisation was subtracted, if the file is not truncated.
    """
    exact, trained_ranks = trained_layers(networks, plan)
    doubled = [name for name, layer in exact.items() if layer.rank > trained_ranks[name]]
    balanced = map_in_threads(lambda name: balance(exact[name]), doubled, progress)
    layers = exact | dict(zip(doubled, balanced, strict=True))
    lost = 0.0 if settings.compress else None
    if settings.compress and doubled:
        if isinstance(plan, AdapterPlan):
            small = {name: truncate(layer, trained_ranks[name]) for name, layer in layers.items()}
        else:
            small = _lava_compressed(networks, plan, trained_ranks, progress)
        lost = total_relative_error(small, exact)
        if lost <= TRUNCATION_BOUND:
            layers = small
    dtype = torch_dtype(settings.file_precision)
    stored = {
        name: dataclasses.replace(
            layer,
            down=layer.down.to(dtype).float(),
            up=layer.up.to(dtype).float(),
            mid=None if layer.mid is None else layer.mid.to(dtype).float(),
        )
        for name, layer in (
            layers.items()
            if settings.layout == "kohya"
            else ((name, without_mid(layer)) for name, layer in layers.items())
        )
    }
    report = ExportReport(
        path,
        {name: layer.rank for name, layer in layers.items()},
        trained_ranks,
        total_relative_error(stored, exact),
        lost,
    )
    metadata = {**metadata, "cntlora.export": report.summary()}
    write_lora_file(
        path, layers, layout=settings.layout, metadata=metadata, dtype=dtype, family=files
    )
    return report


def _lava_factors(networks: Networks, plan: LavaPlan) -> dict[str, LavaFactors]:
    from cntlora_core.lava.image_file import collect_lava

    found = {}
    for component, network in networks.items():
        found |= collect_lava(network, plan.for_prefix(f"{component}."), component)
    return found


def _lava_compressed(
    networks: Networks,
    plan: LavaPlan,
    ranks: Mapping[str, int],
    progress: Callable[[int, int], None] | None,
) -> LoRALayers:
    from cntlora_core.lava.image_file import lora_layers, with_trained_rank

    found = _lava_factors(networks, plan)
    names = list(found)
    smaller = map_in_threads(lambda n: with_trained_rank(found[n], ranks[n]), names, progress)
    return lora_layers(dict(zip(names, smaller, strict=True)))


def _initial_layers(plan: AdapterPlan) -> LoRALayers:
    return _canonical(
        {
            name: LoRALayer(down=f.down, up=f.up, alpha=alpha_for(f.scaling, f.rank))
            for name, f in plan.factors.items()
        }
    )


def _canonical(by_name: Mapping[str, Value]) -> dict[str, Value]:
    return {name.replace(f".{TEXT_MODEL}", "."): value for name, value in by_name.items()}
