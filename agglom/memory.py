"""How much memory a process has needed at most."""

from __future__ import annotations

import resource
from pathlib import Path

import torch


def peak_resident() -> int:
    """Bytes of main memory that this process has held at most."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS, whose ru_maxrss is in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # not ru_maxrss: Linux hands a parent's on to its child
    lines = status.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak_memory(device: torch.device) -> str:
    """`peak memory: 1.52 GiB` of this process, and of its tensors on the device where it has memory of its own."""
    parts = [f"{peak_resident() / 2**30:.2f} GiB"]
    if device.type in ("cuda", "xpu"):
        parts.append(f"{torch.accelerator.max_memory_allocated(device) / 2**30:.2f} GiB on {device}")
    return "peak memory: " + ", ".join(parts)
