"""Records the dynamics of a training, step by step, without changing it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from cntlora_core.dynamics.groups import GroupFn, group_of, plain_name
from cntlora_core.dynamics.log import DynamicsLog, Record
from cntlora_core.dynamics.token_moments import TokenMoments

STEPS_BETWEEN_FETCHES = 10
"""How often what a GPU has measured is fetched and written; of a CPU it is after every step."""
_Key = tuple[str, ...]


class DynamicsRecorder:
    """Writes a line of JSON for each step of a training.

    Each has ``step``, ``loss`` and ``grad_norm``; by group of trained parameters ``grad_norms``
    (before clipping) and ``update_ratios``, the norm of what the step added to the weights that are
    trained over their norm before it; and at every ``every``-th step ``second_moments``, for each
    adapted layer the mean square of what it reads, over ``visual`` and ``text`` tokens, or ``all``
    of a model whose tokens are alike. Padding is left out. A number that is not finite is null.

    The weights that are trained are held in memory a second time.

    Args:
        networks: The models that are trained, by the prefix of their layers' names; "" for none.
        path: The file, see :class:`.DynamicsLog`.
        every: Steps between measurements of the second moments, the first step being measured.
        step: How many steps were done before.
        image_token: The token that stands for a part of an image in ``input_ids``; None for models
            without images.
        group_of: Names the group of a parameter by its path.

    Raises:
        ValueError: if nothing is trained, or ``every`` is below 1.

    Example:
        >>> with DynamicsRecorder({"": model}, "dynamics.jsonl") as recorder:
        ...     for batch in batches:
        ...         recorder.begin_step()
        ...         loss = model(**batch).loss
        ...         loss.backward()
        ...         recorder.gradients()
        ...         optimizer.step()
        ...         recorder.end_step(loss)
        ...         optimizer.zero_grad()
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        path: str | Path,
        *,
        every: int = 10,
        step: int = 0,
        image_token: int | None = None,
        group_of: GroupFn = group_of,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        groups: dict[str, list[nn.Parameter]] = {}
        for prefix, network in networks.items():
            for name, parameter in network.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault(group_of(plain_name(prefix, name)), []).append(parameter)
        if not groups:
            raise ValueError("no parameter of the model is trained")
        self.every, self.step = every, step
        self.parameters = [p for parameters in groups.values() for p in parameters]
        self._sizes = [len(parameters) for parameters in groups.values()]
        self._groups = list(groups)
        self._device = self.parameters[0].device
        self._moments = TokenMoments(networks, image_token, group_of)
        self._before: list[Tensor] = []
        self._values: dict[_Key, Tensor] = {}
        self._pending: list[tuple[int, list[_Key], Tensor]] = []
        self._fetch_every = 1 if self._device.type == "cpu" else STEPS_BETWEEN_FETCHES
        self._log = DynamicsLog(path, step)

    @property
    def path(self) -> Path:
        return self._log.path

    def begin_step(self) -> None:
        """To be called before the first forward pass of a step."""
        self._values = {}
        if self.step % self.every == 0:
            self._moments.attach()

    @torch.no_grad()
    def gradients(self, norms: Sequence[Tensor | None] | None = None) -> None:
        """To be called when the gradients of a step are complete, before the optimizer's step.

        Args:
            norms: Their norms as they were before, in the order of ``parameters``; None where a
                parameter has no gradient. By default they are those of the gradients now.
        """
        none = torch.zeros((), device=self._device)
        if norms is None:
            gradients = [none if p.grad is None else p.grad for p in self.parameters]
            norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        of_groups = self._by_group([none if norm is None else norm for norm in norms])
        self._values["grad_norm",] = torch.linalg.vector_norm(of_groups)
        self._note("grad_norms", of_groups)
        self._before = self._before or [torch.empty_like(p) for p in self.parameters]
        torch._foreach_copy_(self._before, [p.detach() for p in self.parameters])

    @torch.no_grad()
    def end_step(self, loss: Tensor | None) -> None:
        """To be called after the optimizer's step.

        Args:
            loss: Of the step, a scalar; None if it is not known.
        """
        weights = self._by_group(torch._foreach_norm(self._before, 2, dtype=torch.float32))
        torch._foreach_sub_(self._before, [p.detach() for p in self.parameters])
        updates = self._by_group(torch._foreach_norm(self._before, 2, dtype=torch.float32))
        self._note("update_ratios", updates / weights)
        if loss is not None:
            self._values = {("loss",): loss, **self._values}
        for (layer, kind), moment in self._moments.detach().items():
            self._values["second_moments", layer, kind] = moment
        self.step += 1
        row = torch.stack([self._scalar(value) for value in self._values.values()])
        self._pending.append((self.step, list(self._values), row))
        if self.step % self._fetch_every == 0:
            self.flush()

    def flush(self) -> None:
        """Fetch what was measured since the last time, and write it."""
        if not self._pending:
            return
        values = iter(torch.cat([row for _, _, row in self._pending]).tolist())
        records = [
            _record(step, {key: next(values) for key in keys}) for step, keys, _ in self._pending
        ]
        self._pending.clear()
        self._log.append(records)

    def close(self) -> None:
        """Write what is left; no hook stays on the models."""
        self._moments.detach()
        self._before = []
        self.flush()

    def __enter__(self) -> DynamicsRecorder:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _by_group(self, norms: Sequence[Tensor]) -> Tensor:
        """(groups,) norms, of those of the parameters."""
        all_norms = torch.stack([norm.to(self._device) for norm in norms])
        return torch.stack([torch.linalg.vector_norm(n) for n in all_norms.split(self._sizes)])

    def _note(self, what: str, of_groups: Tensor) -> None:
        self._values |= {(what, g): v for g, v in zip(self._groups, of_groups, strict=True)}

    def _scalar(self, value: Tensor) -> Tensor:
        return value.detach().to(self._device, torch.float32).reshape(())


def _record(step: int, values: Mapping[_Key, float]) -> Record:
    """Values by the keys that lead to them, as nested dictionaries; kinds of no tokens left out."""
    record: dict[str, Any] = {"step": step}
    for key, value in values.items():
        if math.isnan(value) and key[0] == "second_moments":
            continue
        inner = record
        for word in key[:-1]:
            inner = inner.setdefault(word, {})
        inner[key[-1]] = value if math.isfinite(value) else None
    return record
