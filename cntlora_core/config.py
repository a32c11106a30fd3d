"""What a user decides about a data-driven start: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Constraint = Literal["cross", "self", "shift"]
Subspace = Literal["principal", "full"]
Factorization = Literal["svd", "qr"]
RankBudget = Literal["fixed", "ranks", "parameters"]


@dataclass(frozen=True)
class CNTLoRAConfig:
    """Settings of the CNTLoRA start (arXiv 2507.08044; equations derived in docs/method.md).

    Attributes:
        constraint: What is assumed of the unseen source activations. ``cross``: their
            cross-correlation with the target's is the identity; ``self``: their own second
            moment is the identity; ``shift``: their shift against the target is constant.
        subspace: ``principal`` restricts every function of the second moment to as many leading
            eigenpairs as the attachment point has ranks; ``full`` uses all of them.
        factorization: How the delta is split into an up and a down matrix: ``svd`` or ``qr``.
        split: Fraction of the singular values, as an exponent, that goes to the up matrix, 0 to 1.
            With ``qr`` there is nothing to choose: the up matrix is orthonormal.
        shift: The constant of the ``shift`` constraint: a number (times the identity) or
            ``"normal"``, a random normal matrix drawn from ``seed``.
        damping: Added to each eigenvalue of the second moment (mean eigenvalue 1) before inversion.
        preserve_output: Freeze ``W - scaling * B @ A`` instead of ``W``, so that the first step
            starts from the pre-trained model's output.
        rank_budget: ``ranks`` and ``parameters`` share a global budget out by the spectra (variable
            adapter structure), counted in ranks or in adapter parameters; ``fixed`` gives every
            attachment point the rank of the LoRA configuration.
        min_rank: Floor of a point's rank under a shared budget.
        rho: Ceiling of a point's rank under a shared budget, as a multiple of the base rank.
        seed: Seed of what is random: filled-in directions and the ``normal`` shift. A training
            run adds its own seed to it.
    """

    constraint: Constraint = "cross"
    subspace: Subspace = "principal"
    factorization: Factorization = "svd"
    split: float = 0.5
    shift: float | Literal["normal"] = 1.0
    damping: float = 1e-2
    preserve_output: bool = True
    rank_budget: RankBudget = "ranks"
    min_rank: int = 1
    rho: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (
            ("constraint", Constraint),
            ("subspace", Subspace),
            ("factorization", Factorization),
            ("rank_budget", RankBudget),
        ):
            _one_of(name, getattr(self, name), get_args(kind))
        if not 0.0 <= self.split <= 1.0:
            raise ValueError(f"split must lie between 0 and 1, got {self.split}")
        if self.factorization == "qr" and self.split != 0.5:
            raise ValueError(
                f"split={self.split} has no effect with factorization='qr', whose up matrix is "
                "orthonormal; leave split out or use factorization='svd'"
            )
        if isinstance(self.shift, str):
            _one_of("shift", self.shift, ("normal",), "a number or ")
        elif not (math.isfinite(self.shift) and self.shift != 0):
            raise ValueError(f"shift must be a finite number other than 0, got {self.shift}")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping must be a finite number of at least 0, got {self.damping}")
        if self.min_rank < 1:
            raise ValueError(f"min_rank must be at least 1, got {self.min_rank}")
        if not (math.isfinite(self.rho) and self.rho >= 1):
            raise ValueError(f"rho must be at least 1, got {self.rho}")

    def require_consistent(self) -> None:
        """Refuse settings that have no effect on one another.

        Apart from construction, since a command line builds these settings before its ``--method``
        fills the constraint in.

        Raises:
            ValueError: in words.
        """
        if self.shift != 1.0 and self.constraint != "shift":
            raise ValueError(
                f"shift={self.shift!r} belongs to constraint='shift', but constraint is "
                f"{self.constraint!r}; leave shift out or change the constraint"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CNTLoRAConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: for a key that is no setting, or a value that makes no sense.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown settings {unknown}; known are {sorted(known)}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> CNTLoRAConfig:
        return cls.from_dict(json.loads(text))


def _one_of(name: str, value: object, choices: tuple[str, ...], also: str = "") -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {also}one of {', '.join(choices)}; got {value!r}")
