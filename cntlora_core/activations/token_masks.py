"""Which tokens count in what a layer reads, followed through a forward pass.

A model may hold several kinds of tokens: those of an encoder, of a decoder, of an image. Each model
of transformers within it (a *part*) is called with the mask of its own tokens, and that is the mask
of what the layers in it read. Cross-attention reads the encoder's tokens inside the decoder: it is
told by the tensor, which the decoder was handed as ``encoder_hidden_states``.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MaskFn = Callable[[Any], "Tensor | Mapping[str, Tensor | None] | None"]
"""``mask_fn(batch)`` gives the (batch, tokens) mask that is 1 where a token counts: see
:meth:`TokenMasks.begin`."""

_NO_TOKENS = ("pixel_values", "input_values", "input_features")
_TOKENS, _DECODER = "attention_mask", "decoder_attention_mask"
_IGNORED_LABEL = -100  # of torch's cross-entropy


def default_mask(batch: Any) -> Tensor | None:
    """A mapping's ``attention_mask`` if it is one of (batch, tokens); else all tokens count."""
    mask = batch.get(_TOKENS) if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


@dataclass
class _Call:
    """A part that is running.

    Attributes:
        part: The part; None for what is outside all parts.
        mask: Of its own tokens; None where all count.
        latest: Of what was computed last: its own tokens, or those of a part within it.
        given: The ``attention_mask`` that it was called with.
        labels: Those that it or the call around it was given.
    """

    part: nn.Module | None
    mask: Tensor | None
    latest: Tensor | None
    given: Any = None
    labels: Any = None


class TokenMasks:
    """The masks of one model; :meth:`of` is asked within a forward pass, from a layer's hook.

    Args:
        model: The model that runs.
        mask_fn: What decides instead of the model's own masks.
    """

    def __init__(self, model: nn.Module, mask_fn: MaskFn | None = None) -> None:
        self._parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) or _is_tower(m)]
        self._decoders = {d for part in self._parts for d in _parts_of_decoder(part)}
        self._mask_fn = mask_fn
        self._chosen: Mapping[str, Tensor | None] = {}
        self._calls = [_Call(None, None, None)]
        self._outputs: list[tuple[weakref.ref[Tensor], Tensor | None]] = []
        self._states: list[tuple[weakref.ref[Tensor], Tensor | None]] = []

    def begin(self, batch: Any) -> None:
        """To be called before each forward pass.

        Without ``mask_fn``, each part's own ``attention_mask`` decides, and outside of all parts
        (a model that is none of transformers') that of the batch. A decoder without one: the
        positions whose label is neither -100 nor padding; without labels, the tokens that are no
        padding.

        A mask that ``mask_fn`` gives stands in the place of the model's ``attention_mask``: of an
        encoder-decoder model that is the encoder's, and a mapping with ``attention_mask`` and
        ``decoder_attention_mask`` gives both. None: all tokens count.

        Raises:
            ValueError: for a mask of another shape or with values other than 0 and 1, or a mapping
                with other keys.
        """
        chosen = {}
        if self._mask_fn is not None:
            chosen = self._mask_fn(batch)
            if chosen is None:
                chosen = {_TOKENS: None, _DECODER: None}
            elif isinstance(chosen, Tensor):
                chosen = {_TOKENS: chosen}
        unknown = sorted(chosen.keys() - {_TOKENS, _DECODER})
        if unknown:
            raise ValueError(
                f"mask_fn gives masks under {_TOKENS!r} and {_DECODER!r}, got {unknown[0]!r}"
            )
        self._chosen = {name: _checked(mask) for name, mask in chosen.items()}
        outside = self._chosen.get(_TOKENS, _checked(default_mask(batch)))
        self._calls = [_Call(None, outside, outside)]
        self._outputs.clear()
        self._states.clear()

    def of(self, x: Tensor) -> Tensor | None:
        """The mask of what a layer reads, (batch, tokens), true where a token counts.

        None where all do.
        """
        for reference, mask in self._states:
            states = reference()
            if states is not None and _same_memory(x, states):
                return mask
        return self._calls[-1].latest

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow the model's parts within the block, through hooks."""
        handles = []
        for part in self._parts:
            handles.append(part.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(part.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _arguments(part, args, kwargs)
        mask = given.get(_TOKENS)
        labels = given.get("labels")
        labels = self._calls[-1].labels if labels is None else labels
        states = given.get("encoder_hidden_states")
        reads_states = isinstance(states, Tensor)
        if reads_states:
            of_states = given.get("encoder_attention_mask")
            self._states.append((weakref.ref(states), self._mask_of_states(states, of_states)))
        if reads_states and part in self._decoders:
            own = self._mask_of_decoder(part, mask, labels, given.get("input_ids"))
        else:
            own = self._mask_of_part(part, mask)
        self._calls.append(_Call(part, own, own, mask, labels))

    def _leave(self, part: Any, _args: Any, output: Any) -> None:
        latest = self._calls[-1].latest
        while len(self._calls) > 1 and self._calls.pop().part is not part:
            pass
        self._calls[-1].latest = latest
        first = output if isinstance(output, Tensor) else _first(output)
        if isinstance(first, Tensor):
            self._outputs.append((weakref.ref(first), latest))

    def _mask_of_part(self, part: nn.Module, mask: Any) -> Tensor | None:
        around = self._calls[-1]
        if _is_mask(mask):
            return self._instead_of(mask)
        if mask is not None:  # one that is expanded already, by the call around
            return around.mask
        if around.part is None:
            other_input = _main_input(part) != "input_ids" and self._mask_fn is None
            return None if other_input else around.mask
        alike = around.given is None and _main_input(around.part) == _main_input(part)
        return around.mask if alike else None

    def _mask_of_decoder(
        self, part: PreTrainedModel, mask: Any, labels: Any, ids: Any
    ) -> Tensor | None:
        if _DECODER in self._chosen:
            return self._chosen[_DECODER]
        if _is_mask(mask):
            return _checked(mask)
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            ids = None
        padding = _padding_token(part)
        fits = isinstance(labels, Tensor) and labels.ndim == 2
        if fits and (ids is None or labels.shape == ids.shape):
            counts = labels != _IGNORED_LABEL
            return _checked(counts if padding is None else counts & (labels != padding))
        if ids is None or padding is None:
            return None
        counts = ids != padding
        counts[:, 0] = True  # some decoders start from the padding token
        return _checked(counts)

    def _mask_of_states(self, states: Tensor, mask: Any) -> Tensor | None:
        if _is_mask(mask):
            return self._instead_of(mask)
        for reference, known in self._outputs:
            if reference() is states:
                return known
        return None

    def _instead_of(self, mask: Tensor) -> Tensor | None:
        """What ``mask_fn`` gave, if it is for the tokens of this mask."""
        outermost = self._calls[1].given if len(self._calls) > 1 else mask
        if _TOKENS in self._chosen and _alike(mask, outermost):
            return self._chosen[_TOKENS]
        return _checked(mask)


def _main_input(part: nn.Module) -> str:
    """The name of what a part reads."""
    if isinstance(part, PreTrainedModel):
        return part.main_input_name
    return next(iter(_parameters(part)), "")


def _is_tower(module: nn.Module) -> bool:
    """Whether a module reads texts or images by itself: transformers 4 has towers that are no
    models.
    """
    names = _parameters(module)
    first = next(iter(names), "")
    return first in _NO_TOKENS or (first == "input_ids" and _TOKENS in names)


def _parameters(module: nn.Module) -> Iterable[str]:
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # of what is not written in Python
        return ()


def _parts_of_decoder(part: nn.Module) -> list[nn.Module]:
    if not isinstance(part, PreTrainedModel) or not hasattr(part, "get_decoder"):
        return []
    decoder = part.get_decoder() if getattr(part.config, "is_encoder_decoder", False) else None
    return list(decoder.modules()) if isinstance(decoder, nn.Module) and decoder is not part else []


def _padding_token(part: PreTrainedModel) -> int | None:
    """The token that is nothing but padding; None where it ends texts as well."""
    padding = getattr(part.config, "pad_token_id", None)
    ends = getattr(part.config, "eos_token_id", None)
    return None if padding in (ends if isinstance(ends, list) else [ends]) else padding


def _arguments(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """By name, what a part is called with."""
    names = list(inspect.signature(part.forward).parameters) if args else []
    return dict(zip(names, args, strict=False)) | kwargs


def _first(output: Any) -> Any:
    values = output.values() if isinstance(output, Mapping) else output
    return next(iter(values), None) if isinstance(output, (Mapping, tuple, list)) else None


def _is_mask(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2 and _zeros_and_ones(mask)


def _zeros_and_ones(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())


def _checked(mask: Tensor | None) -> Tensor | None:
    """The mask as booleans; None where it leaves nothing out, so that nothing is copied."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(f"a padding mask is (batch, tokens), got shape {tuple(mask.shape)}")
    if not _zeros_and_ones(mask):
        raise ValueError(
            "a padding mask holds 1 where a token counts and 0 where it is padding, got values "
            f"from {mask.min().item():g} to {mask.max().item():g}"
        )
    mask = mask.bool()
    return None if mask.all() else mask


def _alike(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.shape == b.shape
        and bool((a.bool() == b.to(a.device).bool()).all())
    )


def _same_memory(x: Tensor, other: Tensor) -> bool:
    return x is other or (x.data_ptr() == other.data_ptr() and x.numel() == other.numel())
