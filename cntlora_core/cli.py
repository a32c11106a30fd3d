"""The ``cntlora`` command. Flags are made from the settings' dataclasses: a default stands once."""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from cntlora_core.benchmark.convergence.command import ConvergenceBenchmark, ConvergenceReport
from cntlora_core.benchmark.init_settings import InitBenchmark
from cntlora_core.benchmark.lava.settings import LavaBenchmark
from cntlora_core.commands.evaluate import Evaluate
from cntlora_core.commands.flags import UserPath
from cntlora_core.diffusion.settings import (
    AdapterSettings,
    JobSettings,
    Method,
    OutputSettings,
    Precision,
    PriorSettings,
    SamplingSettings,
    SubjectSettings,
    TrainingSettings,
)
from cntlora_core.runtime.console import Cancelled, ConsoleReporter, message_console, say
from cntlora_core.runtime.reading import lacks_memory, printable, reason

MOST_PER_PROMPT = 100_000
EXPECTED_ERRORS = (ValueError, OSError, FloatingPointError, ImportError)


@dataclass(frozen=True)
class Train:
    """Teach a Stable Diffusion 1.5 model a subject: photos in, a LoRA file out.

    Attributes:
        model: Stable Diffusion 1.5 as one .safetensors file, a diffusers folder or a hub id.
        resume: Go on with the run in the output folder: an interrupted one to its end, a finished
            one to more steps, or to a LoRA file of another name, layout or precision.
        overwrite: Start anew even where the output folder holds a run.
    """

    model: str
    subject: Annotated[SubjectSettings, tyro.conf.arg(name="")]
    output: Annotated[OutputSettings, tyro.conf.arg(name="")]
    prior: Annotated[PriorSettings, tyro.conf.arg(name="")] = field(default_factory=PriorSettings)
    adapter: Annotated[AdapterSettings, tyro.conf.arg(name="")] = field(
        default_factory=AdapterSettings
    )
    training: Annotated[TrainingSettings, tyro.conf.arg(name="")] = field(
        default_factory=TrainingSettings
    )
    resume: bool = False
    overwrite: bool = False

    def after_cancel(self) -> str:
        """What to do next, for a person who has pressed Ctrl-C."""
        from cntlora_core.diffusion.job import STATE_NAME

        if (Path(self.output.output) / STATE_NAME).exists():
            return "; the run goes on with --resume"
        return " before the first step; class images and encoded photos are kept for next time"

    def run(self, reporter: ConsoleReporter) -> None:
        from cntlora_core.diffusion.job import personalise

        settings = JobSettings(
            self.model, self.subject, self.output, self.prior, self.adapter, self.training
        )
        result = personalise(
            settings, resume=self.resume, overwrite=self.overwrite, reporter=reporter
        )
        print(result.lora)


@dataclass(frozen=True)
class Sample:
    """Draw pictures from a checkpoint and any number of LoRA files.

    Attributes:
        model: Stable Diffusion 1.5 as one .safetensors file, a diffusers folder or a hub id.
        prompt: One or more prompts.
        output: Folder for the pictures.
        lora: LoRA files; a strength may follow each after a colon: dog.safetensors:0.8
        per_prompt: Pictures for each prompt.
        precision: Data type of the model.
        device: Where to draw; default: CUDA, then MPS, then the CPU.
    """

    model: str
    prompt: tuple[str, ...]
    output: UserPath
    lora: tuple[str, ...] = ()
    per_prompt: int = 1
    drawing: Annotated[SamplingSettings, tyro.conf.arg(name="")] = field(
        default_factory=SamplingSettings
    )
    precision: Precision = "float32"
    device: str | None = None

    def after_cancel(self) -> str:
        return "; the pictures drawn so far are kept"

    def run(self, reporter: ConsoleReporter) -> None:
        from cntlora_core.diffusion.sampler import LoRAUse, draw, load_for_sampling
        from cntlora_core.diffusion.settings import require_unicode
        from cntlora_core.figures.sheets import save_image
        from cntlora_core.metrics.pictures import write_prompts
        from cntlora_core.runtime.files import require_writable_folder, safe_name

        if not self.prompt:
            raise ValueError("give at least one --prompt")
        if not 1 <= self.per_prompt <= MOST_PER_PROMPT:
            raise ValueError(
                f"per_prompt must be at least 1 and at most {MOST_PER_PROMPT}, got "
                f"{self.per_prompt}"
            )
        require_unicode("prompt", *self.prompt)
        folder = require_writable_folder(self.output)
        reporter("loading the model", 0, 1, {})
        pipeline = load_for_sampling(
            self.model,
            [LoRAUse.parse(text) for text in self.lora],
            precision=self.precision,
            device=self.device,
            scheduler=self.drawing.scheduler,
            reporter=reporter,
        )
        reporter("loading the model", 1, 1, {})
        prompts = [prompt for prompt in self.prompt for _ in range(self.per_prompt)]
        at_once = self.drawing.batch_size
        for start in range(0, len(prompts), at_once):
            chosen = prompts[start : start + at_once]
            seeds = [self.drawing.seed + start + i for i in range(len(chosen))]
            pictures = draw(
                pipeline,
                chosen,
                self.drawing,
                seeds=seeds,
                reporter=lambda stage, done, total, values, start=start: reporter(
                    stage, start + done, len(prompts), values
                ),
            )
            drawn: dict[str, str] = {}
            for prompt, seed, picture in zip(chosen, seeds, pictures, strict=True):
                path = folder / f"{safe_name(prompt, max_length=60)}-{seed}.png"
                save_image(picture, path)
                drawn[path.name] = prompt
                print(path)
            write_prompts(folder, drawn)


@dataclass(frozen=True)
class Demo:
    """The main job on the embedded small model, in a few minutes on two CPU cores.

    Attributes:
        output: Folder for everything that the demo leaves.
        subject: Which of the embedded subjects; default: the penguin.
        method: How the adapter starts; `cntlora methods` describes them.
        steps: Training steps.
    """

    output: UserPath = Path("demo_output")
    subject: str | None = None
    method: Method = "cross"
    steps: int = 1000

    def after_cancel(self) -> str:
        return "; the demo starts anew next time"

    def run(self, reporter: ConsoleReporter) -> None:
        from cntlora_core.commands.demo import run_demo

        sheet = run_demo(
            self.output,
            subject_name=self.subject,
            method=self.method,
            steps=self.steps,
            reporter=reporter,
        )
        print(sheet)


@dataclass(frozen=True)
class Inspect:
    """What a LoRA is: base model, method, ranks, norms and spectra of any LoRA file.

    Attributes:
        file: A LoRA of kohya's, diffusers' or peft's make, a folder that peft saved, or the output
            folder of `cntlora train`.
        model: The base model (a .safetensors file, or a folder of diffusers or transformers), for
            norms relative to the frozen weights.
        output: Folder for the pictures; default: beside the file.
        json: Print JSON instead of tables.
        pictures: Draw the rank allocation and the spectra.
    """

    file: tyro.conf.Positional[UserPath]
    model: UserPath | None = None
    output: UserPath | None = None
    json: bool = False
    pictures: bool = True

    def after_cancel(self) -> str:
        return ""

    def run(self, reporter: ConsoleReporter) -> None:
        import json

        from cntlora_core.inspection.inspect import inspect_lora
        from cntlora_core.inspection.view import draw_pictures, show
        from cntlora_core.runtime.progress import stage_progress

        inspection = inspect_lora(
            self.file, model=self.model, progress=stage_progress(reporter, "measuring layers")
        )
        if not self.json:
            show(inspection)
        pictures = draw_pictures(inspection, self.output) if self.pictures else []
        if self.json:
            found = inspection.to_dict() | {"pictures": [str(path) for path in pictures]}
            print(json.dumps(found, indent=2, allow_nan=False))
        else:
            for path in pictures:
                print(path)


@dataclass(frozen=True)
class BenchInit(InitBenchmark):
    __doc__ = InitBenchmark.__doc__

    def after_cancel(self) -> str:
        return f"; what was measured so far is in {self.output}"

    def run(self, reporter: ConsoleReporter) -> None:
        if self.scaling:
            from cntlora_core.benchmark.init_scaling import run_scaling, show_scaling

            show_scaling(run_scaling(self, reporter))
        elif self.tried:
            from cntlora_core.benchmark.init_tried import run_tried, show_tried

            show_tried(run_tried(self, reporter))
        else:
            from cntlora_core.benchmark.init import run_cases, show_cases

            show_cases(run_cases(self, reporter))
        print(self.output)


@dataclass(frozen=True)
class BenchLava(LavaBenchmark):
    __doc__ = LavaBenchmark.__doc__

    def after_cancel(self) -> str:
        return "; the same command goes on from there"

    def run(self, reporter: ConsoleReporter) -> None:
        from cntlora_core.benchmark.lava.run import run_lava, show_lava

        show_lava(run_lava(self, reporter), self)
        print(self.output)


@dataclass(frozen=True)
class BenchConvergence(ConvergenceBenchmark):
    __doc__ = ConvergenceBenchmark.__doc__

    def after_cancel(self) -> str:
        return "; the same command goes on from there"

    def run(self, reporter: ConsoleReporter) -> None:
        from cntlora_core.benchmark.convergence.command import run_convergence

        run_convergence(self, reporter)
        print(self.output)


@dataclass(frozen=True)
class BenchReport(ConvergenceReport):
    __doc__ = ConvergenceReport.__doc__

    def after_cancel(self) -> str:
        return ""

    def run(self, _reporter: ConsoleReporter) -> None:
        from cntlora_core.benchmark.convergence.report import write_report

        for path in write_report(self):
            print(path)


@dataclass(frozen=True)
class Bench:
    """Measure, against named peers, in one run.

    Attributes:
        what: init: the start of an adapter. lava: adapters that keep a convolution's dimensions.
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

    def run(self, reporter: ConsoleReporter) -> None:
        self.what.run(reporter)


@dataclass(frozen=True)
class Methods:
    """The ways to start an adapter: what each reads, what it changes, what a file can hold of it.

    Attributes:
        json: Print the whole records, as JSON.
    """

    json: bool = False

    def after_cancel(self) -> str:
        return ""

    def run(self, _reporter: ConsoleReporter) -> None:
        from cntlora_core.commands.methods import methods_json, methods_table

        if self.json:
            print(methods_json())
            return
        Console(emoji=False).print(methods_table())


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "sample": Sample,
    "demo": Demo,
    "evaluate": Evaluate,
    "inspect": Inspect,
    "bench": Bench,
    "methods": Methods,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns the exit status: 0, 1 for an error in words, 130 after Ctrl-C, 143 after SIGTERM.
    """
    console = message_console()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _plain_errors():
            command = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="cntlora", args=arguments)
    except (ValueError, TypeError) as error:  # a value that its settings refuse
        say(console, f"error: {error}", "red")
        return 2
    _quieten_libraries()
    reporter = ConsoleReporter(console)
    try:
        with reporter.running():
            command.run(reporter)
    except Cancelled as cancelled:
        say(console, f"stopped{command.after_cancel()}")
        return 128 + cancelled.signal
    except KeyboardInterrupt:
        say(console, "interrupted")
        return 130
    except Exception as error:
        if os.environ.get("CNTLORA_TRACEBACK"):
            raise
        if isinstance(error, EXPECTED_ERRORS):
            say(console, f"error: {error}", "red")
        else:
            say(console, unexpected(error), "red")
        return 1
    return 0


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What tyro says on standard error: without its internal names, controls as escapes."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    finally:
        text = re.sub(r"__tyro[-_]dummy[-_]inner__\.?", "", said.getvalue())
        sys.stderr.write(printable(text))


def unexpected(error: Exception) -> str:
    """What to say of an error that nobody has put into words; its traceback goes into a file."""
    if lacks_memory(error):
        return (
            f"error: there is not enough memory ({reason(error)}): lower --resolution, "
            "--batch-size or --rank, or train with --gradient-checkpointing or --precision bfloat16"
        )
    descriptor, name = tempfile.mkstemp(prefix="cntlora-error-", suffix=".txt")
    with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(traceback.format_exception(error)))
    return (
        f"unexpected error: {reason(error)}. This is a defect of cntlora, or of a library that it "
        f"uses: please report it with the traceback, which was written to {name}"
    )


def _quieten_libraries() -> None:
    """Leave out what concerns the libraries' own developers: deprecations, missing extras."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


if __name__ == "__main__":
    sys.exit(main())
