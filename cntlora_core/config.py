"""What a user decides about a data-driven initialisation: one frozen, checked dataclass."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

    Shift = float | Literal["normal"] | Tensor
else:
    # What command lines and files are made from: a matrix has no spelling there.
    Shift = float | Literal["normal"]

Constraint = Literal["cross", "self", "shift"]
Subspace = Literal["principal", "full"]
Factorization = Literal["svd", "qr"]
Solver = Literal["exact", "fast"]
Unit = Literal["least-change", "mean"]
RankBudget = Literal["fixed", "ranks", "parameters"]
FactorName = Literal["U", "V", "Y", "X"]
"""LAVA's factors, in their order: outputs, inputs, kernel height, kernel width."""
PlainInitialization = Literal["orthogonal", "lora"]
"""LAVA's initialisations that read nothing: a model with either gives what its base gives."""


@dataclass(frozen=True)
class CNTLoRAConfig:
    """Settings of CNTLoRA's initialisation (arXiv 2507.08044; derived in docs/method.md).

    Attributes:
        constraint: What is assumed of the unseen source activations. ``cross``: their
            cross-correlation with the target's is the identity; ``self``: their own second
            moment is the identity; ``shift``: their shift against the target is constant.
        subspace: ``principal`` restricts every function of the second moment to as many leading
            eigenpairs as the attachment point has ranks; ``full`` uses all of them.
        factorization: How the delta is split into an up and a down matrix: ``svd`` or ``qr``.
        split: Fraction of the singular values, as an exponent, that goes to the up matrix, 0 to 1.
            With ``qr`` there is nothing to choose: the up matrix is orthonormal.
        shift: The constant of the ``shift`` constraint: a number (times the identity),
            ``"normal"``, a random normal matrix drawn from ``seed``, or a (d_in, d_in) tensor, in
            the ``unit`` of the second moment. A tensor fits attachment points that read d_in
            features, no others, and has no JSON form.
        unit: What the second moment is measured in, and so what the identity of the constraints
            means. ``least-change``: for each attachment point, the unit that changes its weight
            least (the delta is then never larger than the weight; for ``shift``, than the weight
            times the constant); ``mean``: the mean eigenvalue, the same at all points that read
            one input.
        damping: Added to each eigenvalue of the second moment (mean eigenvalue 1) before inversion.
            Only for ``unit="mean"``; ``least-change`` needs none.
        preserve_output: Freeze ``W - scaling * B @ A`` instead of ``W``, so that the first step
            starts from the pre-trained model's output.
        rank_budget: ``ranks`` and ``parameters`` share a global budget out by the spectra (variable
            adapter structure), counted in ranks or in adapter parameters; ``fixed`` gives every
            attachment point the rank of the LoRA configuration.
        min_rank: Floor of a point's rank under a shared budget.
        rho: Ceiling of a point's rank under a shared budget, as a multiple of the base rank.
        seed: Seed of what is random: filled-in directions and the ``normal`` shift. A training
            run adds its own seed to it.
        max_unfolded_width: The most features (input channels times kernel area) of a convolution's
            unfolded input. Its second moment has the square of that many float32 numbers, and its
            eigenproblem takes time as the cube.
        solver: ``exact`` solves every eigenproblem in full and in float64. ``fast`` works in
            float32 above 512 features, and finds few directions of many by subspace iteration; the
            report says how far they may be off.
    """

    constraint: Constraint = "cross"
    subspace: Subspace = "principal"
    factorization: Factorization = "svd"
    split: float = 0.5
    shift: Shift = field(default=1.0, hash=False)
    unit: Unit = "least-change"
    damping: float = 1e-2
    preserve_output: bool = True
    rank_budget: RankBudget = "ranks"
    min_rank: int = 1
    rho: float = 2.0
    seed: int = 0
    max_unfolded_width: int = 8192
    solver: Solver = "fast"

    def __post_init__(self) -> None:
        for name, kind in (
            ("constraint", Constraint),
            ("subspace", Subspace),
            ("factorization", Factorization),
            ("unit", Unit),
            ("rank_budget", RankBudget),
            ("solver", Solver),
        ):
            _one_of(name, getattr(self, name), get_args(kind))
        for name in ("split", "damping", "rho"):
            _number(name, getattr(self, name))
        for name in ("min_rank", "max_unfolded_width", "seed"):
            _whole_number(name, getattr(self, name), None if name == "seed" else 1)
        if not isinstance(self.preserve_output, bool):
            raise TypeError(f"preserve_output must be True or False, got {self.preserve_output!r}")
        if not 0.0 <= self.split <= 1.0:
            raise ValueError(f"split must lie between 0 and 1, got {self.split}")
        if self.factorization == "qr" and self.split != 0.5:
            raise ValueError(
                f"split={self.split} has no effect with factorization='qr', whose up matrix is "
                "orthonormal; leave split out or use factorization='svd'"
            )
        _check_shift(self.shift)
        if self.damping < 0:
            raise ValueError(f"damping must be a finite number of at least 0, got {self.damping}")
        if not 1 <= self.rho <= 1e6:
            raise ValueError(f"rho must be at least 1 and at most 1e6, got {self.rho}")
        for name in ("min_rank", "rho"):
            if self.rank_budget == "fixed" and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with rank_budget='fixed', where "
                    f"every attachment point keeps its rank; leave {name} out or share the budget "
                    "out with rank_budget='ranks' or 'parameters'"
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CNTLoRAConfig):
            return NotImplemented
        return all(
            _same(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)
        )

    @property
    def shift_matrix(self) -> Tensor | None:
        """The shift if it is a (d_in, d_in) matrix."""
        return self.shift if _is_array(self.shift) else None  # pyright: ignore[reportReturnType]

    def require_consistent(self) -> None:
        """Refuse settings that have no effect on one another.

        Apart from construction, since a command line builds these settings before its ``--method``
        fills the constraint in.

        Raises:
            ValueError: in words.
        """
        if self.constraint != "shift" and not _same(self.shift, 1.0):
            raise ValueError(
                f"shift={_named(self.shift)!r} belongs to constraint='shift', but constraint is "
                f"{self.constraint!r}; leave shift out or change the constraint"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values.

        Raises:
            ValueError: for a shift that is a matrix, which has no JSON form.
        """
        if _is_array(self.shift):
            raise ValueError(
                f"shift is a {_named(self.shift)}, which has no JSON form: keep the matrix in a "
                "safetensors file of its own, and give it as shift= when you build the settings"
            )
        return self.describe()

    def describe(self) -> dict[str, Any]:
        """The settings as plain JSON values for a reader; a matrix is named by its size alone."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"shift": _named(self.shift)}

    def to_json(self) -> str:
        """The settings as JSON; raises as :meth:`to_dict` does."""
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


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")


def _whole_number(name: str, value: object, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if least is not None and int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_shift(shift: Any) -> None:
    expected = "shift must be a number, 'normal' or a (d_in, d_in) tensor"
    if isinstance(shift, str):
        _one_of("shift", shift, ("normal",), "a number, a (d_in, d_in) tensor or ")
    elif _is_array(shift):
        if shift.ndim != 2 or shift.shape[0] != shift.shape[1] or not shift.shape[0]:
            raise ValueError(f"{expected}, got one of shape {tuple(shift.shape)}")
        largest = float(abs(shift).max())  # NaN comes through
        if not math.isfinite(largest) or largest == 0:
            raise ValueError(f"{expected}, finite and not all zero; its largest entry is {largest}")
    elif isinstance(shift, bool) or not isinstance(shift, numbers.Real):
        raise TypeError(f"{expected}, got a {type(shift).__name__}")
    elif not 1e-6 <= abs(float(shift)) <= 1e6:  # NaN too; beyond, float32 loses what it is added to
        raise ValueError(
            f"shift must be a finite number other than 0, of size 1e-6 to 1e6, got {shift}"
        )


def _is_array(value: object) -> bool:
    """A tensor or an array, told without importing torch."""
    return (
        not isinstance(value, numbers.Real) and hasattr(value, "ndim") and hasattr(value, "shape")
    )


def _named(shift: Any) -> Any:
    if not _is_array(shift):
        return shift
    return f"matrix of {' x '.join(str(n) for n in shift.shape)}"


def _same(first: Any, second: Any) -> bool:
    if _is_array(first) and _is_array(second):
        return first.shape == second.shape and bool((first == second).all())
    return not _is_array(first) and not _is_array(second) and first == second
