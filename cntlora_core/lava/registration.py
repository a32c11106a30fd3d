"""Making LAVA known to peft, once; peft knows its methods by an enumeration of their names."""

from __future__ import annotations

import enum
import inspect
from typing import Any

from peft.utils import PeftType, register_peft_method

NAME = "lava"


def add_member(enumeration: type[enum.Enum], name: str) -> None:
    """Add ``name = "name"`` to an enumeration of strings, as if it had been declared there."""
    if name in enumeration.__members__:
        return
    member: Any = str.__new__(enumeration, name)  # pyright: ignore
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enumeration
    member._sort_order_ = len(enumeration.__members__)
    enumeration._member_map_[name] = member
    enumeration._member_names_.append(name)
    enumeration._value2member_map_[name] = member
    type.__setattr__(enumeration, name, member)


def register() -> None:
    """Register LAVA with peft.

    Raises:
        ImportError: with a peft that is too old, or where another copy of this library has
            registered it.
    """
    add_member(PeftType, NAME.upper())
    # They name the member when they are made.
    from cntlora_core.lava.config import LavaConfig
    from cntlora_core.lava.model import LavaModel

    if inspect.isabstract(LavaModel):
        raise ImportError("LAVA needs a newer peft: pip install --upgrade peft (0.18 or later)")
    try:
        register_peft_method(
            name=NAME, config_cls=LavaConfig, model_cls=LavaModel, prefix=LavaModel.prefix
        )
    except KeyError as error:
        raise ImportError(
            "LAVA is registered with peft already, by another copy of this library in the same "
            "process: import it under one name only"
        ) from error
