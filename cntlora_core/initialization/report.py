"""What an initialisation did, for a person and for a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cntlora_core.activations.capture import CapturedMoments
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.initialization.plan import AdapterPlan

ROUNDING_TO_MENTION = 2e-3
"""Relative loss of a rewritten base weight above which a person should know of it."""


@dataclass(frozen=True)
class InitReport:
    """What an initialisation did.

    Attributes:
        points: How many attachment points there are.
        distinct_inputs: How many different tensors they read.
        rows: By point, how many rows (tokens) its second moment was taken over.
        ranks: By point.
        filled: By point, how many ranks start as plain LoRA, since the data supports no more
            directions or the closed form changes nothing there; where there are any.
        capture_seconds: Forward passes and sums.
        solve_seconds: Eigenproblems, ranks and factors.
        config: The settings.
        rounding: The most that a rewritten base weight lost by rounding to its data type, relative
            to its norm; 0 where no base was rewritten.
        processes: How many processes read the data; ``rows`` counts all of theirs.
        solver_error: About the largest angle, in radians, between the directions that were found
            at a point's input and its true eigenvectors (root mean square over its directions); 0
            where all eigenproblems were solved in full, as with ``solver="exact"``.
    """

    points: int
    distinct_inputs: int
    rows: dict[str, int]
    ranks: dict[str, int]
    filled: dict[str, int]
    capture_seconds: float
    solve_seconds: float
    config: CNTLoRAConfig
    rounding: float = 0.0
    processes: int = 1
    solver_error: float = 0.0

    @property
    def never_called(self) -> list[str]:
        """Points that read nothing in any batch, and so start as plain LoRA."""
        return [name for name, rows in self.rows.items() if rows == 0]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"config": self.config.describe()}

    def summary(self) -> str:
        """One sentence for a person."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        text = (
            f"{self.points} attachment points, {self.distinct_inputs} distinct inputs, "
            f"ranks {low} to {high}; {self.capture_seconds:.1f} s of forward passes, "
            f"{self.solve_seconds:.1f} s of linear algebra (solver {self.config.solver}"
        )
        text += f", directions off by {self.solver_error:.1%})" if self.solver_error else ")"
        if self.filled:
            text += (
                f"; at {len(self.filled)} points the data supported fewer directions than ranks, "
                f"or nothing to change ({sum(self.filled.values())} directions start as plain LoRA)"
            )
        if self.never_called:
            text += (
                f"; {len(self.never_called)} of {self.points} points never called, for example "
                f"{self.never_called[0]!r}"
            )
        if self.rounding > ROUNDING_TO_MENTION:
            text += (
                f"; rounding the rewritten base weight lost up to {self.rounding:.1%} of it: keep "
                "the base in float32, or use preserve_output=False"
            )
        return text


def report_of(
    plan: AdapterPlan,
    captured: CapturedMoments,
    config: CNTLoRAConfig,
    capture_seconds: float,
    solve_seconds: float,
) -> InitReport:
    """The report on a plan that was made from these moments."""
    return InitReport(
        points=len(plan.factors),
        distinct_inputs=len(captured.moments),
        rows={name: captured.of(name).count for name in plan.factors},
        ranks=plan.ranks,
        filled=plan.filled,
        capture_seconds=capture_seconds,
        solve_seconds=solve_seconds,
        config=config,
        solver_error=plan.solver_error,
    )
