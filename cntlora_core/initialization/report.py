"""What an initialisation did, for a person and for a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from cntlora_core.config import CNTLoRAConfig

ROUNDING_TO_MENTION = 2e-3
"""Relative loss of a rewritten base weight above which a person should know of it."""


@dataclass(frozen=True)
class InitializationReport:
    """What an initialisation did: the part that every method has, CNTLoRA's, and LAVA's.

    Attributes:
        method: Its name.
        ranks: By attachment point; empty where a method has no rank.
        pass_seconds: Passes over the data, with what is accumulated while they run.
        solve_seconds: Decompositions, ranks, factors, and all else.
        filled: By point, how many ranks are initialised as plain LoRA, since the data supports no
            more directions or the closed form changes nothing there; where there are any.
        rounding: The most that a rewritten base weight lost by rounding to its data type, relative
            to its norm; 0 where no base was rewritten.
        notes: What a person should know.
        config: CNTLoRA's settings; None where the closed forms had no part in it. What follows is
            then empty.
        rows: By point, how many rows (tokens) its second moment was taken over.
        distinct_inputs: How many different tensors the points read.
        processes: How many processes read the data; ``rows`` counts all of theirs.
        solver_error: About the largest angle, in radians, between the directions that were found
            at a point's input and its true eigenvectors (root mean square over its directions); 0
            where all eigenproblems were solved in full, as with ``solver="exact"``.
        errors: Of LAVA, by convolution: error of its terms against the closed form's delta,
            relative.
        relative_error: The same of all deltas together, matrices (which have none) included.
        plain: Of LAVA, by module that was initialised plainly: why.
    """

    method: str
    ranks: dict[str, int]
    pass_seconds: float
    solve_seconds: float
    filled: dict[str, int] = field(default_factory=dict)
    rounding: float = 0.0
    notes: tuple[str, ...] = ()
    config: CNTLoRAConfig | None = None
    rows: dict[str, int] = field(default_factory=dict)
    distinct_inputs: int = 0
    processes: int = 1
    solver_error: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    relative_error: float = 0.0
    plain: dict[str, str] = field(default_factory=dict)

    @property
    def points(self) -> int:
        """How many attachment points there are."""
        return len(self.ranks)

    @property
    def never_called(self) -> list[str]:
        """Points that read nothing in any batch, and so are initialised as plain LoRA."""
        return [name for name, rows in self.rows.items() if rows == 0]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        config = self.config.describe() if self.config is not None else None
        return {"points": self.points} | values | {"config": config}

    def summary(self) -> str:
        """One sentence for a person."""
        text = self.method
        if self.ranks:
            low, high = min(self.ranks.values()), max(self.ranks.values())
            text += f": {self.points} attachment points, "
            text += f"{self.distinct_inputs} distinct inputs, " if self.distinct_inputs else ""
            text += f"rank {low}" if low == high else f"ranks {low} to {high}"
        text += (
            f"; {self.pass_seconds:.1f} s of passes over the data, "
            f"{self.solve_seconds:.1f} s of linear algebra"
        )
        if self.config is not None:
            text += f" (solver {self.config.solver}"
            text += f", directions off by {self.solver_error:.1%})" if self.solver_error else ")"
        parts = [text, *self.notes]
        if self.filled:
            parts.append(
                f"at {len(self.filled)} points the data supported fewer directions than ranks, "
                f"or nothing to change ({sum(self.filled.values())} directions are initialised as "
                "plain LoRA)"
            )
        if self.never_called:
            parts.append(
                f"{len(self.never_called)} of {self.points} points never called, for example "
                f"{self.never_called[0]!r}"
            )
        if self.rounding > ROUNDING_TO_MENTION:
            parts.append(
                f"rounding the rewritten base weight lost up to {self.rounding:.1%} of it: keep "
                f"the base in float32{', or use preserve_output=False' if self.config else ''}"
            )
        if self.errors:
            low, high = min(self.errors.values()), max(self.errors.values())
            parts.append(
                f"the terms of {len(self.errors)} convolutions miss {low:.0%} to {high:.0%} of "
                f"their deltas (all together {self.relative_error:.0%})"
            )
        if self.plain:
            name, why = next(iter(self.plain.items()))
            parts.append(
                f"{len(self.plain)} modules are initialised plainly, for example {name!r}: {why}"
            )
        return "; ".join(parts)
