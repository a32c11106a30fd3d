"""Many small independent problems at once: one thread each, in place of all threads for each.

A 1280 x 1280 eigenproblem gains little from a second thread, and loses much where other work
shares the machine; two such problems side by side gain fully.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """``[function(item) for item in items]``, as many at a time as torch has threads.

    Within ``function`` torch computes on one thread; its number of threads is restored afterwards.
    An exception of any item, or of ``progress``, is raised once the running items have ended.

    Args:
        function: Does its work in torch, which leaves other Python threads free meanwhile.
        items: What it is called with.
        progress: Called with (done, total) before the first item and after each.
    """
    threads = torch.get_num_threads()
    total = len(items)
    if progress is not None:
        progress(0, total)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = [pool.submit(function, item) for item in items]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            if progress is not None:
                progress(done, total)
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
