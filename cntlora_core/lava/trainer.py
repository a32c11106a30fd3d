"""The orthogonality term in transformers' Trainer, or any class made from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import Trainer

from cntlora_core.lava.orthogonality import OrthogonalityLoss

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def with_orthogonality(
    trainer_class: type[AnyTrainer],
    term_of: Callable[[nn.Module], Callable[[], Tensor]] = OrthogonalityLoss,
) -> type[AnyTrainer]:
    """A trainer class that adds the orthogonality term to its loss, in training only.

    The term counts once an optimizer step, however many batches are accumulated in it.

    Args:
        trainer_class: transformers' Trainer, or one that is made of it.
        term_of: Makes the term of a model, a callable without arguments.

    Example:
        >>> trainer = with_orthogonality(Trainer)(model=peft_model, args=args, train_dataset=data)
    """

    class OrthogonalTrainer(trainer_class):  # pyright: ignore[reportGeneralTypeIssues]
        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            found = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            if not model.training:
                return found
            term = term_of(self.accelerator.unwrap_model(model))()
            if _divided_already(self, num_items_in_batch):
                accumulated = getattr(self, "current_gradient_accumulation_steps", None)
                term = term / (accumulated or self.args.gradient_accumulation_steps)
            if not return_outputs:
                return _added(found, term)
            loss, outputs = found
            return _added(loss, term), outputs

    OrthogonalTrainer.__name__ = f"Orthogonal{trainer_class.__name__}"
    OrthogonalTrainer.__qualname__ = OrthogonalTrainer.__name__
    return OrthogonalTrainer  # pyright: ignore[reportReturnType]


def _added(loss: Any, term: Tensor) -> Tensor:
    return loss + term.to(loss.device)


def _divided_already(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether the trainer does not divide a batch's loss by how many are accumulated."""
    told = getattr(trainer, "loss_is_scaled_for_ga", None)
    if told is not None:
        return told
    by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return by_model or trainer.compute_loss_func is not None
