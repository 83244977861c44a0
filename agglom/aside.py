"""Teachers beside the student: on a device with streams their forward passes need not wait for each other."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import torch

STREAMS = ("cuda", "xpu")  # devices whose streams run side by side


class Aside:
    """A stream beside the main one. Elsewhere (CPU) nothing happens: all runs in the order of the calls.

    Between `beside` and `join` the two run at the same time. The stream waits for the main one when it begins and the
    main one for it at the join, in every step; so memory that one of them frees and gets again is never still in use
    by the other, and no tensor needs `record_stream`, which would keep it longer.
    """

    def __init__(self) -> None:
        self._stream: torch.Stream | None = None

    @contextmanager
    def beside(self, device: torch.device) -> Iterator[None]:
        """What is called inside runs on the stream, after everything that the main stream has been given so far."""
        if device.type not in STREAMS:
            yield
            return
        if self._stream is None:
            self._stream = torch.Stream(device)
        self._stream.wait_stream(torch.accelerator.current_stream(device))
        with self._stream:
            yield

    def join(self, device: torch.device) -> None:
        """To be called before the main stream uses what was made beside it."""
        if self._stream is not None:
            torch.accelerator.current_stream(device).wait_stream(self._stream)
