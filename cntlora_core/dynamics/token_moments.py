"""The second moments of what adapted layers read, of visual and of text tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cntlora_core.dynamics.groups import PROJECTOR, VISION, GroupFn, plain_name

VISUAL, TEXT, ALL = "visual", "text", "all"
Key = tuple[str, str]
"""A layer and a kind of tokens."""
Squares = tuple[Tensor, Tensor]
"""A sum of squares, and of how many numbers it is; scalars."""


@dataclass(frozen=True)
class _Layer:
    """A layer with an adapter.

    Attributes:
        name: Its path.
        module: Itself.
        visual: Whether it belongs to the vision tower or the projector.
        crosses: Whether it is part of a cross-attention, whose keys and values are those of images.
    """

    name: str
    module: nn.Module
    visual: bool
    crosses: bool


class TokenMoments:
    """Mean squares of what adapted layers read, while it is attached to their models.

    Nothing is fetched from the device, and nothing depends on values there.

    Args:
        networks: Models with adapters, by the prefix of their layers' names.
        image_token: The token that stands for a patch of an image in ``input_ids``; None for models
            whose tokens are all alike.
        group_of: Tells which layers belong to the vision tower or the projector.
    """

    def __init__(
        self, networks: Mapping[str, nn.Module], image_token: int | None, group_of: GroupFn
    ) -> None:
        self._networks = tuple(networks.values())
        self._image_token = image_token
        self._layers: list[_Layer] = []
        for prefix, network in networks.items():
            for path, module in network.named_modules():
                if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
                    name = plain_name(prefix, path)
                    visual = image_token is not None and group_of(name) in (VISION, PROJECTOR)
                    self._layers.append(_Layer(name, module, visual, "cross_attn" in name))
        self._handles: list[Any] = []
        self._sums: dict[Key, Squares] = {}
        self._tokens: dict[str, tuple[Tensor, Tensor]] = {}
        self._latest: tuple[weakref.ref[Tensor], object, dict[str, Squares]] | None = None

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> None:
        """Begin to measure; anew if it was attached."""
        self.detach()
        for network in self._networks:
            self._handles.append(
                network.register_forward_pre_hook(self._see_tokens, with_kwargs=True)
            )
        for layer in self._layers:
            hook = self._hook_of(layer)
            self._handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> dict[Key, Tensor]:
        """End measuring.

        Returns:
            By layer and kind of tokens, the mean square of what was read: a scalar on its device,
            NaN where there were no such tokens.
        """
        for handle in self._handles:
            handle.remove()
        found = {key: total / count for key, (total, count) in self._sums.items()}
        self._handles, self._sums, self._tokens, self._latest = [], {}, {}, None
        return found

    def _see_tokens(self, _network: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Note which of the tokens that a model is called with are of which kind."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        counts = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        kinds: dict[str, Tensor] = {}
        if self._image_token is not None and isinstance(ids, Tensor) and ids.ndim == 2:
            image = ids == self._image_token
            kinds = {VISUAL: image, TEXT: ~image}
            if counts is not None and counts.shape == ids.shape:
                kinds = {kind: chosen & counts for kind, chosen in kinds.items()}
        elif counts is not None:
            kinds = {ALL: counts}
        weights = {kind: chosen.float() for kind, chosen in kinds.items()}
        self._tokens = {kind: (weight, weight.sum()) for kind, weight in weights.items()}
        self._latest = None

    def _hook_of(self, layer: _Layer) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see_input(layer, args[0] if args else next(iter(kwargs.values())))

        return hook

    @torch.no_grad()
    def _see_input(self, layer: _Layer, x: Tensor) -> None:
        for kind, (total, count) in self._squares_of(layer, x).items():
            before = self._sums.get((layer.name, kind))
            if before is not None:
                total, count = before[0] + total, before[1] + count
            self._sums[layer.name, kind] = (total, count)

    def _squares_of(self, layer: _Layer, x: Tensor) -> dict[str, Squares]:
        """By kind of tokens, the sum of squares of what a layer reads, and of how many numbers."""
        reading = (layer.visual, layer.crosses, x._version)
        if self._latest is not None and self._latest[0]() is x and self._latest[1] == reading:
            return self._latest[2]  # queries, keys and values read one tensor
        found = _squares(x, {} if layer.visual else self._tokens)
        if found is None:
            visual = layer.visual or (layer.crosses and self._image_token is not None)
            total = torch.linalg.vector_norm(x, dtype=torch.float32).square()
            found = {VISUAL if visual else ALL: (total, torch.full_like(total, x.numel()))}
        self._latest = weakref.ref(x), reading, found
        return found


def _squares(x: Tensor, tokens: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Squares] | None:
    """The squares of each kind of tokens; None where the kinds are not those of what is read."""
    if not tokens:
        return None
    shape = next(iter(tokens.values()))[0].shape
    if x.ndim == 2 and x.shape[0] == shape.numel():
        x = x.unflatten(0, shape)
    if x.ndim < 3 or x.shape[:2] != shape:
        return None
    width = x[0, 0].numel()
    norms = torch.linalg.vector_norm(x.flatten(2), dim=2, dtype=torch.float32).square()
    return {
        kind: ((norms * weight.to(norms.device)).sum(), count.to(norms.device) * width)
        for kind, (weight, count) in tokens.items()
    }
