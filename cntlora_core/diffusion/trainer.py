"""The DreamBooth training loop: a planned adapter in, a trained one out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cntlora_core.diffusion.adapters import (
    Plan,
    extra_loss,
    inject_plan,
    multiply_in_base_precision,
    trained_parameters,
)
from cntlora_core.diffusion.batch_loss import BatchLoss
from cntlora_core.diffusion.batches import (
    Batch,
    TrainingData,
    draw_batch,
    require_shareable,
    share_of,
)
from cntlora_core.diffusion.family import UNET, Family, Networks
from cntlora_core.diffusion.history import MEASURED, STEPS_BETWEEN_LOOKS, History
from cntlora_core.diffusion.memory_use import MemoryUse, checkpoint_gradients, with_less_memory
from cntlora_core.diffusion.optimizers import (
    build_optimizer,
    build_schedule,
    decay_towards,
    effective_rate,
    optimizer_state,
    restore_optimizer,
)
from cntlora_core.diffusion.settings import AdapterSettings, TrainingSettings
from cntlora_core.diffusion.state import TrainingState, all_finite
from cntlora_core.dynamics.recorder import DynamicsRecorder
from cntlora_core.runtime.precision import tensor_cores
from cntlora_core.runtime.processes import Processes
from cntlora_core.runtime.progress import Reporter, silent


class NonFiniteLossError(FloatingPointError):
    """The loss or its gradient stopped being a finite number."""


class SubjectTrainer:
    """Trains the adapter of a denoiser and, if planned, of its text encoders.

    All randomness comes from ``seed`` and the number of the step, so a run that goes on from a
    saved state is the run that was never interrupted.

    Under torch.distributed each process makes one, of the same settings, data and plan: it computes
    the gradients of its share of every batch, and they are summed. Where memory runs out, a step is
    done again in a way that needs less and computes the same.

    Attributes:
        step: Optimizer steps done.
        notes: What a person should know of the training: where memory ran out.
        parameters: The trained tensors, by ``<point>.down`` and ``<point>.up``; with LAVA by
            ``<point>.U`` and so on.
        largest_rounding: The most that a rewritten base weight lost by rounding to its data type,
            relative to its norm.

    Args:
        networks: The frozen denoiser and text encoders; they get the adapter, and their weights
            are rewritten if planned.
        family: What they are.
        noise_scheduler: The training noise schedule.
        plan: Where adapters go and how they are initialised.
        data: Encoded photos and class images.
        adapter: Adapter settings.
        training: Settings of the loop.
        prior_weight: Weight of the class images' loss.
        settings: Whatever identifies the run; stored in its state.
    """

    def __init__(
        self,
        networks: Networks,
        family: Family,
        noise_scheduler: Any,
        plan: Plan,
        data: TrainingData,
        *,
        adapter: AdapterSettings,
        training: TrainingSettings,
        prior_weight: float,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.networks, self.family, self.unet = networks, family, networks[UNET]
        self.plan, self.data, self.training = plan, data, training
        self.prior_weight = prior_weight if data.class_images is not None else 0.0
        self.step = 0
        self.notes: list[str] = []
        self._history = History()
        self._processes = Processes()
        require_shareable(training, self._processes.count)
        self._reporter: Reporter = silent
        self._recorder: DynamicsRecorder | None = None
        self._horizon = noise_scheduler.config["num_train_timesteps"]
        self._settings = settings or {}
        self._device = next(self.unet.parameters()).device
        self._dtype = next(self.unet.parameters()).dtype
        self._text_encoders = [networks[name] for name in family.text_encoders]
        self._look_every = 1 if self._device.type == "cpu" else STEPS_BETWEEN_LOOKS
        rounding = inject_plan(networks, adapter, plan)
        self.largest_rounding = max(rounding.values())
        if self._dtype != torch.float32:
            multiply_in_base_precision(networks)
        self._memory = MemoryUse(training.gradient_checkpointing)
        if training.gradient_checkpointing:
            checkpoint_gradients(self.unet, self._text_encoders)
        self.parameters = dict(trained_parameters(networks, plan))
        self._extra_loss: Callable[[], Tensor] | None = extra_loss(networks, plan)
        self._initial = (
            {p: p.detach().clone() for p in self.parameters.values()}
            if training.weight_decay
            else {}
        )
        self._text = [p for n, p in self.parameters.items() if not n.startswith(f"{UNET}.")]
        denoiser = [p for n, p in self.parameters.items() if n.startswith(f"{UNET}.")]
        self._batch_loss = BatchLoss(
            networks,
            family,
            noise_scheduler,
            prior_weight=self.prior_weight,
            min_snr_gamma=training.min_snr_gamma,
            trains_text=bool(self._text),
        )
        self.optimizer = build_optimizer(denoiser, self._text, training)
        self._lr_schedule = build_schedule(self.optimizer, training)
        self._scaler = torch.amp.GradScaler(  # pyright: ignore[reportPrivateImportUsage]
            self._device.type, enabled=self._dtype == torch.float16
        )
        self._sound = True

    @property
    def history(self) -> list[dict[str, float]]:
        """One record per step; on a GPU those of the last few may lack their numbers for now."""
        return self._history.records

    def run(
        self,
        *,
        reporter: Reporter = silent,
        state_path: Path | None = None,
        after_step: Callable[[int], None] | None = None,
        recorder: DynamicsRecorder | None = None,
    ) -> None:
        """Train to the last step.

        Args:
            reporter: Told of each step, on a GPU of several at once; what it raises ends the run
                between two steps.
            state_path: Where states go, every ``save_every`` steps and when the run is ended early.
            after_step: Called with the number of steps done, for samples and the like.
            recorder: Records the dynamics of each step; closed at the end.

        Raises:
            NonFiniteLossError: naming the step; the last good state has been kept.
        """
        self.unet.train()
        for text_encoder in self._text_encoders:
            text_encoder.train(self._batch_loss.trains_text)
        self._reporter, self._recorder = reporter, recorder
        total, every = self.training.steps, self.training.save_every
        saved_at = self.step if state_path is not None and state_path.is_file() else -1

        def save() -> None:
            nonlocal saved_at
            if state_path is not None and saved_at != self.step:
                self.state().save(state_path)
                saved_at = self.step

        def between_steps(loss: Tensor) -> None:
            if recorder is not None:
                recorder.end_step(loss)
            done: list[tuple[int, dict[str, float]]] = []
            due = self.step % every == 0
            if due or self.step % self._look_every == 0 or self.step == total:
                done = self._look()
            if after_step is not None:
                after_step(self.step)
            if due:
                save()
            for step, record in done:
                reporter("training", step, total, record)

        try:
            while self.step < total:
                loss = self._one_step()
                self._processes.run(partial(between_steps, loss), "saving and showing the training")
            self._processes.run(save, "saving the training")  # until something is made of it
        except BaseException as error:
            if self._sound and all_finite(self.parameters):
                save()
            if isinstance(error, NonFiniteLossError) and saved_at >= 0:
                raise NonFiniteLossError(
                    f"{error}; the state after step {saved_at} is kept in {state_path}"
                ) from error
            raise
        finally:
            self._recorder = None
            for network in self.networks.values():
                network.eval()
            if recorder is not None:
                recorder.close()

    def _one_step(self) -> Tensor:
        """One optimizer step; returns its loss, which is not fetched from the device."""
        self._history.begin_step()
        self._stop_text_encoder()
        if self._recorder is not None:
            self._recorder.begin_step()
        losses = self._processes.run(
            lambda: with_less_memory(self._gradients, self._use_less_memory), "training"
        )
        parameters = [p for p in self.parameters.values() if p.requires_grad]
        if self._processes.together:
            self._sum_over_processes(losses, parameters)
        self._scaler.unscale_(self.optimizer)
        if self._recorder is not None:
            self._recorder.gradients()
        limit = self.training.max_grad_norm
        norm = nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
        measured = torch.cat([losses, norm.detach().float().reshape(1)])
        if self._look_every == 1:
            self._require_finite(self.step + 1, measured.tolist())
        learning_rate = effective_rate(self.optimizer.param_groups[0])
        self._sound = False
        # A step that the scaler skips has no decay either.
        taken = torch.isfinite(norm) if self._scaler.is_enabled() else 1.0
        decay_towards(self._initial, self.optimizer, self.training.weight_decay, taken)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad()
        self._lr_schedule.step()
        self._history.add(measured, {"learning_rate": learning_rate})
        self.step += 1
        self._sound = True
        return losses[0]

    def _gradients(self) -> Tensor:
        """Gradients of this process's share of a step, and (3,) its part of the loss."""
        self.optimizer.zero_grad()
        accumulation, losses = self.training.gradient_accumulation, []
        with tensor_cores(self._device):
            for micro in range(accumulation):
                whole = self._batch(micro)
                for places in self._memory.parts(self._own_places(whole, micro)):
                    loss, *parts = self._loss(whole.part(places).to(self._device))
                    self._scaler.scale(loss / accumulation).backward()
                    losses.append(torch.stack([loss.detach(), *(p.detach() for p in parts)]))
            if self._extra_loss is not None and self._processes.first:
                loss = self._extra_loss()
                self._scaler.scale(loss).backward()
                losses.append(nn.functional.pad(loss.detach()[None] * accumulation, (0, 2)))
        return torch.stack(losses).sum(0) / accumulation

    def _own_places(self, batch: Batch, micro: int) -> list[int]:
        """The samples of a batch that are this process's: photos, and as many class images."""
        photos = share_of(self.training, micro, self._processes.rank, self._processes.count)
        firsts = range(0, len(batch), batch.instances)
        return [first + photo for first in firsts for photo in photos or ()]

    def _use_less_memory(self) -> bool:
        samples = len(self._own_places(self._batch(0), self._processes.rank))
        before = self._memory.checkpointing
        note = self._memory.lower(samples)
        if note is None:
            return False
        if not before:
            checkpoint_gradients(self.unet, self._text_encoders)
        self.optimizer.zero_grad()
        self.notes.append(f"memory ran out: step {self.step + 1} and all after it are done {note}")
        self._reporter("notes", 0, 0, {"note": self.notes[-1]})
        return True

    def _sum_over_processes(self, losses: Tensor, parameters: list[nn.Parameter]) -> None:
        """Sum the processes' shares of the losses and of the gradients, in place."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._processes.add_up_all([losses, *gradients])

    def _stop_text_encoder(self) -> None:
        """From their last step on the text encoders stay as they are, without gradients."""
        last = self.training.text_encoder_steps
        if self._batch_loss.trains_text and last is not None and self.step >= last:
            self._batch_loss.trains_text = False
            for text_encoder in self._text_encoders:
                text_encoder.eval()
            for parameter in self._text:
                parameter.requires_grad_(False)

    def _look(self) -> list[tuple[int, dict[str, float]]]:
        """Fetch the records of the steps since the last look; returns them with their numbers."""
        done = self._history.fetch()
        for step, record in done:
            self._require_finite(step, [record[name] for name in MEASURED])
            record["skipped"] = float(not math.isfinite(record["grad_norm"]))
            if record["skipped"]:
                record["grad_norm"] = 0.0
        return done

    def _require_finite(self, step: int, measured: Sequence[float]) -> None:
        """Raise if a loss is not finite, or a gradient that the scaler does not take care of."""
        loss, *parts, norm = measured
        # A float16 base overflows now and then; the scaler then skips the step and halves its
        # scale. A scale that has shrunk to nothing means that the gradient itself is bad.
        scaled = self._scaler.is_enabled() and self._scaler.get_scale() > 1.0
        bad = None
        if not all(map(math.isfinite, (loss, *parts))):
            bad = f"the loss of step {step} is {loss}"
        elif not math.isfinite(norm) and not scaled:
            bad = f"the gradient of step {step} has norm {norm}"
        if bad is not None:
            self._sound = step > self.step  # on a GPU it is found out later
            self.optimizer.zero_grad()
            raise NonFiniteLossError(
                f"{bad}: use a lower learning rate, or float32 or bfloat16 in place of float16"
            )

    def _batch(self, micro: int) -> Batch:
        return draw_batch(
            self.data,
            self.training,
            self.step,
            micro,
            with_class_images=self.prior_weight > 0,
            horizon=self._horizon,
        )

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return self._batch_loss(batch)

    def state(self) -> TrainingState:
        """What it takes to go on from here."""
        self._look()
        moments, optimizer = optimizer_state(self.optimizer, self.parameters)
        return TrainingState(
            step=self.step,
            plan=self.plan,
            parameters={n: p.detach() for n, p in self.parameters.items()},
            moments=moments,
            history=self.history,
            settings=self._settings,
            extra={
                "scaler": self._scaler.state_dict(),
                "optimizer": optimizer,
                "lr_schedule": self._lr_schedule.state_dict(),
                "memory": dataclasses.asdict(self._memory),
            },
        )

    @torch.no_grad()
    def restore(self, state: TrainingState) -> None:
        """Go back to a saved state of the same run."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state.parameters[name])
        restore_optimizer(self.optimizer, self.parameters, state.moments, state.extra["optimizer"])
        if self._scaler.is_enabled() and state.extra.get("scaler"):
            self._scaler.load_state_dict(state.extra["scaler"])
        self.step, self._history = state.step, History(state.history)
        self._lr_schedule.load_state_dict(state.extra["lr_schedule"])
        for group, learning_rate in zip(
            self.optimizer.param_groups, self._lr_schedule.get_last_lr(), strict=True
        ):
            group["lr"] = learning_rate
        found = MemoryUse(**state.extra.get("memory", {}))
        self._memory.at_once = found.at_once
        if found.checkpointing and not self._memory.checkpointing:
            self._memory.checkpointing = True
            checkpoint_gradients(self.unet, self._text_encoders)
