"""The orthogonality term, for any trainer to add to its loss (the LAVA paper, section 4.2).

``lambda * ||F.T F - I||^2`` (Frobenius) for each layer's factor F, the output factor U by default;
its gradient is ``4 lambda F (F.T F - I)`` (equation 5).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, autocast, nn

from cntlora_core.lava.layer import LavaLayer


class OrthogonalityLoss:
    """The term of a model's active adapters, as a callable without arguments.

    The factors are looked up once, when it is made, and those of one shape are taken together. Make
    it anew after adapters were added, loaded, activated, or moved to another data type.

    A factor with fewer rows than ranks, such as Y of a 3 x 3 kernel above rank 3, cannot have
    orthonormal columns. Its rows are then kept orthonormal, ``||F F.T - I||^2``: the same gradient,
    and 0 is within reach.

    Args:
        model: A model with LAVA adapters, whatever it is wrapped in.
        adapter_name: One adapter; default: those that are active.
        strength: lambda; default: each adapter's own ``orthogonality``.

    Raises:
        ValueError: if the model has no adapter of that name.

    Example:
        >>> term = OrthogonalityLoss(model)
        >>> (task_loss(model, batch) + term()).backward()
    """

    def __init__(
        self, model: nn.Module, adapter_name: str | None = None, strength: float | None = None
    ) -> None:
        if adapter_name is not None:
            _require_adapter(model, adapter_name)
        self.factors: dict[str, nn.Parameter] = {}
        groups: dict[tuple[object, ...], tuple[float, list[Tensor]]] = {}
        for name, factor, own_strength in _regularised(model, adapter_name):
            self.factors[name] = factor
            lam = own_strength if strength is None else strength
            if lam:
                key = (lam, factor.shape, factor.device, factor.dtype)
                groups.setdefault(key, (lam, []))[1].append(factor)
        self._groups = list(groups.values())
        self._device = next(iter(self.factors.values())).device if self.factors else None

    def __call__(self) -> Tensor:
        """The term, a float32 scalar; 0 where no adapter asks for it."""
        total = torch.zeros((), device=self._device)
        for strength, group in self._groups:
            term = strength * gram_deviation(torch.stack(group)).square().sum()
            total = total + term.to(total.device)
        return total

    @torch.no_grad()
    def deviations(self) -> dict[str, float]:
        """``||F.T F - I||`` of each factor that the term acts on, by ``<module>.<factor>``."""
        return {name: float(gram_deviation(f).norm()) for name, f in self.factors.items()}


def orthogonality_loss(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """The term as it is now, for a loop that keeps nothing: see :class:`OrthogonalityLoss`."""
    return OrthogonalityLoss(model, adapter_name)()


def gram_deviation(factor: Tensor) -> Tensor:
    """``F.T F - I``, (..., R, R), for F (..., n, R); ``F F.T - I``, (..., n, n), where n < R.

    float32 at the least, autocast or not.
    """
    with autocast(factor.device.type, enabled=False):
        if factor.dtype != torch.float64:
            factor = factor.float()
        if factor.shape[-2] < factor.shape[-1]:
            factor = factor.mT
        eye = torch.eye(factor.shape[-1], device=factor.device, dtype=factor.dtype)
        return factor.mT @ factor - eye


def _require_adapter(model: nn.Module, name: str) -> None:
    known = {
        found for layer in model.modules() if isinstance(layer, LavaLayer) for found in layer.lava_U
    }
    if name not in known:
        raise ValueError(
            f"there is no LAVA adapter {name!r}; there are: {', '.join(sorted(known))}"
        )


def _regularised(
    model: nn.Module, adapter_name: str | None
) -> Iterator[tuple[str, nn.Parameter, float]]:
    for path, layer in model.named_modules():
        if not isinstance(layer, LavaLayer):
            continue
        for adapter in layer.active_adapters if adapter_name is None else [adapter_name]:
            if adapter not in layer.lava_U:
                continue
            config, factors = layer.lava_config[adapter], layer.factors(adapter)
            for name in config.orthogonal_factors:
                if name in factors:
                    yield f"{path}.{name}", factors[name], config.orthogonality
