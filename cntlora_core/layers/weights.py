"""The weights of linear maps as (d_out, d_in) matrices: read whatever they are stored as, rewritten
only where that is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_BITSANDBYTES = {"Params4bit": "4-bit", "Int8Params": "8-bit"}


def weight_matrix(name: str, module: nn.Module) -> Tensor:
    """A module's weight as a (d_out, d_in) float32 matrix; of a convolution, d_in is unfolded.

    Quantised weights of bitsandbytes and torchao are dequantised into a copy.

    Raises:
        TypeError: if the weight has no values that can be read, saying what to load instead.
    """
    check_readable(name, module)
    if quantised_as(module) is None:
        weight = module.weight
    else:
        try:
            weight = _dequantised(module)
        except NotImplementedError as error:
            raise TypeError(
                f"the weight of {name!r} is {quantised_as(module)}, which cannot be turned back "
                "into numbers; load the base model in a floating-point type"
            ) from error
    assert isinstance(weight, Tensor)
    weight = weight.detach().float().flatten(1)
    return weight.T if isinstance(module, Conv1D) else weight


def check_readable(name: str, module: nn.Module) -> None:
    """Refuse a weight whose values cannot be read.

    Raises:
        TypeError: saying why, and what to load instead.
    """
    why_not = _why_not_readable(module)
    if why_not:
        raise TypeError(
            f"the weight of {name!r} cannot be read: {why_not}. Load the base model in a "
            "floating-point type, or leave the layer out of target_modules"
        )


def quantised_as(module: nn.Module) -> str | None:
    """How a readable quantised weight is stored, in words; None for a floating-point one.

    Told by the names of classes, so that neither library need be installed.
    """
    kind = type(getattr(module, "weight", None))
    if kind.__module__.startswith("torchao."):
        return f"quantised by torchao ({kind.__name__})"
    packed = kind.__name__ in _BITSANDBYTES
    if packed and not torch.is_floating_point(module.weight):  # pyright: ignore[reportArgumentType]
        return f"quantised by bitsandbytes ({_BITSANDBYTES[kind.__name__]})"
    return None


def _dequantised(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    if type(weight).__name__ in _BITSANDBYTES:
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            # A forward pass in eval mode has laid the weight out anew for CPUs with AVX-512, which
            # dequantising takes no notice of. Asking for a state dict lays it back.
            module.state_dict()
        # Not peft's dequantize_module_weight: on the CPU that puts a new weight into the module,
        # without the scales that its first forward pass needs.
        return dequantize_bnb_weight(weight, state=getattr(module, "state", None))
    return weight.dequantize()


def _why_not_readable(module: nn.Module) -> str | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return f"{type(module).__name__} keeps no weight tensor"
    if weight.is_meta:
        return "it is on the meta device, its values are elsewhere (offloaded?)"
    if quantised_as(module) is not None:
        return None
    if not weight.is_floating_point() or weight.itemsize < 2:
        return f"it is stored as {weight.dtype}, whose scales only its own layer knows"
    if weight.numel() == 0:
        return "it is empty here, its values are on other processes"
    return None


def check_rewritable(root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Refuse to rewrite weights where that would be inexact or change something else.

    Args:
        root: The whole model, which may use a module's weight elsewhere too.
        modules: The modules whose weights are to be rewritten, by name.

    Raises:
        ValueError: naming the module, and offering ``preserve_output=False``.
    """
    users: dict[int, list[tuple[str, Tensor]]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None and (place := _storage_of(parameter)):
                users.setdefault(place, []).append((path, parameter))
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        why_not = quantised_as(module)
        if why_not is not None:
            why_not = f"it is {why_not}, and would be rounded anew"
        elif not isinstance(module._parameters.get("weight"), nn.Parameter):
            why_not = "it is computed from other parameters at each call"
        else:
            assert isinstance(weight, nn.Parameter)
            near = users.get(_storage_of(weight), ())
            tied = sorted(path for path, other in near if _share_values(weight, other))
            if len(tied) > 1:
                why_not = f"it is tied, {' and '.join(tied)} use it"
        if why_not is not None:
            raise ValueError(
                f"preserve_output=True rewrites the frozen weight of {name!r}, but {why_not}: use "
                "preserve_output=False, which starts the model at W + dW and leaves W as it is"
            )


def _storage_of(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 for one that has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of a wrapper, quantised for example
        return 0


def _share_values(one: Tensor, other: Tensor) -> bool:
    """Whether a write to one tensor changes another that lies in the same storage."""
    if one is other:
        return True
    (start, end), (other_start, other_end) = _bytes_of(one), _bytes_of(other)
    if end <= other_start or other_end <= start:
        return False  # neighbours in one buffer, as in a checkpoint that is mapped into memory
    if one.dtype != other.dtype:
        return True
    # Between strides there may be room for another tensor: look at each value.
    first = min(one.storage_offset(), other.storage_offset())
    written = torch.zeros(
        (max(end, other_end) - min(start, other_start)) // one.itemsize, dtype=torch.bool
    )
    written.as_strided(one.shape, one.stride(), one.storage_offset() - first).fill_(True)
    return bool(
        written.as_strided(other.shape, other.stride(), other.storage_offset() - first).any()
    )


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """From which byte of its storage to which a tensor reaches."""
    reach = 1 + sum(
        (n - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start = int(tensor.storage_offset()) * tensor.itemsize
    return start, start + (reach * tensor.itemsize if tensor.numel() else 0)


@torch.no_grad()
def subtract_from_weight(module: nn.Module, up: Tensor, down: Tensor, scaling: float) -> float:
    """Write ``W - scaling * up @ down`` into a module's weight, in the weight's own dtype.

    Args:
        module: The base module (not an adapter wrapper).
        up: (d_out, r) float32.
        down: (r, d_in) float32; of a convolution, d_in is unfolded.
        scaling: What their product is multiplied by.

    Returns:
        The Frobenius norm of what rounding to the weight's dtype lost, relative to the weight's.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    up, down = up.to(weight.device), down.to(weight.device)
    left, right = (down.T, up.T) if isinstance(module, Conv1D) else (up, down)
    if weight.dtype.itemsize >= up.dtype.itemsize and weight.is_contiguous():
        matrix = weight.view(len(left), -1)
        matrix.addmm_(left.to(weight.dtype), right.to(weight.dtype), alpha=-scaling)
        return 0.0
    before = weight.float()
    wanted = before - (scaling * (left @ right)).reshape(weight.shape)
    weight.copy_(wanted)
    lost = (weight.float() - wanted).norm()
    return float(lost / before.norm().clamp_min(torch.finfo(torch.float32).tiny))
