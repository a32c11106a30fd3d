"""LAVA beside peft's own methods in one model: say, LAVA on convolutions and LoRA on attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mixed_model import PeftMixedModel
from peft.tuners.mixed.model import COMPATIBLE_TUNER_TYPES, Configs, MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from cntlora_core.lava.config import LavaConfig
from cntlora_core.lava.model import LavaModel
from cntlora_core.lora_file.reading import PEFT_CONFIG, PEFT_WEIGHTS
from cntlora_core.runtime.file_names import safe_name
from cntlora_core.runtime.files import require_writable_folder, save_safetensors_atomic


class _MixedTuner(MixedModel):
    """peft's own, which knows its methods from fixed lists, with LAVA beside them."""

    prefix = f".{LavaModel.prefix}"
    tuner_layer_cls = BaseTunerLayer

    def _check_new_adapter_config(self, config: PeftConfig) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not isinstance(config, (LavaConfig, *Configs.__args__)):
            raise TypeError(_refusal(config))
        BaseTuner._check_new_adapter_config(self, config)

    def _create_and_replace(self, config: PeftConfig, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(config, LavaConfig):
            LavaModel._create_and_replace(self, config, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        else:
            super()._create_and_replace(config, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        BaseTuner._mark_only_adapters_as_trainable(self, model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        BaseTuner.set_adapter(self, adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Delete adapters; the first that is left becomes active where no active one is."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        unknown = sorted(set(names) - set(self.peft_config))
        if unknown:
            raise ValueError(
                f"there is no adapter {unknown[0]!r} to delete: the model has "
                f"{', '.join(map(repr, self.peft_config))}"
            )
        active = [name for name in self.active_adapters if name not in names]
        frozen = not any(parameter.requires_grad for parameter in self.model.parameters())
        for name in names:
            BaseTuner.delete_adapter(self, name)
        active = active or list(self.peft_config)[:1]
        if active:  # a module without the deleted adapter still has it for active
            self.set_adapter(active, inference_mode=frozen)


class MixedLavaModel(PeftMixedModel):
    """A model with adapters of several methods, all active; see :func:`get_mixed_model`."""

    def __init__(self, model: nn.Module, adapters: Mapping[str, PeftConfig]) -> None:
        nn.Module.__init__(self)
        if not adapters:
            raise ValueError("give at least one adapter: a name and its configuration")
        for config in adapters.values():
            _check(config)
        first, *others = adapters
        self.modules_to_save = None
        self.base_model = _MixedTuner(model, {first: adapters[first]}, first)  # pyright: ignore[reportArgumentType]
        self.config = getattr(model, "config", {"model_type": "custom"})
        self.set_modules_to_save(adapters[first], first)
        self.base_model._cast_adapter_dtype(first)
        for name in others:
            self.add_adapter(name, adapters[name])
        self.set_adapter(list(adapters))

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter of any of the methods; :meth:`set_adapter` then makes it active."""
        _check(peft_config)
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already: choose another name")
        self.peft_config[adapter_name] = peft_config
        try:
            self.base_model.inject_adapter(
                self.base_model.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
            )
        except Exception:
            del self.peft_config[adapter_name]
            raise
        self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.set_modules_to_save(peft_config, adapter_name)

    def save_pretrained(self, save_directory: str | Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Save each adapter in a folder of its own name, as ``PeftModel`` would save it alone."""
        for name, config in self.peft_config.items():
            folder = require_writable_folder(Path(save_directory) / safe_name(name))
            state = get_peft_model_state_dict(self, adapter_name=name)
            tensors = {_alone(key): tensor for key, tensor in state.items()}
            save_safetensors_atomic(tensors, folder / PEFT_WEIGHTS, {"format": "pt"})
            inference = config.inference_mode
            config.inference_mode = True
            try:
                config.save_pretrained(str(folder))
            finally:
                config.inference_mode = inference

    @classmethod
    def load(
        cls, model: nn.Module, folder: str | Path, *names: str, is_trainable: bool = False
    ) -> MixedLavaModel:
        """Put adapters that :meth:`save_pretrained` saved into a base model.

        Args:
            model: The base model, without adapters.
            folder: The folder that they were saved in.
            names: Which adapters; default: all that are there.
            is_trainable: Whether they are to be trained on.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the model has adapters already, or they are another model's.
        """
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError("the model has adapters already: load into a base model without any")
        folder = Path(folder)
        names = names or tuple(sorted(p.parent.name for p in folder.glob(f"*/{PEFT_CONFIG}")))
        missing = [n for n in names if not (folder / safe_name(n) / PEFT_WEIGHTS).is_file()]
        if missing or not names:
            raise FileNotFoundError(f"there is no adapter {', '.join(missing) or ''} in {folder}")
        folders = {name: folder / safe_name(name) for name in names}
        mixed = cls(
            model, {name: PeftConfig.from_pretrained(str(at)) for name, at in folders.items()}
        )
        for name, at in folders.items():
            here = {_alone(key): key for key in get_peft_model_state_dict(mixed, adapter_name=name)}
            tensors = load_file(at / PEFT_WEIGHTS)
            differing = sorted(here.keys() ^ tensors.keys())
            if differing:
                raise ValueError(f"{at} does not fit the model: {', '.join(differing[:3])} ...")
            state = {here[key]: tensor for key, tensor in tensors.items()}
            set_peft_model_state_dict(mixed, state, adapter_name=name)
        if not is_trainable:
            mixed.requires_grad_(False)
        return mixed

    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: str | Path, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """:meth:`load`, under the name that peft's models have for it."""
        return cls.load(model, model_id, **options)


def get_mixed_model(model: nn.Module, adapters: Mapping[str, PeftConfig]) -> MixedLavaModel:
    """Wrap a base model with adapters of several methods, all of them active and trained.

    Example:
        >>> mixed = get_mixed_model(unet, {
        ...     "attention": LoraConfig(r=8, target_modules=["to_q", "to_v"]),
        ...     "convolutions": LavaConfig(r=4, target_modules=["conv1", "conv2"])})
    """
    return MixedLavaModel(model, adapters)


def _alone(key: str) -> str:
    """The name of a tensor where its adapter is the only one on its module."""
    return key.replace(".base_layer", "")


def _check(config: PeftConfig) -> None:
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"bias={config.bias!r}: biases belong to the module, not to one of several adapters on "  # pyright: ignore[reportAttributeAccessIssue]
            "it; train them with one adapter alone"
        )
    if not isinstance(config, LavaConfig) and config.peft_type not in COMPATIBLE_TUNER_TYPES:
        raise TypeError(_refusal(config))


def _refusal(config: object) -> str:
    known = ", ".join(kind.value for kind in COMPATIBLE_TUNER_TYPES)
    return f"LAVA can stand beside adapters of {known}; got a {type(config).__name__}"
