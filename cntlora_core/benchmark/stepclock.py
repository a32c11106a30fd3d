"""Run a Python program and note when each of its optimizer steps ended, and its peak memory.

    python -m cntlora_core.benchmark.stepclock RESULT.json PROGRAM [ARGUMENTS ...]

``PROGRAM`` is a script, or ``-m`` and a module. Works for any program that trains with
``torch.optim``: the clock is a global post-hook of the optimizers.
"""

from __future__ import annotations

import resource
import runpy
import signal
import sys
import time

from cntlora_core.runtime.files import write_json_atomic


def main() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    result, program, *arguments = sys.argv[1:]
    times: list[float] = []
    register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # a server is ended from outside
    try:
        if program == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [program, *arguments]
            runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        write_json_atomic(result, {"step_ends": times, "peak_bytes": peak})


if __name__ == "__main__":
    main()
