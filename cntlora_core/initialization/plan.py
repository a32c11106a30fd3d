"""What an adapter is initialised from, decided before any module is wrapped: ranks and factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import torch
from rich.filesize import decimal
from torch import Tensor, nn

from cntlora_core.activations.capture import CapturedMoments
from cntlora_core.closed_form.constraints import PointDelta, check_shift_width
from cntlora_core.closed_form.factorization import (
    Factors,
    factorize,
    plain_factors,
    seeded_generator,
)
from cntlora_core.closed_form.ranks import RankOffer, allocate_ranks
from cntlora_core.closed_form.spectra import PrincipalSubspace, principal_subspace
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.layers.attachment import AttachmentPoint
from cntlora_core.layers.weights import check_readable
from cntlora_core.runtime.reading import reading
from cntlora_core.runtime.seeds import torch_seed
from cntlora_core.runtime.tensor_file import read_tensors, write_tensors
from cntlora_core.runtime.thread_pool import map_in_threads

if TYPE_CHECKING:
    from typing_extensions import Self

_FORMAT = "cntlora-plan-1"


class AdapterFactors(Protocol):
    """The initialisation of one adapter, LoRA's or LAVA's."""

    @property
    def rank(self) -> int: ...
    @property
    def filled(self) -> int: ...
    def named(self) -> dict[str, Tensor]:
        """The matrices by their names."""
        ...

    @classmethod
    def of(cls, named: Mapping[str, Tensor], **numbers: Any) -> Self:
        """Inverse of :meth:`named`, with what else the factors hold."""
        ...


FactorsT = TypeVar("FactorsT", bound=AdapterFactors)


@dataclass(frozen=True)
class Plan(Generic[FactorsT]):
    """Ranks and initial factors of every attachment point, before any module is wrapped.

    Attributes:
        factors: By attachment point's name, in the model's order.
        rewrites_base: Whether the frozen weight becomes ``W - delta``.
    """

    factors: dict[str, FactorsT]
    rewrites_base: bool
    factors_type: ClassVar[type[AdapterFactors]]

    @property
    def ranks(self) -> dict[str, int]:
        return {name: factors.rank for name, factors in self.factors.items()}

    @property
    def filled(self) -> dict[str, int]:
        """Ranks that are initialised as plain LoRA, which the delta does not have."""
        return {name: f.filled for name, f in self.factors.items() if f.filled}

    def for_prefix(self, prefix: str) -> Self:
        """The part of the plan whose names start with ``prefix``, without it."""
        part = {n[len(prefix) :]: f for n, f in self.factors.items() if n.startswith(prefix)}
        return dataclasses.replace(self, factors=part)

    def tensors(self) -> dict[str, Tensor]:
        """The factors' matrices, by ``<point>.<matrix>``."""
        return {f"{n}.{key}": t for n, f in self.factors.items() for key, t in f.named().items()}

    def numbers(self) -> dict[str, dict[str, float]]:
        """What else the factors hold, by point: scaling and so on."""
        return {
            name: {k: v for k, v in vars(factors).items() if isinstance(v, (int, float))}
            for name, factors in self.factors.items()
        }

    @classmethod
    def of(
        cls,
        numbers: Mapping[str, Mapping[str, float]],
        tensors: Mapping[str, Tensor],
        rewrites_base: bool,
    ) -> Self:
        """Inverse of :meth:`numbers` and :meth:`tensors`.

        Raises:
            KeyError, TypeError: if a matrix or a number is missing.
        """
        named: dict[str, dict[str, Tensor]] = {name: {} for name in numbers}
        for key, tensor in tensors.items():
            name, _, matrix = key.rpartition(".")
            named[name][matrix] = tensor
        made: Any = {n: cls.factors_type.of(named[n], **rest) for n, rest in numbers.items()}
        return cls(made, rewrites_base)


@dataclass(frozen=True)
class AdapterPlan(Plan[Factors]):
    """The plan of LoRA adapters; what is taken out of a base is ``scaling * B @ A``.

    Attributes:
        solver_error: The largest of the inputs' :attr:`PrincipalSubspace.error`.
    """

    solver_error: float = 0.0
    factors_type = Factors

    def save(self, path: str | Path) -> Path:
        """Write the plan to a safetensors file; returns its path.

        Raises:
            OSError: as :func:`~cntlora_core.runtime.files.atomic_write`.
        """
        header = {"layers": self.numbers(), "rewrites_base": self.rewrites_base}
        return write_tensors(
            path, _FORMAT, header | {"solver_error": self.solver_error}, self.tensors()
        )

    @classmethod
    def load(cls, path: str | Path) -> AdapterPlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            ValueError: if the file is damaged, or no plan.
            FileNotFoundError: if there is none.
        """
        with reading(path, "a plan of an adapter"):
            header, tensors = read_tensors(path, _FORMAT)
            plan = cls.of(header["layers"], tensors, bool(header["rewrites_base"]))
            return dataclasses.replace(plan, solver_error=float(header["solver_error"]))


def plan_adapter(
    points: Sequence[AttachmentPoint],
    captured: CapturedMoments,
    config: CNTLoRAConfig,
    *,
    rank: int | Mapping[str, int],
    scaling: float | Mapping[str, float],
    progress: Callable[[int, int], None] | None = None,
    release: bool = False,
) -> AdapterPlan:
    """The closed-form initialisation of every point, under one rank budget.

    Args:
        points: Attachment points of one or several models.
        captured: Second moments of what they read.
        config: The method's settings.
        rank: Rank of a point; under a shared budget, the mean rank. Under ``rank_budget="fixed"``
            it may be one for each point, by name.
        scaling: alpha / r, the same for every point or one for each, by name.
        progress: Called with (eigenproblems solved, total).
        release: Whether each moment's memory may be given back once its eigenproblem is solved.

    Raises:
        ValueError: if the budget is too small, or as :func:`check_points`.
    """
    wanted = rank if isinstance(rank, Mapping) else {p.name: rank for p in points}
    scalings = scaling if isinstance(scaling, Mapping) else {p.name: scaling for p in points}
    check_points(points, config, wanted)
    fixed = config.rank_budget == "fixed"
    base_rank = max(wanted.values())
    ceiling = max(base_rank, int(config.rho * base_rank))
    groups: dict[int, list[AttachmentPoint]] = {}
    for point in points:
        groups.setdefault(captured.input_of[point.name], []).append(point)

    deltas: dict[str, PointDelta] = {}

    def solve(index: int) -> tuple[PrincipalSubspace, dict[str, RankOffer]]:
        group = groups[index]
        k = max(wanted[p.name] for p in group) if fixed else ceiling
        subspace = principal_subspace(
            captured.moments[index],
            None if config.subspace == "full" else k,
            solver=config.solver,
        )
        if release:
            captured.moments[index].release()
        return subspace, {} if fixed else {p.name: offer_of(p, subspace) for p in group}

    def offer_of(point: AttachmentPoint, subspace: PrincipalSubspace) -> RankOffer:
        delta = PointDelta(point.weight().cpu(), subspace, config)
        if config.subspace == "principal":  # else it is as large as the weight
            deltas[point.name] = delta
        cost = point.in_features + point.out_features if config.rank_budget == "parameters" else 1
        return RankOffer(delta.singular_values(), cost, point.max_rank)

    # The widest first: they take longest, and none should be left for the end.
    order = sorted(groups, key=lambda index: -groups[index][0].in_features)
    solved = dict(zip(order, map_in_threads(solve, order, progress), strict=True))
    if fixed:
        ranks = {point.name: wanted[point.name] for point in points}
    else:
        offers = {p.name: solved[captured.input_of[p.name]][1][p.name] for p in points}
        ranks = allocate_ranks(
            offers,
            budget=base_rank * sum(offer.cost for offer in offers.values()),
            min_rank=config.min_rank,
            ceiling=ceiling,
        )

    def factors_of(numbered: tuple[int, AttachmentPoint]) -> Factors:
        # Ranks are decided over all that a point may get; its delta then acts in the principal
        # subspace of just its rank, in the unit of just these directions. Truncating the larger
        # delta instead would keep the directions of the smallest eigenvalues, where the inverse is
        # largest and the data says least.
        number, point = numbered
        subspace = solved[captured.input_of[point.name]][0]
        delta = deltas.pop(point.name, None) or PointDelta(point.weight().cpu(), subspace, config)
        return factorize(
            delta.spectrum(ranks[point.name] if config.subspace == "principal" else None),
            ranks[point.name],
            scalings[point.name],
            config,
            seeded_generator(config.seed, number),
        )

    factors = map_in_threads(factors_of, list(enumerate(points)))
    by_name = {p.name: f for p, f in zip(points, factors, strict=True)}
    error = max((subspace.error for subspace, _ in solved.values()), default=0.0)
    return AdapterPlan(by_name, config.preserve_output, error)


def check_points(
    points: Sequence[AttachmentPoint], config: CNTLoRAConfig, ranks: Mapping[str, int]
) -> None:
    """Refuse points that the settings do not fit, before anything is computed.

    Args:
        points: The attachment points.
        config: The method's settings.
        ranks: Rank of each point, before a shared budget changes it.

    Raises:
        ValueError: for a rank that is too large, a shift matrix of another width than a point's
            inputs, or a convolution whose second moment would be larger than
            ``max_unfolded_width`` allows.
        TypeError: for a weight that cannot be read.
    """
    config.require_consistent()
    _check_ranks(points, ranks, config)
    for point in points:
        check_readable(point.name, point.module)
        width = point.in_features
        check_shift_width(repr(point.name), width, config)
        conv = point.module
        if isinstance(conv, nn.Conv2d) and width > config.max_unfolded_width:
            raise ValueError(
                f"{point.name!r} is a convolution whose unfolded input has {width} features "
                f"({' x '.join(str(n) for n in conv.weight.shape[1:])}): its second moment "
                f"would be {width} x {width}, {decimal(4 * width**2)}, and solving it takes "
                f"several times that. Leave it out with exclude_modules, or allow it with "
                f"max_unfolded_width={width} (now {config.max_unfolded_width})"
            )


def plan_plain_lora(
    points: Sequence[AttachmentPoint], *, rank: int, scaling: float, seed: int = 0
) -> AdapterPlan:
    """Plain LoRA: Kaiming-uniform down, zero up, one rank for all (arXiv 2106.09685)."""
    generator = torch.Generator().manual_seed(torch_seed(seed))
    factors = {}
    for point in points:
        down, up = plain_factors(rank, point.in_features, point.out_features, generator)
        factors[point.name] = Factors(down, up, scaling)
    return AdapterPlan(factors, rewrites_base=False)


def _check_ranks(
    points: Sequence[AttachmentPoint], wanted: Mapping[str, int], config: CNTLoRAConfig
) -> None:
    for point in points:
        rank = wanted[point.name]
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank} for {point.name!r}")
        if config.rank_budget == "fixed" and rank > point.max_rank:
            raise ValueError(
                f"rank {rank} is above the width of {point.name!r} "
                f"({point.in_features} -> {point.out_features}): use a rank of at most "
                f"{point.max_rank}, or rank_budget='ranks', which gives narrow layers fewer"
            )
    if config.rank_budget == "fixed":
        return
    if len({*wanted.values()}) > 1:
        raise ValueError(
            f"rank_budget={config.rank_budget!r} shares one rank out between the points, but they "
            "were given ranks of their own: use rank_budget='fixed'"
        )
    room, rank = sum(point.max_rank for point in points), next(iter(wanted.values()))
    if rank * len(points) > room:
        wide = max(point.max_rank for point in points)
        raise ValueError(
            f"rank {rank} at {len(points)} attachment points is more than their widths hold "
            f"(the widest takes {wide}): use a rank of at most {room // len(points)}"
        )
