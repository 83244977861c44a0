"""Which process this is of how many."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info


class Slot(NamedTuple):
    """Which reader of how many, over all ranks and workers; and which worker of its rank."""

    number: int
    total: int
    worker: int


def slot_of(rank: int, world_size: int, turn: int = 0) -> Slot:
    """This process's place among all readers; `turn`: which reader of a rank its first worker is."""
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    worker = (worker + turn) % workers
    return Slot(rank * workers + worker, world_size * workers, worker)


def distributed() -> tuple[int, int]:
    """(rank, world size) of this process: torch.distributed's, else torchrun's or SLURM's environment, else (0, 1)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    # SLURM_STEP_NUM_TASKS and not SLURM_NTASKS: a bare `python` in a batch script is one process, whatever was allotted
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def of_all_ranks(here: Any) -> list[Any]:
    """An object of each rank, in their order; all ranks call it together. Alone: `[here]`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [here]
    ranks = [here] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, here)
    return ranks
