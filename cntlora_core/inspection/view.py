"""What `inspection` found, for people: tables for a terminal, and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cntlora_core.figures.plots import plot_ranks, plot_spectra
from cntlora_core.inspection.inspect import LayerInspection, LoRAInspection, PartInspection
from cntlora_core.lora_file.families import TEXT_ENCODER, UNET
from cntlora_core.runtime.console import result_console
from cntlora_core.runtime.files import require_writable_folder
from cntlora_core.runtime.reading import printable

_NUMBERS = ("rank", "alpha", "norm", "rel. norm", "stable rank", "E 1/4", "E 1/2", "largest S")


def show(inspection: LoRAInspection, console: Console | None = None) -> None:
    """Print everything: facts, notes, one line for each attachment point, sums by part."""
    (console or result_console()).print(tables(inspection))


def tables(inspection: LoRAInspection) -> RenderableType:
    """Facts, notes, layers and parts, as rich draws them."""
    notes = [_text(f"• {note}", "yellow") for note in inspection.notes]
    return Group(
        _facts(inspection), *notes, _layer_table(inspection), _part_table(inspection), Text(_LEGEND)
    )


_LEGEND = (
    "norm: Frobenius norm of delta = alpha / rank * up @ down. rel. norm: of the frozen weight's. "
    "stable rank: sum(S^2) / S1^2. E 1/4, E 1/2: energy in the largest quarter and half of the "
    "directions. S: singular values of delta."
)


def _facts(inspection: LoRAInspection) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(key: str, value: object) -> None:
        table.add_row(key, _text(value))

    row("file", inspection.path)
    row("layout", inspection.layout)
    row("base model", inspection.base_model or "not said")
    row("method", inspection.method or "not said")
    if title := inspection.metadata.get("modelspec.title"):
        row("title", title)
    if words := inspection.metadata.get("modelspec.trigger_phrase"):
        row("trigger words", words)
    if inspection.settings:
        row("settings", ", ".join(_flat(inspection.settings)))
    if run := inspection.run:
        seconds = sum((run["seconds"] or {}).values())
        row("run", f"{run['steps']} steps on {run['model']}, {seconds:.0f} s in all")
        trained = run["trained_ranks"].values()
        if trained:
            row("trained ranks", f"{min(trained)} to {max(trained)}, {sum(trained)} in all")
        if run["relative_error"]:
            row("export", f"relative error {run['relative_error']:.2e}")
    return table


def _text(value: object, style: str = "") -> Text:
    """What a file says, for a terminal: as it is, and its control characters as escapes."""
    return Text(printable(str(value)), style=style)


def _flat(settings: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key, value in settings.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{key}.")
        elif value not in (None, [], ()):
            lines.append(f"{prefix}{key}={value}")
    return lines


def _layer_table(inspection: LoRAInspection) -> Table:
    table = Table(title=f"{len(inspection.layers)} attachment points", title_justify="left")
    table.add_column("attachment point", overflow="fold", ratio=1)
    table.add_column("in -> out", no_wrap=True)
    for heading in _NUMBERS:
        table.add_column(heading, justify="right", no_wrap=True)
    part = None
    for layer in inspection.layers:
        if layer.part != part:
            table.add_section()
            table.add_row(_text(layer.part, "bold"))
        part = layer.part
        shape = f"{layer.in_features} -> {layer.out_features}"
        shape += "" if layer.kind == "linear" else f", {layer.kind.removeprefix('conv ')}"
        name = layer.name.removeprefix(f"{UNET}.").removeprefix(f"{TEXT_ENCODER}.")
        table.add_row(_text(name), shape, *_layer_numbers(layer))
    return table


def _layer_numbers(layer: LayerInspection) -> list[str]:
    if not layer.finite:
        return [str(layer.rank), f"{layer.alpha:g}", "not finite", *[""] * 5]
    return [
        str(layer.rank),
        f"{layer.alpha:g}",
        f"{layer.norm:.4g}",
        _relative(layer.relative_norm),
        f"{layer.stable_rank:.2f}",
        f"{layer.energy_quarter:.1%}",
        f"{layer.energy_half:.1%}",
        " ".join(f"{value:.3g}" for value in layer.singular_values[:3]),
    ]


def _part_table(inspection: LoRAInspection) -> Table:
    table = Table(title="by part of the model", title_justify="left")
    table.add_column("part", overflow="fold")
    for heading in (
        *("points", "ranks", "sum of ranks", "parameters", "norm", "rel. norm"),
        *("stable rank (median)", "E 1/4", "E 1/2", "largest S"),
    ):
        table.add_column(heading, justify="right")
    for part in inspection.parts:
        table.add_row(_text(part.part), *_part_numbers(part))
    return table


def _part_numbers(part: PartInspection) -> list[str]:
    low, middle, high = part.ranks
    return [
        str(part.points),
        str(low) if low == high else f"{low} to {high}, median {middle:g}",
        str(part.total_rank),
        f"{part.parameters:,}",
        f"{part.norm:.4g}",
        _relative(part.relative_norm),
        f"{part.stable_rank:.2f}",
        f"{part.energy_quarter:.1%}",
        f"{part.energy_half:.1%}",
        f"{part.largest_value[0]:.3g}",
    ]


def _relative(value: float | None) -> str:
    return "" if value is None else f"{value:.3%}"


def draw_pictures(inspection: LoRAInspection, folder: str | Path | None = None) -> list[Path]:
    """Draw the rank allocation and the spectra.

    Args:
        inspection: Of a LoRA.
        folder: Where to; default: beside the file. The pictures are named after the LoRA,
            ``<name>.inspect-ranks.png`` and ``<name>.inspect-spectra.png``; only pictures of these
            names are replaced.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = inspection.path
    target = require_writable_folder(path.parent if folder is None else folder)
    name = path.stem if path.suffix == ".safetensors" else path.name
    if name == "adapter_model":  # every adapter of peft's is called that
        name = path.resolve().parent.name
    ranks_picture = target / f"{name}.inspect-ranks.png"
    spectra_picture = target / f"{name}.inspect-spectra.png"
    title = printable(f"{name}: {inspection.method}" if inspection.method else name)
    plot_ranks(inspection.ranks, ranks_picture, title)
    plot_spectra(
        {layer.name: layer.singular_values for layer in inspection.layers},
        spectra_picture,
        title,
        {
            layer.name: layer.relative_norm
            for layer in inspection.layers
            if layer.relative_norm is not None
        },
    )
    return [ranks_picture, spectra_picture]
