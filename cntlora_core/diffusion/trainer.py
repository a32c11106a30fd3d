"""The DreamBooth training loop: a planned adapter in, a trained one out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cntlora_core.diffusion.adapters import (
    Plan,
    extra_loss,
    inject_plan,
    trained_parameters,
)
from cntlora_core.diffusion.batches import Batch, SameShape, TrainingData, draw_batch
from cntlora_core.diffusion.family import UNET, Conditioning, Family, Networks, predict
from cntlora_core.diffusion.objective import (
    dreambooth_loss,
    min_snr_weights,
    sample_errors,
    training_target,
)
from cntlora_core.diffusion.optimizers import (
    build_optimizer,
    build_schedule,
    effective_rate,
    optimizer_state,
    restore_optimizer,
)
from cntlora_core.diffusion.settings import AdapterSettings, TrainingSettings
from cntlora_core.diffusion.state import TrainingState, all_finite
from cntlora_core.runtime.progress import Reporter, silent


class NonFiniteLossError(FloatingPointError):
    """The loss or its gradient stopped being a finite number."""


class SubjectTrainer:
    """Trains the adapter of a denoiser and, if planned, of its text encoders.

    All randomness comes from ``seed`` and the number of the step, so a run that goes on from a
    saved state is the run that was never interrupted.

    Attributes:
        step: Optimizer steps done.
        history: One record per step.
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
        self.history: list[dict[str, float]] = []
        self._scheduler = noise_scheduler
        self._settings = settings or {}
        self._device = next(self.unet.parameters()).device
        self._dtype = next(self.unet.parameters()).dtype
        self._text_encoders = [networks[name] for name in family.text_encoders]
        rounding = inject_plan(networks, adapter, plan)
        self.largest_rounding = max(rounding.values())
        if training.gradient_checkpointing:
            _checkpoint_gradients(self.unet, self._text_encoders)
        self.parameters = dict(trained_parameters(networks, plan))
        self._extra_loss: Callable[[], Tensor] | None = extra_loss(networks, plan)
        self._initial = (
            {p: p.detach().clone() for p in self.parameters.values()}
            if training.weight_decay
            else {}
        )
        self._text = [p for n, p in self.parameters.items() if not n.startswith(f"{UNET}.")]
        self._trains_text = bool(self._text)
        denoiser = [p for n, p in self.parameters.items() if n.startswith(f"{UNET}.")]
        self.optimizer = build_optimizer(denoiser, self._text, training)
        self._lr_schedule = build_schedule(self.optimizer, training)
        self._scaler = torch.amp.GradScaler(  # pyright: ignore[reportPrivateImportUsage]
            self._device.type, enabled=self._dtype == torch.float16
        )
        self._between_steps = True
        self._fixed: dict[tuple[int, ...], Conditioning] = {}

    def run(
        self,
        *,
        reporter: Reporter = silent,
        state_path: Path | None = None,
        after_step: Callable[[int], None] | None = None,
    ) -> None:
        """Train to the last step.

        Args:
            reporter: Told after each step; what it raises ends the run between two steps.
            state_path: Where states go, every ``save_every`` steps and when the run is ended early.
            after_step: Called with the number of steps done, for samples and the like.

        Raises:
            NonFiniteLossError: naming the step; the last good state has been kept.
        """
        self.unet.train()
        for text_encoder in self._text_encoders:
            text_encoder.train(self._trains_text)
        total = self.training.steps
        saved_at = self.step if state_path is not None and state_path.is_file() else -1
        try:
            while self.step < total:
                record = self._one_step()
                self.history.append(record)
                if after_step is not None:
                    after_step(self.step)
                if state_path is not None and self.step % self.training.save_every == 0:
                    self.state().save(state_path)
                    saved_at = self.step
                reporter("training", self.step, total, record)
            if state_path is not None and saved_at != self.step:
                self.state().save(state_path)  # until the caller has made something of it
                saved_at = self.step
        except BaseException as error:
            good = self._between_steps and self.step != saved_at and all_finite(self.parameters)
            if state_path is not None and good:
                self.state().save(state_path)
                saved_at = self.step
            if isinstance(error, NonFiniteLossError) and saved_at >= 0:
                raise NonFiniteLossError(
                    f"{error}; the state after step {saved_at} is kept in {state_path}"
                ) from error
            raise
        finally:
            for network in self.networks.values():
                network.eval()

    def _one_step(self) -> dict[str, float]:
        started = time.perf_counter()
        self._stop_text_encoder()
        accumulation = self.training.gradient_accumulation
        sums = torch.zeros(3)
        for micro in range(accumulation):
            loss, *parts = self._loss(self._batch(micro))
            if (extra := self._extra_loss) is not None:
                loss = loss + extra()
            values = torch.stack([loss.detach(), *(p.detach() for p in parts)]).cpu()
            if not torch.isfinite(values).all():
                self.optimizer.zero_grad()
                raise NonFiniteLossError(
                    f"the loss of step {self.step + 1} is {values[0].item()}: use a lower learning "
                    "rate, or float32 or bfloat16 in place of float16"
                )
            sums += values / accumulation
            self._scaler.scale(loss / accumulation).backward()
        self._scaler.unscale_(self.optimizer)
        parameters = [p for p in self.parameters.values() if p.requires_grad]
        limit = self.training.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf")))
        finite = math.isfinite(norm)
        if not finite:
            self._forgive_or_raise(norm)
        self._between_steps = False
        if finite:
            self._decay()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        learning_rate = effective_rate(self.optimizer.param_groups[0])
        self.optimizer.zero_grad()
        self._lr_schedule.step()
        self.step += 1
        self._between_steps = True
        total, instance, prior = sums.tolist()
        return {
            "loss": total,
            "instance_loss": instance,
            "prior_loss": prior,
            "grad_norm": norm if finite else 0.0,
            "skipped": float(not finite),
            "learning_rate": learning_rate,
            "seconds": time.perf_counter() - started,
        }

    @torch.no_grad()
    def _decay(self) -> None:
        """AdamW's decoupled weight decay, towards the initialisation p0 in place of 0.

        ``p - learning_rate * weight_decay * (p - p0)``. Where the frozen weight became ``W - s B0
        A0``, a pull towards 0 would be one away from W.
        """
        for group in self.optimizer.param_groups if self._initial else ():
            for parameter in group["params"]:
                if parameter.requires_grad:
                    share = effective_rate(group) * self.training.weight_decay
                    parameter.lerp_(self._initial[parameter], share)

    def _stop_text_encoder(self) -> None:
        """From their last step on the text encoders stay as they are, without gradients."""
        last = self.training.text_encoder_steps
        if self._trains_text and last is not None and self.step >= last:
            self._trains_text = False
            for text_encoder in self._text_encoders:
                text_encoder.eval()
            for parameter in self._text:
                parameter.requires_grad_(False)

    def _forgive_or_raise(self, norm: float) -> None:
        # A float16 base overflows now and then; the scaler then skips the step and halves its
        # scale. A scale that has shrunk to nothing means that the gradient itself is bad.
        if self._scaler.is_enabled() and self._scaler.get_scale() > 1.0:
            return
        self.optimizer.zero_grad()
        raise NonFiniteLossError(
            f"the gradient of step {self.step + 1} has norm {norm}: use a lower learning rate, or "
            "float32 or bfloat16 in place of float16"
        )

    def _batch(self, micro: int) -> Batch:
        return draw_batch(
            self.data,
            self.training,
            self.step,
            micro,
            with_class_images=self.prior_weight > 0,
            horizon=self._scheduler.config["num_train_timesteps"],
            device=self._device,
        )

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        conditioning = self._conditioning(batch)
        errors = [self._errors(shape, batch.timesteps, conditioning) for shape in batch.shapes]
        if len(errors) > 1:  # in the batch's order
            order = torch.cat([shape.items for shape in batch.shapes]).argsort()
            errors = [torch.cat(errors)[order]]
        gamma = self.training.min_snr_gamma
        weights = (
            None if gamma is None else min_snr_weights(self._scheduler, batch.timesteps, gamma)
        )
        return dreambooth_loss(
            errors[0],
            instances=batch.instances,
            prior_weight=self.prior_weight,
            weights=weights,
        )

    def _errors(self, shape: SameShape, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """(m,): the errors of the samples of one shape."""
        if len(shape.items) < len(timesteps):
            timesteps, conditioning = timesteps[shape.items], conditioning.rows(shape.items)
        noised = self._scheduler.add_noise(shape.latents, shape.noise, timesteps)
        target = training_target(self._scheduler, shape.latents, shape.noise, timesteps)
        prediction = predict(self.unet, noised.to(self._dtype), timesteps, conditioning)
        return sample_errors(prediction, target, shape.weights)

    def _conditioning(self, batch: Batch) -> Conditioning:
        """That of each sample; each different prompt is read once."""
        unique, inverse = batch.tokens.unique(dim=0, return_inverse=True)
        if self._trains_text:
            prompts = self.family.encode(self.networks, unique)
        else:
            prompts = Conditioning.joined([self._fixed_prompt(row) for row in unique])
        time_ids = None if batch.time_ids is None else batch.time_ids.to(self._device)
        rows = prompts.rows(inverse.to(self._device))
        return dataclasses.replace(rows, time_ids=time_ids)

    @torch.no_grad()
    def _fixed_prompt(self, row: Tensor) -> Conditioning:
        key = tuple(row.tolist())
        if key not in self._fixed:
            self._fixed[key] = self.family.encode(self.networks, row[None])
        return self._fixed[key]

    def state(self) -> TrainingState:
        """What it takes to go on from here."""
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
        self.step, self.history = state.step, list(state.history)
        self._lr_schedule.load_state_dict(state.extra["lr_schedule"])
        for group, learning_rate in zip(
            self.optimizer.param_groups, self._lr_schedule.get_last_lr(), strict=True
        ):
            group["lr"] = learning_rate


def _checkpoint_gradients(unet: Any, text_encoders: Sequence[Any]) -> None:
    unet.enable_gradient_checkpointing()
    for text_encoder in text_encoders:
        renamed = getattr(text_encoder, "activation_checkpointing_enable", None)  # transformers 5
        # The reentrant kind gives no gradients where the input (the frozen embeddings) needs none.
        (renamed or text_encoder.gradient_checkpointing_enable)({"use_reentrant": False})
