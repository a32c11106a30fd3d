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
from importlib.util import find_spec
from typing import Any

import tyro
from rich.console import Console

from cntlora_core.commands.compare import Compare
from cntlora_core.commands.config_file import with_config
from cntlora_core.commands.demo import Demo
from cntlora_core.commands.dynamics import Dynamics
from cntlora_core.commands.evaluate import Evaluate
from cntlora_core.commands.flags import RefusedError, registry
from cntlora_core.commands.inspect import Inspect
from cntlora_core.commands.launch import check_processes, run_together
from cntlora_core.commands.methods import Methods
from cntlora_core.commands.pick import Pick
from cntlora_core.commands.sample import Sample
from cntlora_core.commands.task import Task
from cntlora_core.commands.train import Train
from cntlora_core.runtime.console import Cancelled, ConsoleReporter, message_console, say
from cntlora_core.runtime.launching import OtherProcessError, launched
from cntlora_core.runtime.reading import lacks_memory, printable, reason

EXPECTED_ERRORS = (ValueError, OSError, FloatingPointError, ImportError, OtherProcessError)

BENCH_IS_ELSEWHERE = (
    "the measurements are not installed with the package: run `cntlora bench` in a checkout of the "
    "repository, after `pip install -e .` there"
)
COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "sample": Sample,
    "compare": Compare,
    "pick": Pick,
    "demo": Demo,
    "evaluate": Evaluate,
    "dynamics": Dynamics,
    "inspect": Inspect,
    "methods": Methods,
    "task": Task,
}
if find_spec("cntlora_core.benchmark") is not None:  # a checkout: the wheel has no measurements
    from cntlora_core.commands.bench import Bench

    COMMANDS["bench"] = Bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns the exit status: 0, 1 for an error in words, 130 after Ctrl-C, 143 after SIGTERM.
    """
    console = message_console()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["bench"] and "bench" not in COMMANDS:
        say(console, f"error: {BENCH_IS_ELSEWHERE}", "red")
        return 2
    try:
        rules, arguments = registry(with_config(arguments))
        with _plain_errors():
            command = tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="cntlora", args=arguments, registry=rules
            )
    except (RefusedError, ValueError, TypeError, OSError) as error:
        say(console, f"error: {error}", "red")
        return 2
    _quieten_libraries()
    if isinstance(command, Train) and command.processes != 1 and not launched():
        return _train_together(command, arguments[1:], console)
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


def _train_together(command: Train, arguments: Sequence[str], console: Console) -> int:
    try:
        check_processes(command.processes, command.training)
    except ValueError as error:
        say(console, f"error: {error}", "red")
        return 2
    return run_together(arguments, command.processes, console)


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
