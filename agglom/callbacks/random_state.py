"""The global random generators in a checkpoint: dropout and its like go on where they were."""

from __future__ import annotations

import random
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch

from agglom.data.ranks import of_all_ranks
from agglom.draws import keyed


class RandomState(pl.Callback):
    """Saves the state of Python's, numpy's and torch's generators on every rank, and restores it in a resumed run.

    Everything else that is random in a run follows from a key (`agglom.draws`) or has its own state. A run that is
    resumed with another number of ranks gets generators that follow from the step and the rank.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": of_all_ranks(capture())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["ranks"]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # Not before: what a start draws (initial weights, loaders) would come on top.
        if not self._restored:
            return
        if len(self._restored) == trainer.world_size:
            restore(self._restored[trainer.global_rank])
        else:
            seed = keyed("resumed", trainer.global_step, trainer.global_rank)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        self._restored = []


def capture() -> dict[str, Any]:
    """The generators' states, in types that `torch.load` takes with `weights_only=True`."""
    version, words, gauss = random.getstate()
    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Put the generators into states from `capture`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
