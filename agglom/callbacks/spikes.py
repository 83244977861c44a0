"""Losses that stand out from those before them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any


class LossSpikes:
    """Tells losses that are far above the recent ones.

    A spike exceeds the median of the last `window` losses by `far` of their (normal-consistent) median absolute
    deviations and by a fifth of itself; losses that a spike is followed by are told at most once a window.

    Args:
        window: losses that are kept, at most; a quarter of it is needed before anything is told.
        far: see above.
    """

    def __init__(self, window: int = 200, far: float = 10.0) -> None:
        self.window, self.far = window, far
        self._recent: deque[float] = deque(maxlen=window)
        self._quiet = 0

    def add(self, loss: float) -> str | None:
        """The next loss; what is to be said of it, or None."""
        self._quiet = max(0, self._quiet - 1)
        line = None
        if len(self._recent) >= self.window // 4 and math.isfinite(loss):
            middle = statistics.median(self._recent)
            deviation = 1.4826 * statistics.median(abs(x - middle) for x in self._recent)
            if loss > max(middle + self.far * deviation, middle + 0.2 * abs(middle)) and not self._quiet:
                line = f"the loss is {loss:.4g} after a median of {middle:.4g} over {len(self._recent)} steps"
                self._quiet = self.window
        self._recent.append(loss)
        return line

    def state(self) -> list[Any]:
        """For a checkpoint."""
        return [list(self._recent), self._quiet]

    def restore(self, state: list[Any]) -> None:
        """Go on from `state`."""
        recent, self._quiet = state
        self._recent = deque(recent, maxlen=self.window)
