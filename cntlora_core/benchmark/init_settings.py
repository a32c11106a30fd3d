"""What ``cntlora bench init`` is asked for; imports nothing slow, for the command's help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

CaseName = Literal["sd15", "roberta-large", "llama-1b"]
CASES: tuple[CaseName, ...] = get_args(CaseName)
DIRECT: tuple[str, ...] = ("cntlora", "cntlora-fixed", "eva", "corda")
"""Initialisations that are called as their own users call them, peft's by peft's functions."""


@dataclass(frozen=True)
class InitBenchmark:
    """Time and memory of the initialisation, against bare forward passes and peft's EVA and CorDA.

    Attributes:
        output: Folder for the results: JSON, plots, and a log of the measured processes.
        cases: Models: Stable Diffusion 1.5, and the layouts of RoBERTa-large and of a language
            model of 1 B parameters.
        methods: Initialisations: eva and corda as peft has them, cntlora-fixed (ours with one rank
            for all, as CorDA has it), and any name of ``cntlora methods`` that needs no loss.
            cntlora is measured always.
        repeats: Processes for each case and initialisation; medians are reported.
        rival_repeats: The same, for all but ours; default: as many.
        limit: Seconds that an initialisation may take; one that takes longer is ended, and not
            repeated.
        model: A checkpoint for the one case that is chosen; default: random weights.
        quick: Tiny models, to see that everything runs.
        scaling: Instead of the cases: how the cost grows with images, rank, width and depth.
        threads: Threads of torch; default: torch's own choice.
        seed: Seed of random weights and data.
    """

    output: Path = Path("bench_init")
    cases: tuple[CaseName, ...] = CASES
    methods: tuple[str, ...] = DIRECT[1:]
    repeats: int = 3
    rival_repeats: int | None = None
    limit: float = 900.0
    model: Path | None = None
    quick: bool = False
    scaling: bool = False
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if self.rival_repeats is not None and not 1 <= self.rival_repeats <= self.repeats:
            raise ValueError(
                f"rival_repeats must lie between 1 and repeats={self.repeats}, got "
                f"{self.rival_repeats}"
            )
        if not self.limit > 0:
            raise ValueError(f"limit must be a number of seconds above 0, got {self.limit}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if not self.cases:
            raise ValueError(f"cases is empty: choose from {', '.join(CASES)}")
        if self.model is not None and (len(self.cases) != 1 or self.quick):
            raise ValueError(
                "model belongs to one case: choose it with --cases, and leave --quick out"
            )
