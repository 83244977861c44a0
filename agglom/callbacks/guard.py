"""Steps that aren't finite are not applied; they are named, counted, and stop the run where there are too many."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Mapping, Sequence, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from agglom.callbacks.spikes import LossSpikes
from agglom.data.ranks import of_all_ranks
from agglom.diagnostics import spread
from agglom.errors import UserError
from agglom.features import Features
from agglom.targets.moments import Statistics, sum_over_ranks

log = logging.getLogger("agglom.fit")

FILE = "nonfinite.jsonl"  # in the run directory: a line for each such step
SHOWN = 5  # keys in a message
CONSTANT = 1e-4  # spread below which a teacher's features count as the same everywhere


class NotFinite(UserError):
    """More steps in a row than allowed had a loss, a gradient or a teacher's features that weren't finite."""


class Guard(pl.Callback):
    """Keeps what isn't finite out of weights, optimiser state and statistics.

    A step whose gradient has no finite norm is not applied: the fused optimisers leave it out on the device, as they do
    for a gradient scaler; of others the host asks. Running statistics (of normalisers, balance, batch norms) return to
    what they were before it. The gradient is that of all ranks, and a loss that isn't finite makes the whole gradient
    so; hence all ranks decide alike. Averaged weights and schedules go on, and the step counts as one.

    What happened is read at logged steps only, when the host waits for the device anyway: then each such step is
    reported with who broke and on which images, here and in nonfinite.jsonl, and more than `limit` in a row raise.
    Spikes of the loss, and teachers whose features are the same everywhere, are reported but stop nothing.

    With fp16, gradients overflow in the regular course of things and the gradient scaler leaves those steps out; there
    only losses and features count.

    Args:
        limit: how many steps in a row may be left out; 0 stops at the first.

    Raises:
        UserError: a negative limit.
    """

    def __init__(self, limit: int = 0) -> None:
        if limit < 0:
            raise UserError(f"model.skip_nonfinite: {limit}; valid: 0 or more; change it")
        self.limit = limit
        self.skipped, self.row = 0, 0  # in all, and at the end of what has been read
        self.spikes = LossSpikes()
        self._statistics: list[tuple[torch.nn.Module, str]] = []
        self._before: list[Tensor] = []
        self._unread: list[dict[str, Any]] = []  # steps since the last logged one; their flags are on the device
        self._constant: set[str] = set()
        self._raise: NotFinite | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        parts = [pl_module.trained, pl_module.balance]
        modules = [module for part in parts for module in cast(torch.nn.Module, part).modules()]
        self._statistics = [(module, name) for module in modules for name in module._buffers]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if self._raise is not None:
            raise self._raise
        if index % trainer.accumulate_grad_batches == 0:
            self._before = [x.clone() for x in self._buffers()]
            self._unread.append({"step": trainer.global_step, "keys": [], "broken": [], "loss": []})
        self._unread[-1]["keys"] += batch["key"]

    def _buffers(self) -> list[Tensor]:
        return [x for module, name in self._statistics if (x := module._buffers[name]) is not None]

    def see(self, loss: Tensor, targets: Mapping[str, Features], terms: Mapping[str, Tensor]) -> Tensor:
        """A micro-batch's loss, and what it was made of; returns a loss whose gradient is finite only where it is.

        Args:
            loss: () the one that is differentiated.
            targets: name -> what the teacher said, normalised.
            terms: name of a teacher or an objective -> its losses.
        """
        if self._unread:
            flags = {f"the {part} of {name}": unfinite(x) for name, part, x in _parts(targets)}
            flags |= {f"the loss of {name}": unfinite(x) for name, x in terms.items()}
            self._unread[-1]["broken"].append(flags)
            self._unread[-1]["loss"].append(loss.detach())
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    @torch.no_grad()
    def judge(
        self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer, clip: float | None, algorithm: str | None
    ) -> None:
        """Clip the gradients of an optimiser step by their norm, and see to it that it isn't applied if that is broken.

        Args:
            trainer: the one that trains.
            optimizer: its gradients are complete and unscaled.
            clip: largest norm (None or 0: not clipped).
            algorithm: "norm", or anything else to leave the clipping to the caller.
        """
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([cast(Tensor, p.grad) for p in weights])
        if clip and algorithm in (None, "norm"):
            clip_grads_with_norm_(weights, clip, norm)
        if hasattr(norm, "full_tensor"):  # of sharded weights
            norm = norm.full_tensor()
        bad = ~norm.isfinite()
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            withhold(optimizer, bad)
        else:
            lost = torch.stack([~loss.isfinite() for loss in self._unread[-1]["loss"]]).any()
            (count,) = sum_over_ranks(lost.float())
            bad = count > 0
        self._unread[-1] |= {"bad": bad, "norm": norm}
        for now, before in zip(self._buffers(), self._before, strict=True):
            # statistics that took their size in this very step began as zeros
            now.copy_(torch.where(bad, before if before.shape == now.shape else torch.zeros_like(now), now))
        self._before = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if "bad" not in self._unread[-1] or trainer.global_step % (trainer.log_every_n_steps or 50):
            return  # accumulating, or not logged
        norm = self._unread[-1]["norm"]
        self.read(trainer)
        pl_module.log_dict(
            {"train/grad_norm": norm, "train/skipped": float(self.skipped)}, on_step=True, on_epoch=False
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.read(trainer)
        if self._raise is not None:
            raise self._raise

    def read(self, trainer: pl.Trainer) -> None:
        """Report the steps since the last call; the host waits for the device. On every rank."""
        steps, self._unread = [step for step in self._unread if "bad" in step], []
        if not steps:
            return
        losses = torch.stack([torch.stack(step["loss"]).mean() for step in steps]).tolist()
        bad = torch.stack([step["bad"] for step in steps]).tolist()
        for step, loss, broken in zip(steps, losses, bad, strict=True):
            step["loss"] = loss
            self.row = self.row + 1 if broken else 0
            step["row"] = self.row
            if (line := None if broken else self.spikes.add(loss)) is not None:
                log.warning("step %d: %s; images %s", step["step"], line, some(step["keys"]))
        found = [step for step, broken in zip(steps, bad, strict=True) if broken]
        if not found:
            return
        for module in {id(m): m for m, _ in self._statistics if isinstance(m, Statistics)}.values():
            module.recount()
        for step in _merged([_told(step) for step in found]):
            self.skipped += 1
            self._report(trainer, step)

    def _report(self, trainer: pl.Trainer, step: dict[str, Any]) -> None:
        what = f"not finite: {', '.join(step['broken'])}; images {some(step['keys'])}"
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(step) + "\n")
        number, row = step["step"], step["row"]
        if row <= self.limit:
            log.warning("step %d is left out (%d in a row, %d in all): %s", number, row, self.skipped, what)
        elif self._raise is None:
            self._raise = NotFinite(
                f"step {number} is left out, and model.skip_nonfinite: {self.limit} allows no more in a row: {what} "
                f"(all are in {FILE}); --ckpt_path last goes on after it; lower model.lr, allow more, or set "
                "model.teachers.NAME.encoder.init_args.dtype: fp32 for a teacher that overflows"
            )

    def look_at(self, targets: Mapping[str, Features], step: int) -> None:
        """Report teachers whose features are the same everywhere, once until they differ again; the host waits.

        Args:
            targets: name -> what the teacher said of a batch, normalised.
            step: for the report.
        """
        found = [(f"the {part} of {n}", x) for n, part, x in _parts(targets) if x.numel() > x.shape[1]]  # rows differ
        spreads = torch.stack([spread(x) for _, x in found]).tolist() if found else []
        for (name, _), value in zip(found, spreads, strict=True):
            if value >= CONSTANT or value != value:
                self._constant.discard(name)
            elif name not in self._constant:
                self._constant.add(name)
                log.warning("step %d: %s is the same everywhere in the batch (spread %.1e)", step, name, value)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "row": self.row, "spikes": self.spikes.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.row = state_dict["skipped"], state_dict["row"]
        self.spikes.restore(state_dict["spikes"])


def _parts(features: Mapping[str, Features]) -> list[tuple[str, str, Tensor]]:
    """(name, "summary" or "spatial", tensor) of all that there are."""
    return [(name, part, x) for name, both in features.items() for part, x in both._asdict().items() if x is not None]


def unfinite(x: Tensor) -> Tensor:
    """() bool: something in x isn't finite. One pass, and nothing of x's size is made."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=x.device)
    low, high = torch.aminmax(x.detach())  # both are NaN where one element is
    return ~(low.isfinite() & high.isfinite())


def withhold(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Let the optimiser's next step do nothing if () bool `bad` is true.

    Fused Adam reads it on the device. For others the host has to wait, and takes the gradients away.
    """
    if isinstance(optimizer, torch.optim.Adam) and optimizer.defaults.get("fused"):  # AdamW is one
        cast(Any, optimizer).found_inf = bad.float()
    elif bool(bad):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = None


def some(keys: Sequence[str]) -> str:
    """The first few keys, and how many more there are."""
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


def _told(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step's record in plain values."""
    names = dict.fromkeys(name for flags in step["broken"] for name in flags)
    broken = [name for name in names if any(bool(flags[name]) for flags in step["broken"] if name in flags)]
    return {key: step[key] for key in ("step", "row", "loss")} | {
        "broken": broken or ["the gradient"],
        "norm": float(step["norm"]),
        "keys": list(step["keys"]),
    }


def _merged(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same steps with what broke on any rank, and the images of all ranks where it did."""
    out = []
    for same in zip(*of_all_ranks(steps), strict=True):
        guilty = [step for step in same if step["broken"] != ["the gradient"]] or list(same)
        broken = list(dict.fromkeys(name for step in guilty for name in step["broken"]))
        out.append({**guilty[0], "broken": broken, "keys": [key for step in guilty for key in step["keys"]]})
    return out
