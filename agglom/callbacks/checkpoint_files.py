"""The checkpoints of a run on disk: written whole or not at all, read with a reason where they can't be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from agglom.errors import UserError, brief
from agglom.whole import sync

TEMPORARY = ".tmp"  # the end of the name of what is being written
NEEDED = ("state_dict", "optimizer_states", "loops", "global_step")


class Unreadable(UserError):
    """A file that is no checkpoint, or no whole one. The message says why."""


def checkpoint_path(root: str | Path) -> Path:
    """Where a run keeps its newest checkpoint. The one of step N before it is beside it, as step-N.ckpt."""
    return Path(root) / "checkpoints" / "last.ckpt"


def temporary_path(root: str | Path) -> Path:
    """Where a checkpoint is written before `publish`."""
    return checkpoint_path(root).with_name(checkpoint_path(root).name + TEMPORARY)


def publish(root: str | Path, step: int, keep: int) -> Path:
    """Make what is at `temporary_path` the newest checkpoint of a run, and remove those that are too many.

    Whenever the process dies, `last.ckpt` is a whole checkpoint: the old one or the new one.

    Args:
        root: the run directory.
        step: optimiser steps that the checkpoint holds.
        keep: checkpoints to keep, this one included. Those of later steps go: the run has been resumed before them.
    """
    new, last = temporary_path(root), checkpoint_path(root)
    sync(new)
    new.replace(last)
    if keep > 1:
        _alias(last, last.with_name(f"step-{step:09d}.ckpt"))
    sync(last.parent)
    for path in _numbered(root):
        if _step(path) > step:
            path.unlink(missing_ok=True)
    for path in _numbered(root)[keep if keep > 1 else 0 :]:
        path.unlink(missing_ok=True)
    return last


def remove_temporaries(root: str | Path) -> None:
    """What a process that died in the middle of writing has left."""
    for path in checkpoint_path(root).parent.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def remove_checkpoints(root: str | Path) -> None:
    """Of a run that is started anew: `last` must not find those of the run before."""
    for path in (checkpoint_path(root), *_numbered(root)):
        path.unlink(missing_ok=True)


def candidates(root: str | Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    last, others = checkpoint_path(root), _numbered(root)
    if not last.exists():
        return others
    return [last, *(path for path in others if not path.samefile(last))]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint, on the CPU; only tensors and plain values are ever read.

    Raises:
        Unreadable: missing, empty, cut off, of another program, or without what a training goes on from.
    """
    try:
        if not path.stat().st_size:
            raise Unreadable("empty file")
        state = torch.load(path, weights_only=True, map_location="cpu")
    except UserError:
        raise
    except OSError as err:
        raise Unreadable(err.strerror or brief(err)) from err
    except Exception as err:  # zip, pickle and torch's own: whatever they raise is about the file
        raise Unreadable(f"{type(err).__name__}: {brief(err, 120)}") from err
    missing = [key for key in NEEDED if key not in state] if isinstance(state, dict) else list(NEEDED)
    if missing:
        raise Unreadable(f"no checkpoint of a training: it has no {', '.join(missing)}")
    return state


def newest(root: str | Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint of a run that can be read.

    Returns:
        Its path, what it holds, and a line for each newer one that can't be read.

    Raises:
        Unreadable: there is none.
    """
    lines: list[str] = []
    for path in candidates(root):
        try:
            return path, read_checkpoint(path), lines
        except Unreadable as err:
            lines.append(f"{path} can't be read ({err})")
    raise Unreadable("; ".join(lines) or f"{checkpoint_path(root)} does not exist")


def _numbered(root: str | Path) -> list[Path]:
    """step-N.ckpt of a run, the latest step first."""
    found = [path for path in checkpoint_path(root).parent.glob("step-*.ckpt") if path.stem[5:].isdigit()]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.stem[5:])


def _alias(path: Path, name: Path) -> None:
    """A second name of a file; a copy where the file system has no such thing."""
    temporary = name.with_name(name.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
        sync(temporary)
    temporary.replace(name)
    temporary.unlink(missing_ok=True)  # a rename between two names of one file does nothing
