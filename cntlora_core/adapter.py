"""Plan an adapter (ranks and factors of every attachment point), then put it into a model once."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from cntlora_core.attachment import AttachmentPoint, subtract_from_weight
from cntlora_core.capture import CapturedMoments
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.constraints import delta_spectrum
from cntlora_core.factorization import Factors, factorize, plain_factors
from cntlora_core.linalg import PrincipalSubspace, principal_subspace
from cntlora_core.parallel import map_in_threads
from cntlora_core.ranks import RankOffer, allocate_ranks


@dataclass(frozen=True)
class AdapterPlan:
    """Ranks and starting factors of every attachment point, before any module is wrapped.

    Attributes:
        factors: By attachment point's name, in the model's order.
        rewrites_base: Whether the frozen weight becomes ``W - scaling * B @ A``.
    """

    factors: dict[str, Factors]
    rewrites_base: bool

    @property
    def ranks(self) -> dict[str, int]:
        return {name: factors.rank for name, factors in self.factors.items()}

    @property
    def filled(self) -> dict[str, int]:
        """Directions that started as plain LoRA for want of data, where there are any."""
        return {name: f.filled for name, f in self.factors.items() if f.filled}

    def under(self, prefix: str) -> AdapterPlan:
        """The part of the plan whose names start with ``prefix``, without it."""
        return AdapterPlan(
            {n[len(prefix) :]: f for n, f in self.factors.items() if n.startswith(prefix)},
            self.rewrites_base,
        )


def plan_adapter(
    points: Sequence[AttachmentPoint],
    captured: CapturedMoments,
    config: CNTLoRAConfig,
    *,
    rank: int,
    scaling: float,
    progress: Callable[[int, int], None] | None = None,
) -> AdapterPlan:
    """The closed-form start of every point, under one rank budget.

    Args:
        points: Attachment points of one or several models.
        captured: Second moments of what they read.
        config: The method's settings.
        rank: Rank of a point; under a shared budget, the mean rank.
        scaling: alpha / r, the same for every point.
        progress: Called with (eigenproblems solved, total).

    Raises:
        ValueError: if the rank is wider than the points are, or the budget too small.
    """
    config.require_consistent()
    _check_rank(points, rank, config)
    ceiling = rank if config.rank_budget == "fixed" else max(rank, int(config.rho * rank))
    groups: dict[int, list[AttachmentPoint]] = {}
    for point in points:
        groups.setdefault(captured.input_of[point.name], []).append(point)

    def solve(index: int) -> tuple[PrincipalSubspace, dict[str, RankOffer]]:
        k = None if config.subspace == "full" else ceiling
        subspace = principal_subspace(captured.moments[index], k)
        return subspace, {
            p.name: RankOffer(
                delta_spectrum(p.weight().cpu(), subspace, config).values, 0, p.max_rank
            )
            for p in groups[index]
        }

    # The widest first: they take longest, and none should be left for the end.
    order = sorted(groups, key=lambda index: -groups[index][0].in_features)
    solved = dict(zip(order, map_in_threads(solve, order, progress), strict=True))
    if config.rank_budget == "fixed":
        ranks = {point.name: rank for point in points}
    else:
        by_parameters = config.rank_budget == "parameters"
        offers = {}
        for point in points:
            offer = solved[captured.input_of[point.name]][1][point.name]
            cost = point.in_features + point.out_features if by_parameters else 1
            offers[point.name] = dataclasses.replace(offer, cost=cost)
        ranks = allocate_ranks(
            offers,
            budget=rank * sum(offer.cost for offer in offers.values()),
            min_rank=config.min_rank,
            ceiling=ceiling,
        )

    def factors_of(point: AttachmentPoint) -> Factors:
        # Ranks are decided over all that a point may get; its delta then acts in the principal
        # subspace of just its rank. Truncating the larger delta instead would keep the directions
        # of the smallest eigenvalues, where the gains are largest and the data says least.
        subspace = solved[captured.input_of[point.name]][0]
        if config.subspace == "principal":
            subspace = subspace.leading(ranks[point.name])
        spectrum = delta_spectrum(point.weight().cpu(), subspace, config)
        return factorize(spectrum, ranks[point.name], scaling, config, generators[point.name])

    generators = {
        p.name: torch.Generator().manual_seed(config.seed * 1_000_003 + i)
        for i, p in enumerate(points)
    }
    factors = map_in_threads(factors_of, points)
    by_name = {p.name: f for p, f in zip(points, factors, strict=True)}
    return AdapterPlan(by_name, rewrites_base=config.preserve_output)


def plan_plain_lora(
    points: Sequence[AttachmentPoint], *, rank: int, scaling: float, seed: int = 0
) -> AdapterPlan:
    """Plain LoRA: Kaiming-uniform down, zero up, one rank for all (arXiv 2106.09685)."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for point in points:
        down, up = plain_factors(rank, point.in_features, point.out_features, generator)
        factors[point.name] = Factors(down, up, scaling)
    return AdapterPlan(factors, rewrites_base=False)


def _check_rank(points: Sequence[AttachmentPoint], rank: int, config: CNTLoRAConfig) -> None:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    narrow = min(points, key=lambda p: p.max_rank)
    wide = max(points, key=lambda p: p.max_rank)
    if config.rank_budget == "fixed" and rank > narrow.max_rank:
        raise ValueError(
            f"rank {rank} is above the width of {narrow.name!r} "
            f"({narrow.in_features} -> {narrow.out_features}): use a rank of at most "
            f"{narrow.max_rank}, or rank_budget='ranks', which gives narrow layers fewer"
        )
    room = sum(point.max_rank for point in points)
    if rank * len(points) > room:
        raise ValueError(
            f"rank {rank} at {len(points)} attachment points is more than their widths hold "
            f"(the widest takes {wide.max_rank}): use a rank of at most {room // len(points)}"
        )


def inject_adapter(
    model: nn.Module, lora_config: LoraConfig, plan: AdapterPlan, adapter_name: str = "default"
) -> tuple[PeftModel, dict[str, float]]:
    """Wrap the planned points of a base model, once, and copy their factors in.

    ``rank_pattern`` and ``alpha_pattern`` of the configuration are written from the plan, as
    escaped and anchored patterns, so that the saved configuration rebuilds the same adapter.
    Adapter weights are float32, whatever the base's dtype.

    Returns:
        The wrapped model, and what :func:`copy_factors` returns.

    Raises:
        ValueError: for a configuration that changes what an adapter computes (DoRA) under a plan
            that rewrites the base weight, or that has rank patterns of its own.
    """
    check_lora_config(lora_config, plan.rewrites_base)
    lora_config = copy.deepcopy(lora_config)
    lora_config.init_lora_weights = False  # the factors are copied in below
    lora_config.target_modules = list(plan.factors)
    lora_config.layers_to_transform = lora_config.layers_pattern = None
    matched = {n for n, _ in model.named_modules() if check_target_module_exists(lora_config, n)}
    if matched != set(plan.factors):  # peft takes names as suffixes
        lora_config.target_modules = "|".join(re.escape(name) for name in plan.factors)
    lora_config.rank_pattern = {_anchored(n): f.rank for n, f in plan.factors.items()}
    lora_config.alpha_pattern = {
        _anchored(n): _alpha(f, lora_config.use_rslora) for n, f in plan.factors.items()
    }
    peft_model = get_peft_model(model, lora_config, adapter_name=adapter_name)
    assert isinstance(peft_model, PeftModel)
    return peft_model, copy_factors(peft_model, plan, adapter_name)


def check_lora_config(lora_config: LoraConfig, rewrites_base: bool) -> None:
    """Refuse what a planned start cannot be combined with.

    Raises:
        ValueError: in words.
    """
    if lora_config.use_dora and rewrites_base:
        raise ValueError(
            "use_dora=True normalises by the frozen weight, which preserve_output=True rewrites: "
            "use preserve_output=False"
        )
    if lora_config.rank_pattern or lora_config.alpha_pattern:
        raise ValueError(
            "the configuration has a rank_pattern or alpha_pattern of its own, which the planned "
            "ranks would overwrite: leave them out"
        )


@torch.no_grad()
def copy_factors(
    peft_model: nn.Module, plan: AdapterPlan, adapter_name: str = "default"
) -> dict[str, float]:
    """Copy a plan's factors into the adapter of a wrapped model, rewriting the base if planned.

    Returns:
        For each point, what rounding the rewritten weight to its dtype lost, relative to the
        weight's norm; zeros where the base stays.

    Raises:
        ValueError: if a point is not wrapped, or wrapped at another rank or scaling.
    """
    layers = adapter_layers(peft_model)
    more = {n for n, layer in layers.items() if adapter_name in layer.lora_A} - set(plan.factors)
    if more:
        raise ValueError(f"{sorted(more)[:3]} carry the adapter but are not in the plan")
    rounding = {}
    for name, factors in plan.factors.items():
        layer = layers.get(name)
        if layer is None or adapter_name not in layer.lora_A:
            raise ValueError(f"{name!r} carries no adapter {adapter_name!r}")
        down, up = adapter_weights(layer, adapter_name)
        if down.shape[0] != factors.rank:
            raise ValueError(f"{name!r} has rank {down.shape[0]}, the plan has {factors.rank}")
        if abs(layer.scaling[adapter_name] - factors.scaling) > 1e-6 * abs(factors.scaling):
            raise ValueError(
                f"{name!r} has scaling {layer.scaling[adapter_name]}, the plan {factors.scaling}"
            )
        down.copy_(factors.down)
        up.copy_(factors.up)
        rounding[name] = (
            subtract_from_weight(layer.get_base_layer(), factors.delta())
            if plan.rewrites_base
            else 0.0
        )
    return rounding


def adapter_weights(
    layer: LoraLayer, adapter_name: str = "default"
) -> tuple[nn.Parameter, nn.Parameter]:
    """The down (r, d_in) and the up (d_out, r) matrix of an adapter."""
    down = layer.lora_A.get_submodule(adapter_name).weight
    up = layer.lora_B.get_submodule(adapter_name).weight
    assert isinstance(down, nn.Parameter)
    assert isinstance(up, nn.Parameter)
    return down, up


def adapter_layers(model: nn.Module) -> Mapping[str, LoraLayer]:
    """peft's LoRA layers by the name that the module had before it was wrapped."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def _anchored(name: str) -> str:
    return f"^{re.escape(name)}"


def _alpha(factors: Factors, use_rslora: bool) -> float:
    return factors.scaling * (factors.rank**0.5 if use_rslora else factors.rank)
