"""Names in LAVA's settings, apart from its package, which imports peft: help must be quick."""

from __future__ import annotations

from typing import Literal

FactorName = Literal["U", "V", "Y", "X"]
"""The factors, in their order: outputs, inputs, kernel height, kernel width."""

PlainStart = Literal["orthogonal", "lora"]
"""Starts that read nothing: a model with either gives what its base gives."""
