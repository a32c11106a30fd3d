"""What a LoRA file says of its making: base model, method, settings."""

from __future__ import annotations

from typing import Any

from cntlora_core.lora_file.contents import LoRAContents
from cntlora_core.runtime.reading import json_object

_CROSS_ATTENTION_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
_TRAINING_FACTS = (
    *("learning_rate", "unet_lr", "text_encoder_lr", "optimizer", "lr_scheduler"),
    *("max_train_steps", "steps", "epoch", "seed", "num_train_images", "num_reg_images"),
    *("resolution", "network_dim", "network_alpha", "prior_loss_weight"),
)


def base_model_of(contents: LoRAContents) -> str | None:
    metadata = contents.metadata
    named = [
        text
        for key in ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")
        if (text := metadata.get(key)) and text != "None"
    ]
    for config in contents.configs.values():
        if text := config.get("base_model_name_or_path"):
            named.append(str(text))
    if named:
        return ", ".join(dict.fromkeys(named))
    for name, layer in contents.layers.items():
        if name.endswith(("attn2.to_k", "attn2_to_k")):
            width = layer.down.shape[1]
            found = _CROSS_ATTENTION_WIDTHS.get(width, f"a text width of {width}")
            return f"{found} (by its shapes; the file does not say)"
    return None


def method_of(contents: LoRAContents) -> str | None:
    metadata = contents.metadata
    if method := metadata.get("cntlora.method"):
        return method
    for config in contents.configs.values():
        if "init_lora_weights" in config:
            init = config["init_lora_weights"]
            plain = {"True": "plain LoRA (kaiming)", "False": "initialisation given"}
            name = plain.get(str(init), init)
            more = [k for k in ("use_dora", "use_rslora") if config.get(k)]
            return ", ".join([f"peft: {name}", *more])
    return metadata.get("ss_network_module")


def settings_of(contents: LoRAContents) -> dict[str, Any]:
    metadata = contents.metadata
    settings: dict[str, Any] = {
        key: metadata[f"ss_{key}"]
        for key in _TRAINING_FACTS
        if metadata.get(f"ss_{key}") not in (None, "None")
    }
    for component, config in contents.configs.items():
        prefix = f"{component}." if component else ""
        for key in ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora"):
            if config.get(key):
                settings[prefix + key] = config[key]
    try:
        return settings | json_object(metadata.get("cntlora.settings", "{}"))
    except ValueError:
        return settings
