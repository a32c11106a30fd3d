"""Cost of the initialisation: against the bare forward passes, and against peft's EVA and CorDA.

Every measurement is a process of its own (`init_worker`), so that peaks of memory are its own and a
initialisation that does not end can be ended. What the numbers mean is told in
docs/experiments/initialization_speed.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from cntlora_core.benchmark.init_cases import INIT_CASES
from cntlora_core.benchmark.init_plots import plot_cases
from cntlora_core.benchmark.init_settings import InitBenchmark
from cntlora_core.benchmark.init_worker import (
    InitTask,
    check_method,
    task_to_json,
)
from cntlora_core.benchmark.peak import peak_bytes
from cntlora_core.runtime.console import result_console
from cntlora_core.runtime.files import require_writable_folder, write_json_atomic
from cntlora_core.runtime.progress import Reporter, silent

TARGETS = {"total_over_forwards": 1.15, "times_faster": 10.0, "memory_over_moments": 1.10}
"""What is to be reached: at most, at least, at most."""

_POLL_SECONDS = 0.1
_TELL_SECONDS = 1.0


def run_worker(
    task: InitTask, limit: float, log: Path, tell: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """One measurement in a process of its own, which is ended if the initialisation takes too long.

    Args:
        task: What is measured.
        limit: Seconds that the initialisation may take, beyond building the model and the bare
            passes.
        log: The process's output is added to this file.
        tell: Called about once a second; what it raises ends the process.

    Returns:
        What `init_worker.measure` returns, and ``ended``. Where that is false: what was known by
        then, ``limit`` or ``failed`` (the last line that the process said).
    """
    with tempfile.TemporaryDirectory() as name, log.open("ab") as stream:
        task_file, result_file = Path(name) / "task.json", Path(name) / "result.json"
        write_json_atomic(task_file, task_to_json(task))
        module = "cntlora_core.benchmark.init_worker"
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(task_file), str(result_file)],
            stdout=stream,
            stderr=stream,
            start_new_session=True,  # Ctrl-C is this process's to handle
        )
        started = told = None
        out_of_time = False
        try:
            while process.poll() is None:
                now = time.monotonic()
                if started is None and result_file.exists():
                    started = now
                if started is not None and now - started > limit:
                    out_of_time = True
                    break
                if told is None or now - told > _TELL_SECONDS:
                    told = now
                    tell()
                time.sleep(_POLL_SECONDS)
            peak = None
            if out_of_time:
                with suppress(OSError):
                    peak = peak_bytes(str(process.pid))
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        found: dict[str, Any] = {}
        if result_file.exists():
            found = json.loads(result_file.read_text("utf-8"))
    found.pop("started", None)
    # One that ended between two looks at the clock may have taken too long all the same.
    if out_of_time or found.get("total_seconds", 0.0) > limit:
        return found | {"ended": False, "limit": limit, "method_peak": peak}
    if process.returncode != 0 or "total_seconds" not in found:
        return found | {"ended": False, "failed": _last_words(log, process.returncode)}
    return found | {"ended": True}


def _last_words(log: Path, code: int) -> str:
    if code < 0:
        return f"the process was ended by signal {-code}"
    lines = log.read_text("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {code}")


def run_cases(settings: InitBenchmark, reporter: Reporter = silent) -> dict[str, Any]:
    """Measure all cases; writes ``cases.json`` and ``cases.png`` and returns what the former holds.

    Raises:
        OSError: the output folder cannot be written to.
        ValueError: for a method that there is not, or that cannot be measured.
    """
    for method in settings.methods:
        check_method(method)
    folder = require_writable_folder(settings.output)
    log = folder / "cases.log"
    log.unlink(missing_ok=True)
    methods = [
        "cntlora",
        *(m for m in dict.fromkeys(settings.methods) if m != "cntlora"),
    ]
    rival_repeats = settings.rival_repeats or settings.repeats
    ours = sum(map(_is_ours, methods))
    total = len(settings.cases) * (ours * settings.repeats + (len(methods) - ours) * rival_repeats)
    done = 0
    cases: dict[str, Any] = {}
    result = {"settings": _json_values(settings), "machine": machine(), "targets": TARGETS}
    for case in settings.cases:
        runs: dict[str, list[dict[str, Any]]] = {}
        # In turn, so that a slow spell of the machine meets all of them.
        for repeat in range(settings.repeats):
            for method in methods if repeat < rival_repeats else filter(_is_ours, methods):
                if not all(run["ended"] for run in runs.get(method, [])):
                    done += 1
                    continue  # it would not end the next time either
                stage = f"measuring {case}"
                task = InitTask(
                    case,
                    method,
                    settings.quick,
                    None if settings.model is None else str(settings.model),
                    settings.threads,
                    settings.seed,
                )
                run = run_worker(
                    task,
                    settings.limit,
                    log,
                    lambda stage=stage, done=done: reporter(stage, done, total, {}),
                )
                done += 1
                runs.setdefault(method, []).append(run)
                note = f"{case}, {method}, run {repeat + 1}: {_in_words(run)}"
                reporter(stage, done, total, {"note": note})
        cases[case] = {
            "title": INIT_CASES[case].title + (" (tiny)" if settings.quick else ""),
            "runs": runs,
            "summary": summarise(runs),
        }
        result["cases"] = cases
        write_json_atomic(folder / "cases.json", result)
    plot_cases(result, folder / "cases.png")
    return result


def _in_words(run: dict[str, Any]) -> str:
    if "failed" in run:
        return f"failed: {run['failed']}"
    if not run["ended"]:
        return f"did not end in {run['limit']:g} s ({run.get('forwards_run', 0)} forward passes)"
    return (
        f"{run['total_seconds']:.1f} s, bare forward passes {run['forward_seconds']:.1f} s, "
        f"peak {decimal(run['method_peak'])} against {decimal(run['forward_peak'])}"
    )


def _is_ours(method: str) -> bool:
    return method.startswith("cntlora")


def linear_algebra_seconds(run: dict[str, Any]) -> float:
    """What an initialisation took beyond its forward passes, at the speed of the bare ones.

    For ours at least the time that it spent after them, whatever the noise of the passes.
    """
    passes = run["forwards_run"] * run["forward_seconds"] / run["batches"]
    return max(run["total_seconds"] - passes, run.get("solve_seconds", 0.0), 1e-9)


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians and ratios of one case's runs, by method.

    For each: ``total_seconds``, ``forward_seconds``, ``total_over_forwards``,
    ``linear_algebra_seconds``, ``extra_bytes`` (peak in the initialisation less peak in the bare
    passes). For ours also ``memory_over_moments``; for the others ``times_faster``: their linear
    algebra over ours, or ``times_faster_at_least`` for one that did not end, and the same over that
    of ``cntlora-fixed``, where it ran, as ``times_faster_fixed`` and
    ``times_faster_fixed_at_least``.
    """
    summary: dict[str, Any] = {}
    for method, all_runs in runs.items():
        ended = [run for run in all_runs if run["ended"]]
        if not ended:
            summary[method] = {"ended": False, **_of_unended(all_runs[0])}
            continue
        summary[method] = {
            "ended": len(ended) == len(all_runs),
            "total_seconds": median(r["total_seconds"] for r in ended),
            "forward_seconds": median(r["forward_seconds"] for r in ended),
            "total_over_forwards": median(r["total_seconds"] / r["forward_seconds"] for r in ended),
            "linear_algebra_seconds": median(linear_algebra_seconds(r) for r in ended),
            "forwards_run": median(r["forwards_run"] for r in ended),
            "extra_bytes": median(r["method_peak"] - r["forward_peak"] for r in ended),
            "adapter_bytes": ended[0]["adapter_bytes"],
        }
        if _is_ours(method):
            own = summary[method]
            for key in ("points", "distinct_inputs", "moment_bytes"):
                own[key] = ended[0][key]
            for key in ("capture_seconds", "solve_seconds"):
                own[key] = median(r[key] for r in ended)
            own["memory_over_moments"] = own["extra_bytes"] / own["moment_bytes"]
    for own, key in (("cntlora", "times_faster"), ("cntlora-fixed", "times_faster_fixed")):
        ours = summary.get(own, {}).get("linear_algebra_seconds")
        for method, other in summary.items() if ours else ():
            if _is_ours(method) or "failed" in other:
                continue
            seconds = other.get("linear_algebra_seconds")
            if other.get("total_seconds") is not None:
                other[key] = seconds / ours
            elif seconds is not None:
                other[f"{key}_at_least"] = seconds / ours
    return summary


def _of_unended(run: dict[str, Any]) -> dict[str, Any]:
    if "failed" in run:
        return {"failed": run["failed"]}
    found = {"limit": run["limit"], "forwards_run": run.get("forwards_run", 0)}
    if "forward_seconds" in run:
        passes = run.get("forwards_run", 0) * run["forward_seconds"] / run["batches"]
        found |= {
            "forward_seconds": run["forward_seconds"],
            "linear_algebra_seconds": max(run["limit"] - passes, 0.0),
        }
        if run.get("method_peak"):
            found["extra_bytes"] = run["method_peak"] - run["forward_peak"]
    return found


def show_cases(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the summaries as a table."""
    table = Table("case", "initialisation", title="medians", title_justify="left")
    for heading in (
        *("bare forwards, s", "total, s", "total / forwards", "linear algebra, s"),
        *("ours is faster by", "extra memory", "/ moments"),
    ):
        table.add_column(heading, justify="right")
    for name, case in result["cases"].items():
        table.add_section()
        for method, found in case["summary"].items():
            table.add_row(name, method, *_cells(found))
    (console or result_console()).print(table)


def _cells(found: dict[str, Any]) -> list[str]:
    def number(key: str, form: str) -> str:
        value = found.get(key)
        return "" if value is None else form.format(value)

    if "failed" in found:
        return ["", "failed", "", "", "", "", ""]
    over = f"> {found['limit']:g}" if "total_seconds" not in found else ""
    memory = found.get("extra_bytes")
    return [
        number("forward_seconds", "{:.2f}"),
        over or number("total_seconds", "{:.2f}"),
        number("total_over_forwards", "{:.3f}"),
        ("> " if over else "") + number("linear_algebra_seconds", "{:.2f}"),
        number("times_faster", "{:.1f}") or number("times_faster_at_least", "> {:.1f}"),
        "" if memory is None else decimal(max(memory, 0)),
        number("memory_over_moments", "{:.2f}"),
    ]


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "peft", "transformers", "diffusers")},
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _json_values(settings: InitBenchmark) -> dict[str, Any]:
    values = dataclasses.asdict(settings)
    values.pop("output")
    values["model"] = None if settings.model is None else settings.model.name
    return values
