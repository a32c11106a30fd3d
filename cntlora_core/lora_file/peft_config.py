"""Configurations that peft and diffusers keep with a LoRA, and the scale that they give a layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cntlora_core.lora_file.names import PEFT_PREFIX
from cntlora_core.runtime.reading import json_object, read_json_object

DIFFUSERS_METADATA_KEY = "lora_adapter_metadata"
_LONGEST_PATTERN = 1000
_REGEX_SIGNS = frozenset("*+?|()[]{}^$\\")


def read_peft_config(file: Path, weights: Path) -> dict[str, Any]:
    """The configuration of an adapter of peft's.

    Args:
        file: Its ``adapter_config.json``.
        weights: The file beside it, which messages name.

    Raises:
        ValueError: it is damaged, or of another method than LoRA.
    """
    config = read_json_object(file, "the configuration of an adapter")
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{weights} is a peft adapter of type {config['peft_type']}, not a LoRA")
    return config


def header_configs(header: Mapping[str, str]) -> dict[str, Any]:
    """The configurations by component that diffusers keeps in a file's header; often none.

    Raises ValueError where they are no JSON object.
    """
    fields = json_object(header.get(DIFFUSERS_METADATA_KEY, "{}"))
    configs: dict[str, Any] = {}
    for key, value in fields.items():
        component, _, field = key.partition(".")
        configs.setdefault(component, {})[field] = value
    return configs


def config_alpha(configs: Mapping[str, Any], module: str, name: str, rank: int) -> float:
    """Alpha of a layer that carries none: from its component's configuration, else its rank.

    Args:
        configs: peft configurations by component.
        module: The layer as the file spells it.
        name: Its canonical name.
        rank: Its rank.

    Raises:
        ValueError: the configuration's alpha is no finite number, or a pattern of it is no name.
    """
    component, _, canonical = name.partition(".")
    config = configs.get(component)
    if config is None:
        return float(rank)
    alpha = config.get("lora_alpha", rank)
    spelled = module.removeprefix(f"{component}.").removeprefix(PEFT_PREFIX)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"alpha_pattern must map names to numbers, got {patterns!r}")
    for pattern, value in patterns.items():
        if any(matches_pattern(pattern, key) for key in (spelled, canonical)):
            alpha = value
            break
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}")
    # rsLoRA scales by alpha / sqrt(r); a layer's alpha is its scaling times its rank.
    return float(alpha) * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def matches_pattern(pattern: str, name: str) -> bool:
    """Whether a pattern of peft's names this module, or the end of its path.

    peft takes such patterns as regular expressions. A file is no program: here a pattern is a name,
    in which a backslash keeps the next character as it is, a dot stands for any character and
    ``.*`` for any number of them, and which ``^`` ties to the beginning. peft, diffusers and this
    package write nothing else, and matching takes no longer than pattern times name.

    Raises:
        ValueError: the pattern has another regular expression's sign in it.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(
            f"a pattern of {len(pattern):,} characters is no module's name: {pattern[:40]!r}..."
        )
    whole = pattern.startswith("^")
    parts = re.findall(r"\\.|\.\*|.", pattern.removeprefix("^").removesuffix("$"), re.DOTALL)
    if odd := next((part for part in parts if part in _REGEX_SIGNS), None):
        raise ValueError(
            f"the pattern {pattern!r} has a {odd!r}; a module's name in peft's spelling is needed"
        )
    reached = {0} if whole else {0, *(i + 1 for i, c in enumerate(name) if c == ".")}
    for part in parts:
        if part == ".*":
            reached = set(range(min(reached), len(name) + 1)) if reached else reached
        else:
            character = None if part == "." else part[-1]
            reached = {i + 1 for i in reached if i < len(name) and character in (None, name[i])}
    return len(name) in reached
