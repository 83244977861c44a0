"""A process that extracts features in small parts; run by test_extract.py, which imports its model too.

    python extraction_job.py DATA CACHE LOG RANK WORLD_SIZE [DIE_AFTER]

LOG gets the number of images of every forward pass but the fingerprint's. After DIE_AFTER of them the process kills
itself with SIGKILL, before the answer is given.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from agglom.features import Answer, Features, InputSpec
from agglom.probes import extract as room
from agglom.probes.source import Source

PART, BATCH = 8, 4  # images


class Student(nn.Module):
    """Two blocks and adaptors, all out of one counted pass."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.input = InputSpec(size=(16, 16), stride=4)
        self.net = nn.Conv2d(3, 6, 4, 4).requires_grad_(False)
        self.head = nn.Conv2d(6, 5, 1).requires_grad_(False)
        for tensor in self.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        self.passes: list[int] = []
        self.log: Path | None = None
        self.die_after = -1

    @property
    def adaptors(self):
        return {"sam": lambda images: self.through(self.net(images))}

    def through(self, spatial):
        return Features(None, self.head(spatial).relu())

    def forward(self, images):
        spatial = self.net(images)
        return Features(spatial.amax((2, 3)), spatial.tanh())

    def answer(self, images, *, blocks=0, adaptors=()):
        self.passes.append(len(images))
        if self.log is not None:
            with open(self.log, "a") as stream:
                stream.write(f"{len(images)}\n")
        if len(self.passes) == self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        spatial = self.net(images)
        last = [Features(x.amax((2, 3)), x) for x in (spatial, spatial.sin(), spatial.tanh())]
        return Answer(
            self(images), last[-blocks:] if blocks else [], {name: self.through(spatial) for name in adaptors}
        )


def wanted(model, **changes):
    return {"student": room.Wanted(model, **{"spatial": True, "blocks": 2, "adaptors": ("sam",)} | changes)}


def main(data, cache, log, rank, world_size, die_after="-1"):
    room.PART = PART
    model = Student()
    model.log, model.die_after = Path(log), int(die_after)
    source = Source.open(data, fields=("cls",))
    room.extract(wanted(model), source, "train", Path(cache), batch=BATCH, rank=int(rank), world_size=int(world_size))


if __name__ == "__main__":
    main(*sys.argv[1:])
