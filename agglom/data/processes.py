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


MOST_READERS = 8  # of a rank, when their number is chosen for it


def readers(shards: int, *, ranks: int, local_ranks: int) -> int:
    """How many processes of a rank should read: a core each, but for one that trains.

    Args:
        shards: of the training split; each reader needs one.
        ranks: in all.
        local_ranks: on this machine, which share its cores.
    """
    return max(1, min(cores() // local_ranks - 1, shards // ranks, MOST_READERS))


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
