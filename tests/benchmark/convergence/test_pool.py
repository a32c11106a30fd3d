"""Processes that do tasks: errors become words, and a process that dies is replaced."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from cntlora_core.benchmark.convergence.pool import ProcessPool
from cntlora_core.runtime.progress import silent

WORK = """
import os, signal, time

def work(task, reporter):
    kind, path = task
    if kind == "raise":
        raise ValueError("no such thing")
    if kind == "wait":
        try:
            reporter("training", 1, 2, {})
            time.sleep(60)
        except BaseException as error:
            with open(path, "w") as file:
                file.write(type(error).__name__)
            raise
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    reporter("training", 1, 2, {})
    with open(path, "w") as file:
        file.write(os.environ["OMP_NUM_THREADS"] + " " + str(os.getpid()))
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch):
    (tmp_path / "work_of_a_test.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    import work_of_a_test  # pyright: ignore[reportMissingImports]

    yield work_of_a_test.work
    sys.modules.pop("work_of_a_test")


def test_all_others_are_done(work, tmp_path: Path):
    kinds = ["write", "raise", "die", "write", "write"]
    tasks = [(kind, str(tmp_path / str(i))) for i, kind in enumerate(kinds)]
    with ProcessPool(1) as pool:
        outcomes = {o.task: o for o in pool.run(work, tasks, silent, "work")}
        again = list(pool.run(work, tasks[:1], silent, "work"))
    assert sorted(outcomes) == [0, 1, 2, 3, 4]
    assert outcomes[1].error == "ValueError: no such thing"
    assert "in work" in outcomes[1].traceback
    assert outcomes[2].error == "its process was ended by signal 9"
    assert [outcomes[i].error for i in (0, 3, 4)] == [None] * 3
    assert again[0].error is None
    told = [(tmp_path / str(i)).read_text().split() for i in (0, 3, 4)]
    assert {threads for threads, _ in told} == {"1"}
    assert told[0][1] == told[2][1]  # the second process: `again` has written 0 anew
    assert told[1][1] == told[2][1]


def test_what_the_reporter_raises_ends_the_processes_which_can_save_what_they_have(work, tmp_path):
    def stop(_stage, _done, _total, values):
        if values["within"]:
            raise KeyboardInterrupt

    path = tmp_path / "ended"
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), ProcessPool(1) as pool:
        list(pool.run(work, [("wait", str(path))], stop, "work"))
    assert time.monotonic() - began < 50
    assert path.read_text() == "SystemExit"
