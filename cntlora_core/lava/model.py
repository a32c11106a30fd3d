"""LAVA as a peft tuner: puts adapters into a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from cntlora_core.lava.config import LavaConfig
from cntlora_core.lava.layer import LavaLayer, LavaLinear, check_adaptable


class LavaModel(BaseTuner):
    """A model with LAVA's adapters; ``get_peft_model(model, LavaConfig(...))`` makes one.

    Example:
        >>> model = get_peft_model(unet, LavaConfig(r=4, target_modules=["conv1", "to_q"]))
    """

    prefix: str = "lava_"  # what peft splits the keys of a state dict at
    tuner_layer_cls = LavaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # In the names of modules with the dot before it: a base model may have llava_head.
        object.__setattr__(self, "prefix", f".{type(self).prefix}")
        super().__init__(*args, **kwargs)

    def _create_and_replace(
        self,
        peft_config: LavaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_optional: Any,
    ) -> None:
        rank, alpha = rank_and_alpha(peft_config, current_key)
        if isinstance(target, LavaLayer):
            target.update_layer(adapter_name, rank, alpha, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        check_adaptable(current_key, base)
        kind = LavaLinear if isinstance(base, (nn.Linear, Conv1D)) else LavaLayer
        layer = kind(target, adapter_name, rank, alpha, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # one more adapter is not trained before it is chosen
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            # What modules_to_save names; peft would look for the one weight of a head of several.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def add_weighted_adapter(self, *_args: Any, **_kwargs: Any) -> None:
        """Not for LAVA.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "add_weighted_adapter: a weighted sum of LAVA's adapters has as many terms as all of "
            "them together, and is no adapter of their rank. Make several adapters active at once "
            "with base_model.set_adapter([...]), and weigh them with set_scale on each LavaLayer"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: LAVA has one choice of adapters for a whole batch; make it with "
                "set_adapter, and give each part of the batch by itself"
            )
        yield


def rank_and_alpha(config: LavaConfig, name: str) -> tuple[int, float]:
    """What a configuration gives a module, its patterns included."""
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    return rank, alphas.get(get_pattern_key(list(alphas), name), config.lava_alpha)
