"""Refusing settings that make no sense, in a message that says what would."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

MOST_PIXELS = 4096
"""The largest side of a picture: beyond, attention over its latents outgrows any memory."""
LARGEST_NUMBER = 1e9
"""Of weights, rates and scales: what float32 can still multiply weights by."""


def store_as_text(settings: Any, *names: str) -> None:
    """Keep paths as text, which is what a record holds; None stays.

    Args:
        settings: a frozen dataclass, changed in place.
        names: of its fields.
    """
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, os.PathLike):
            object.__setattr__(settings, name, os.fspath(value))


def require_json(values: Any, name: str = "") -> None:
    """Refuse what the record of a run, a JSON file, cannot hold.

    Args:
        values: nested dicts, lists and tuples.
        name: where they stand, for the message.

    Raises:
        TypeError: a value is neither text nor a number, true, false or None.
    """
    if isinstance(values, dict):
        for key, value in values.items():
            require_json(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, (list, tuple)):
        for value in values:
            require_json(value, name)
    elif values is not None and type(values) not in (str, int, float, bool):
        raise TypeError(
            f"{name} must be text, a number, true or false, got {values!r} of type "
            f"{type(values).__name__}, which the record of a run cannot hold"
        )


def require_choice(name: str, value: object, kind: Any) -> None:
    """Raises a ValueError unless ``value`` is one of the ``Literal`` ``kind``; ``name`` is said."""
    if value not in get_args(kind):
        raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {value!r}")


def require_at_least(name: str, value: int, least: int) -> None:
    """Raises a ValueError if ``value``, called ``name``, is less than ``least``."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def require_between(name: str, value: float, least: float, most: float) -> None:
    """Raises a ValueError unless ``least <= value <= most``; ``name`` is said."""
    if not least <= value <= most:
        raise ValueError(f"{name} must be at least {least} and at most {most}, got {value}")


def require_side(name: str, value: int | None) -> None:
    """Refuses what is no side of a picture; larger ones would ask for terabytes."""
    if value is not None and not (8 <= value <= MOST_PIXELS and value % 8 == 0):
        raise ValueError(
            f"{name} must be a multiple of 8 between 8 and {MOST_PIXELS} pixels, got {value}"
        )


def require_step_rules(needed: bool, rules: str) -> None:
    """Raises a ValueError unless diffusers can read the rules of ``piecewise_constant``.

    Args:
        needed: Whether the schedule is the one that takes them.
        rules: ``factor:step`` pairs and a last factor, with commas between.
    """
    number = r"\d+(\.\d+)?(e-?\d+)?"
    if needed and not re.fullmatch(rf"({number}:\d+,)+{number}", rules):
        raise ValueError(
            "lr_schedule='piecewise_constant' needs lr_step_rules such as '1:100,0.1' (the whole "
            f"learning rate for 100 steps, then a tenth of it), got {rules!r}"
        )
    if rules and not needed:
        raise ValueError(
            "lr_step_rules has an effect with lr_schedule='piecewise_constant' only: leave it out"
        )


def require_schedule_shape(schedule: str, cycles: int, power: float) -> None:
    """Raises a ValueError where restarts and power do nothing, or the schedule nothing of its own.

    Args:
        schedule: Of the learning rate.
        cycles: Of ``cosine_with_restarts``; 1 is none for others.
        power: Of ``polynomial``; 1 is none for others.
    """
    for name, value, needs, instead in (
        ("lr_cycles", cycles, "cosine_with_restarts", "lr_cycles=3, or lr_schedule='cosine'"),
        ("lr_power", power, "polynomial", "lr_power=2, or lr_schedule='linear'"),
    ):
        if schedule == needs and value == 1:
            what = "has no restart" if name == "lr_cycles" else "is linear"
            raise ValueError(f"lr_schedule={schedule!r} with {name}=1 {what}: use {instead}")
        if schedule != needs and value != 1:
            raise ValueError(
                f"{name}={value} has no effect with lr_schedule={schedule!r}: it belongs to {needs}"
            )


def require_defaults(settings: Any, names: Iterable[str], reason: str) -> None:
    """Raises a ValueError if a field that has no effect differs from its default.

    Args:
        settings: A dataclass.
        names: Of the fields.
        reason: Why they have none, for the message.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(settings)}
    for name in names:
        if (value := getattr(settings, name)) != defaults[name]:
            raise ValueError(f"{name}={value} has no effect {reason}: leave it out")


def require_unicode(name: str, *texts: str | None) -> None:
    """Refuses texts that no tokenizer and no file can hold, before any work.

    Raises:
        TypeError: if a text is none, as bytes or a path.
        ValueError: if a text has half of a surrogate pair, left by bytes that are not UTF-8.
    """
    for text in texts:
        if not isinstance(text, (str, type(None))):
            raise TypeError(f"{name} must be text, got {text!r} of type {type(text).__name__}")
        if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"{name} must be valid Unicode, got {text!a}: type it in a terminal or a file "
                "with the encoding UTF-8"
            )


def require_finite(name: str, value: float, least: float) -> None:
    """Raises a ValueError unless ``least <= value <= LARGEST_NUMBER``, which NaN is not."""
    if not least <= value <= LARGEST_NUMBER:
        raise ValueError(
            f"{name} must be a finite number of at least {least} and at most {LARGEST_NUMBER:g}, "
            f"got {value}"
        )


def require_from_lora_alone(settings: Any, default_method: str, from_lora: str) -> None:
    """Make ``from_lora`` the method of adapter settings that go on from a file.

    Args:
        settings: AdapterSettings, changed in place.
        default_method: The method of settings in which none was given.
        from_lora: The name of the method.

    Raises:
        ValueError: for another method or kind of adapter, an alpha, or the method without a file.
    """
    if settings.from_lora is None:
        if settings.method == from_lora:
            raise ValueError(f"method={from_lora!r} goes on from a LoRA: name its file (from_lora)")
        return
    if settings.method not in (default_method, from_lora):
        raise ValueError(
            f"method={settings.method!r} initialises a LoRA anew, and from_lora goes on from one: "
            "give one of the two"
        )
    if settings.adapter != "lora":
        raise ValueError(f"from_lora goes on with a LoRA, not with adapter={settings.adapter!r}")
    if settings.alpha is not None:
        raise ValueError("the alphas of a LoRA that is gone on from stay: leave alpha out")
    object.__setattr__(settings, "method", from_lora)


def build_settings(cls: Any, values: Mapping[str, Any], nested: Mapping[str, type]) -> Any:
    """A settings class from plain JSON values.

    Args:
        cls: A dataclass.
        values: Of its fields.
        nested: The classes of fields that are settings themselves, by name.

    Raises:
        ValueError: for an unknown or missing key, or a value that makes no sense.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown settings {unknown} in {cls.__name__}; known: {sorted(known)}")
    arguments = {}
    for name, value in values.items():
        if name in nested and isinstance(value, Mapping):
            value = build_settings(nested[name], value, nested)
        arguments[name] = tuple(value) if isinstance(value, list) else value
    missing = [
        name
        for name, f in known.items()
        if name not in arguments
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{cls.__name__} lacks {missing}")
    return cls(**arguments)
