"""Which part of a model a layer belongs to, by its name."""

from __future__ import annotations

from collections.abc import Callable

GroupFn = Callable[[str], str]
"""``group_of(name)`` names the group of a layer or parameter by its dotted path."""

VISION, PROJECTOR, LANGUAGE = "vision", "projector", "language"
_COMPONENTS = {
    "unet": "UNet",
    "text_encoder": "text encoder",
    "text_encoder_2": "text encoder 2",
}
_PARTS = {
    "modules_to_save": ("modules_to_save",),  # heads and the like, which peft trains whole
    PROJECTOR: ("projector", "merger", "connector"),
    VISION: ("vision", "visual", "image_encoder"),
    LANGUAGE: ("language_model", "text_model"),
}


def group_of(name: str) -> str:
    """The part of a model that a name belongs to.

    Of Stable Diffusion that is the UNet or a text encoder; of other models ``projector``,
    ``vision`` or ``language``, as transformers names them, ``modules_to_save``, or ``rest``.
    """
    component = name.partition(".")[0]
    if component in _COMPONENTS:
        return _COMPONENTS[component]
    parts = (part for part, words in _PARTS.items() if any(word in name for word in words))
    return next(parts, "rest")


def plain_name(prefix: str, name: str) -> str:
    """The path of a module or parameter in the base model, without what peft puts around it."""
    words = [word for word in name.split(".") if word != "base_layer"]
    if words[:2] == ["base_model", "model"]:
        words = words[2:]
    return ".".join([prefix, *words] if prefix else words)
