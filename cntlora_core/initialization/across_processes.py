"""One plan for all processes of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable

from cntlora_core.closed_form.factorization import Factors
from cntlora_core.initialization.plan import AdapterPlan
from cntlora_core.runtime.processes import Processes, attempt


def plan_from_first(make: Callable[[], AdapterPlan], processes: Processes) -> AdapterPlan:
    """Make a plan on the first process and hand it to all, so that all start bit for bit alike.

    Raises:
        Exception: what ``make`` raised, on the first process; RuntimeError on the others.
    """
    if not processes.together:
        return make()
    plan, error = attempt(make) if processes.first else (None, None)
    processes.raise_together(error, "solving for the start")
    header = plan and (
        plan.rewrites_base,
        plan.solver_error,
        [(n, f.down.shape, f.up.shape, f.scaling, f.filled) for n, f in plan.factors.items()],
    )
    header = processes.gather(header)[0]
    assert header is not None
    rewrites_base, solver_error, described = header
    factors = {}
    for name, down_shape, up_shape, scaling, filled in described:
        own = plan.factors[name] if plan is not None else None
        down = processes.from_first(own.down if own else None, down_shape)
        up = processes.from_first(own.up if own else None, up_shape)
        factors[name] = Factors(down, up, scaling, filled)
    return AdapterPlan(factors, rewrites_base, solver_error)
