"""``cntlora bench``: the measurements, which belong to a checkout of the repository."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from cntlora_core.benchmark.convergence.command import ConvergenceBenchmark, ConvergenceReport
from cntlora_core.benchmark.init_settings import InitBenchmark
from cntlora_core.benchmark.lava.settings import LavaBenchmark
from cntlora_core.runtime.progress import Reporter


@dataclass(frozen=True)
class BenchInit(InitBenchmark):
    __doc__ = InitBenchmark.__doc__

    def after_cancel(self) -> str:
        return f"; what was measured so far is in {self.output}"

    def run(self, reporter: Reporter) -> None:
        if self.scaling:
            from cntlora_core.benchmark.init_scaling import run_scaling, show_scaling

            show_scaling(run_scaling(self, reporter))
        else:
            from cntlora_core.benchmark.initialization_speed import run_cases, show_cases

            show_cases(run_cases(self, reporter))
        print(self.output)


@dataclass(frozen=True)
class BenchLava(LavaBenchmark):
    __doc__ = LavaBenchmark.__doc__

    def after_cancel(self) -> str:
        return "; the same command goes on from there"

    def run(self, reporter: Reporter) -> None:
        from cntlora_core.benchmark.lava.run import run_lava, show_lava

        show_lava(run_lava(self, reporter), self)
        print(self.output)


@dataclass(frozen=True)
class BenchConvergence(ConvergenceBenchmark):
    __doc__ = ConvergenceBenchmark.__doc__

    def after_cancel(self) -> str:
        return "; the same command goes on from there"

    def run(self, reporter: Reporter) -> None:
        from cntlora_core.benchmark.convergence.command import run_convergence

        run_convergence(self, reporter)
        print(self.output)


@dataclass(frozen=True)
class BenchReport(ConvergenceReport):
    __doc__ = ConvergenceReport.__doc__

    def after_cancel(self) -> str:
        return ""

    def run(self, _reporter: Reporter) -> None:
        from cntlora_core.benchmark.convergence.report import write_report

        for path in write_report(self):
            print(path)


@dataclass(frozen=True)
class Bench:
    """Measure, against named peers, in one run.

    Attributes:
        what: init: the initialisation of an adapter. lava: adapters that keep a convolution's
            dimensions.
            convergence: trainings from many initialisations. report: its tables and plots.
    """

    what: Annotated[
        Annotated[BenchInit, tyro.conf.subcommand("init")]
        | Annotated[BenchLava, tyro.conf.subcommand("lava")]
        | Annotated[BenchConvergence, tyro.conf.subcommand("convergence")]
        | Annotated[BenchReport, tyro.conf.subcommand("report")],
        tyro.conf.arg(name=""),
    ]

    def after_cancel(self) -> str:
        return self.what.after_cancel()

    def run(self, reporter: Reporter) -> None:
        self.what.run(reporter)
