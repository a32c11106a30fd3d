"""Which flags the help of ``cntlora train`` shows, and which there are none of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, get_type_hints

import docstring_parser
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from cntlora_core.config import CNTLoRAConfig
from cntlora_core.diffusion.settings import (
    AdapterSettings,
    OutputSettings,
    PriorSettings,
    SubjectSettings,
    TrainingSettings,
)
from cntlora_core.tasks.recipes import (
    DepthSettings,
    LmSettings,
    SegmentationSettings,
    TextSettings,
    VisionSettings,
    VlmSettings,
)

HELP_ALL = "--help-all"


class RefusedError(Exception):
    """What settings say of a value that they refuse; tyro would put a ValueError into a frame."""


SHOWN = {
    SubjectSettings: ("images", "token", "class_name", "resolution"),
    PriorSettings: ("class_images", "prior_weight"),
    AdapterSettings: ("method", "rank"),
    TrainingSettings: ("steps", "learning_rate", "seed", "sample_prompts"),
    OutputSettings: ("output", "name"),
    CNTLoRAConfig: (),
}
"""With the model, ``--resume`` and ``--overwrite``: what ``--help`` shows of a training."""
_OF_ALL_TASKS = ("output", "model", "data", "method", "adapter", "rank", "learning_rate")
_OF_ALL_TASKS += ("epochs", "batch_size", "seed", "preset", "resume", "overwrite")
SHOWN_IN_TASKS = {
    TextSettings: (*_OF_ALL_TASKS, "task"),
    VisionSettings: (*_OF_ALL_TASKS, "tune"),
    LmSettings: (*_OF_ALL_TASKS, "sets"),
    VlmSettings: (*_OF_ALL_TASKS, "prompt", "images", "sentence_encoder"),
    SegmentationSettings: _OF_ALL_TASKS,
    DepthSettings: (*_OF_ALL_TASKS, "max_depth"),
}
"""What ``--help`` shows of a recipe."""
_REPEATED = {CNTLoRAConfig: ("constraint",)}
"""What another flag says already: the constraint is the method."""


def registry(arguments: Sequence[str]) -> tuple[ConstructorRegistry, list[str]]:
    """How tyro makes flags of settings, and the arguments with ``--help-all`` as ``--help``.

    Args:
        arguments: Of the command line. With ``--help`` among them the flags that few need are left
            out; ``--help-all`` shows all.
    """
    brief = HELP_ALL not in arguments and bool({"-h", "--help"} & {*arguments})
    rules = ConstructorRegistry()
    shown = SHOWN | SHOWN_IN_TASKS

    @rules.struct_rule
    def settings(info: StructTypeInfo) -> StructConstructorSpec | None:
        cls: Any = info.type
        if cls not in shown:
            return None
        given = info.default if isinstance(info.default, cls) else None
        texts = {
            p.arg_name: p.description
            for kind in reversed(cls.__mro__)
            if dataclasses.is_dataclass(kind)
            for p in docstring_parser.parse(kind.__doc__ or "").params
        }
        hints = get_type_hints(cls, include_extras=True)
        fields = []
        for field in dataclasses.fields(cls):
            if field.name in _REPEATED.get(cls, ()):
                continue
            kind: Any = hints[field.name]
            if cls is CNTLoRAConfig:
                flag = f"cntlora.{field.name}".replace("_", "-")
                kind = Annotated[kind, tyro.conf.arg(name=flag)]
            if brief and field.name not in shown[cls]:
                kind = Annotated[kind, tyro.conf.Suppress]
            default = _default(field) if given is None else getattr(given, field.name)
            text = " ".join((texts.get(field.name) or "").split())
            fields.append(StructFieldSpec(field.name, kind, default, text))
        return StructConstructorSpec(partial(_make, cls), tuple(fields))

    return rules, ["--help" if word == HELP_ALL else word for word in arguments]


def _make(cls: Any, **values: Any) -> Any:
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise RefusedError(str(error)) from error


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is dataclasses.MISSING else field.default
