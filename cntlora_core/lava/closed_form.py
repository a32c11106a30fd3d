"""CNTLoRA's deltas, converted to LAVA's factors.

The closed form of a convolution is that of its kernel as a matrix (c_out, c_in kh kw), from the
second moment of its unfolded input. Its delta has few singular directions, but each of them is any
(c_in, kh, kw) kernel. LAVA's terms are products of vectors: what they can hold of the delta is
found by alternating least squares, and what they cannot is reported. A matrix is converted exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from cntlora_core.closed_form.factorization import Factors, seeded_generator
from cntlora_core.config import CNTLoRAConfig
from cntlora_core.initialization.plan import AdapterPlan
from cntlora_core.lava.config import LavaConfig
from cntlora_core.lava.cp import decompose
from cntlora_core.lava.factors import LavaFactors, LavaPlan, fill_rank, plain_factors
from cntlora_core.lava.layer import weight_shape
from cntlora_core.layers.attachment import AttachmentPoint, attachment_point
from cntlora_core.layers.unfolding import unfolded_width
from cntlora_core.runtime.thread_pool import map_in_threads

_PLAIN_STREAM = 1_000_000  # streams of random numbers that no closed-form initialisation draws from


def closed_form_points(
    modules: Mapping[str, nn.Module], config: CNTLoRAConfig
) -> tuple[list[AttachmentPoint], dict[str, str]]:
    """The modules that a closed form is known for, and why the others are initialised plainly.

    Args:
        modules: All modules that get an adapter, by name.
        config: Its ``max_unfolded_width`` decides which convolutions are too wide.
    """
    points, plain = [], {}
    for name, module in modules.items():
        if isinstance(module, nn.Conv1d):
            plain[name] = "a one-dimensional convolution"
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            plain[name] = f"a convolution in {module.groups} groups"
        elif isinstance(module, nn.Conv2d) and unfolded_width(module) > config.max_unfolded_width:
            plain[name] = (
                f"{unfolded_width(module)} unfolded features, more than max_unfolded_width"
                f"={config.max_unfolded_width}"
            )
        else:
            points.append(attachment_point(name, module))
    return points, plain


def lava_plan(
    modules: Mapping[str, nn.Module],
    closed_form: AdapterPlan,
    lava_config: LavaConfig,
    *,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    split: float,
    seed: int,
) -> LavaPlan:
    """LAVA's initialisation of every module: the closed form's delta, or a plain one without.

    Args:
        modules: All modules that get an adapter, by name, in the model's order.
        closed_form: The closed form's plan for some of them.
        lava_config: Where the orthogonality term acts on U, the initialisation has orthonormal
            columns there, and V carries the sizes.
        ranks: Rank of each module; a term is added, plain, where the closed form gives fewer.
        scalings: alpha / r of each module.
        split: Fraction of the sizes, as an exponent, that goes to U; without the term on U only.
        seed: Seed of what is random.
    """
    orthonormal = lava_config.orthogonality > 0 and "U" in lava_config.orthogonal_factors

    def factors_of(numbered: tuple[int, str]) -> LavaFactors:
        number, name = numbered
        shape = weight_shape(modules[name])
        generator = seeded_generator(seed, _PLAIN_STREAM + number)
        known = closed_form.factors.get(name)
        if known is None:
            return plain_factors(shape, ranks[name], scalings[name], generator)
        return to_lava_factors(known, shape, ranks[name], orthonormal, split, generator)

    names = list(modules)
    factors = map_in_threads(factors_of, list(enumerate(names)))
    return LavaPlan(dict(zip(names, factors, strict=True)), closed_form.rewrites_base)


def to_lava_factors(
    known: Factors,
    shape: Sequence[int],
    rank: int,
    orthonormal: bool,
    split: float,
    generator: torch.Generator,
) -> LavaFactors:
    """The terms nearest to one delta.

    Args:
        known: The closed form's factors; directions that were filled in are left out.
        shape: The weight's shape.
        rank: How many terms.
        orthonormal: Keep U's columns orthonormal; terms beyond the delta's own rank are plain.
        split: See :func:`lava_plan`.
        generator: For plain terms.
    """
    supported = known.rank - known.filled
    left, right = known.up[:, :supported], known.down[:supported]
    if not supported or not (left.any() and right.any()):
        return fill_rank(_empty(shape, known.scaling), rank, generator)
    exact = orthonormal or len(shape) == 2
    terms = min(rank, supported) if exact else rank
    right = right.reshape(supported, *shape[1:])
    found = decompose(left, right, terms, orthonormal=orthonormal)
    u, v, *spatial = found.factors
    if not orthonormal:
        sizes = v.norm(dim=0).clamp_min(1e-300)
        u, v = u * sizes**split, v / sizes**split
    factors = LavaFactors(
        u.float().contiguous(),
        v.float().contiguous(),
        tuple(factor.float().contiguous() for factor in spatial),
        known.scaling,
        error=found.error,
        size=float((known.scaling * (known.up.double() @ known.down.double())).norm()),
    )
    return fill_rank(factors, rank, generator)


def _empty(shape: Sequence[int], scaling: float) -> LavaFactors:
    u, v, *spatial = (torch.zeros(n, 0) for n in shape)
    return LavaFactors(u, v, tuple(spatial), scaling)
