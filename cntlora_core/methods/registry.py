"""Every method by its name; what lists or offers methods reads this.

A new one is a record in ``CNTLORA_METHODS`` or ``PEFT_METHODS``, and a planner in its own module.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType

from cntlora_core.methods.base import Method
from cntlora_core.methods.baselines import PEFT_METHODS, later, pissa_with_iterations
from cntlora_core.methods.cntlora import CNTLORA_METHODS

METHODS: Mapping[str, Method] = MappingProxyType(
    {method.name: method for method in (*CNTLORA_METHODS, *PEFT_METHODS)}
)
"""All methods, in the order in which they are shown. ``pissa_niter_N`` stands for N of 1 to 999."""

FROM_LORA = Method(
    name="from_lora",
    description="Goes on from a LoRA file: its factors, ranks and scales",
    paper="",
    needs="nothing",
    rewrites_base=False,
    b_initialized_to_zero=False,
    preserves_output=False,
    plan=later("from_lora", "plan_from_lora"),
)
"""Not in `METHODS`, since it needs a file besides its name."""


def get_method(name: str) -> Method:
    """The method of that name; ``pissa_niter_N`` for N iterations, 1 to 999; or ``from_lora``.

    Raises:
        ValueError: listing the names that there are.
    """
    if name in METHODS:
        return METHODS[name]
    if name == FROM_LORA.name:
        return FROM_LORA
    iterations = re.fullmatch(r"pissa_niter_([1-9][0-9]{0,2})", name)
    if iterations:
        return pissa_with_iterations(int(iterations[1]))
    close = difflib.get_close_matches(name.replace("-", "_").lower(), METHODS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"there is no method {name!r}.{hint} The methods are {', '.join(METHODS)}; "
        "pissa_niter_N takes 1 to 999 iterations"
    )


def image_file_methods() -> tuple[str, ...]:
    """Names of the methods whose result a file for image tools can hold."""
    return tuple(name for name, method in METHODS.items() if method.image_file is not None)
