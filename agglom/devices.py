"""Where a command computes: an accelerator where there is one, or what its --device says."""

from __future__ import annotations

import torch

from agglom.data.ranks import distributed
from agglom.errors import UserError


def choose(asked: str = "auto") -> torch.device:
    """The device of this process; with `auto`, the ranks of a machine share its accelerators out in turns.

    Args:
        asked: auto, cpu, or a device of this machine as torch calls it, such as cuda or cuda:1.

    Raises:
        UserError: there is no such device.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if asked == "auto":
        if found is None:
            return torch.device("cpu")
        return torch.device(found.type, distributed()[0] % torch.accelerator.device_count())
    try:
        device = torch.device(asked)
        there = device.type == "cpu" or (found is not None and device.type == found.type)
        if there and (device.index or 0) < (torch.accelerator.device_count() if device.type != "cpu" else 1):
            return device
    except RuntimeError:  # a word that torch doesn't know
        pass
    here = "" if found is None else f", {found.type}:0 to {found.type}:{torch.accelerator.device_count() - 1}"
    raise UserError(f"device: {asked}; valid here: auto, cpu{here}; take one")
