"""Jobs over processes, for what writes and reads whole shards."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Callable, Iterator, Sequence, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int | None) -> Iterator[Result]:
    """The results in the order of the jobs, each as soon as those before it are there.

    Args:
        work: can be pickled, as jobs and results can.
        jobs: what to call it with.
        workers: processes; 1 works in this one; None: one a core.
    """
    processes = min(workers or cores(), len(jobs))
    if processes <= 1:
        yield from map(work, jobs)
        return
    # spawn: the forked child of a process with torch's threads may hang
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, jobs)
