"""Training dynamics of transformers' Trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cntlora_core.dynamics.groups import GroupFn, group_of
from cntlora_core.dynamics.log import FILE_NAME, read_dynamics
from cntlora_core.dynamics.recorder import DynamicsRecorder


class DynamicsCallback(TrainerCallback):
    """Records what gradients, updates and activations do while a Trainer trains.

    ``dynamics.jsonl`` in the Trainer's folder grows with every step, as
    :class:`.DynamicsRecorder` describes, and ``dynamics.png`` beside it is plotted at the end. A
    run that resumes goes on with the file.

    The loss is that of the model's output, summed over a step as the Trainer does; where the output
    has none, there is none in the file. Of several processes the first records what it computes
    itself. There, and in float16, the gradients' norms are those after clipping.

    Args:
        path: The file, in place of ``dynamics.jsonl`` in ``output_dir``.
        every: Steps between measurements of the second moments.
        image_token: Of ``input_ids``; by default what the model's configuration says.
        group_of: Names the group of a parameter by its path.
        plot: Whether to plot at the end.

    Example:
        >>> trainer = Trainer(model=model, args=args, train_dataset=data,
        ...     callbacks=[DynamicsCallback(every=10)])
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        every: int = 10,
        image_token: int | None = None,
        group_of: GroupFn = group_of,
        plot: bool = True,
    ) -> None:
        self.path, self.every, self.plot = path, every, plot
        self.image_token, self.group_of = image_token, group_of
        self._recorder: DynamicsRecorder | None = None
        self._handles: list[Any] = []
        self._losses: list[tuple[Tensor, bool]] = []
        self._norms: dict[int, Tensor] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_kwargs: Any,
    ) -> None:
        """Begin to record, or go on where the run was left."""
        self.close()
        if not state.is_world_process_zero or model is None:
            return
        trained: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self._recorder = recorder = DynamicsRecorder(
            {"": trained},
            self.path or Path(str(args.output_dir)) / FILE_NAME,
            every=self.every,
            step=state.global_step,
            image_token=_image_token(trained) if self.image_token is None else self.image_token,
            group_of=self.group_of,
        )
        self._handles.append(trained.register_forward_hook(self._see_output, with_kwargs=True))
        # Before a callback is told of them, the Trainer clips the gradients.
        self._norms.clear()
        if args.world_size == 1 and not args.fp16:
            for i, parameter in enumerate(recorder.parameters):
                see = partial(self._see_gradient, i)
                self._handles.append(parameter.register_post_accumulate_grad_hook(see))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Begin a step."""
        self._losses.clear()
        self._norms.clear()
        if self._recorder is not None:
            self._recorder.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Take the gradients, and the weights before the step."""
        if self._recorder is not None:
            count = len(self._recorder.parameters)
            norms = [self._norms.get(i) for i in range(count)] if self._norms else None
            self._recorder.gradients(norms)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Take the weights after the step."""
        if self._recorder is not None:
            whole = args.world_size if args.average_tokens_across_devices else 1
            shares = [
                loss * whole if scaled else loss / len(self._losses)
                for loss, scaled in self._losses
            ]
            self._recorder.end_step(torch.stack(shares).sum() if shares else None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Write what is left, and plot it."""
        recorder = self._recorder
        self.close()
        if recorder is not None and self.plot:
            from cntlora_core.dynamics.plots import plot_dynamics

            records = read_dynamics(recorder.path)
            plot_dynamics({recorder.path.parent.name: records}, recorder.path.with_suffix(".png"))

    def close(self) -> None:
        """Write what is left, and take all hooks off the model; for a training that failed."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = None

    def _see_output(
        self, model: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        loss = output.get("loss") if isinstance(output, dict) else None
        if model.training and isinstance(loss, Tensor):
            scaled = kwargs.get("num_items_in_batch") is not None  # to the whole step's tokens
            self._losses.append((loss.detach().float().mean(), scaled))

    @torch.no_grad()
    def _see_gradient(self, index: int, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._norms[index] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)


def _image_token(model: nn.Module) -> int | None:
    """The token that stands for an image, by a model's configuration."""
    config = getattr(model, "config", None)
    for name in ("image_token_id", "image_token_index"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    return None
