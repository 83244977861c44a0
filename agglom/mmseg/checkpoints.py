"""mmengine's checkpoints under torch's safe unpickling."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.runner.checkpoint import load_from_local as load

if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
    from numpy._core import multiarray
else:
    from numpy.core import multiarray  # type: ignore[no-redef]


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """mmengine's loader for local files, allowed to read the log histories that its checkpoints hold.

    torch.load unpickles weights only since 2.6 and refuses those histories, so mmengine 0.10 can neither test nor
    resume what it has saved. They need numpy arrays and HistoryBuffer with its methods, which is all that is let in.
    """
    allowed: list[Any] = [HistoryBuffer, np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar]
    allowed += [type(np.dtype(kind)) for kind in ("float64", "float32", "int64")]
    with torch.serialization.safe_globals([*allowed, (_method, "builtins.getattr")]):
        return load(filename, map_location)


def _method(owner: Any, name: str) -> Any:
    """What a pickled method becomes; of any other owner `getattr` would be a way out."""
    if owner is not HistoryBuffer:
        raise ValueError(f"{owner!r}.{name}: a checkpoint may only name methods of HistoryBuffer")
    return getattr(owner, name)


CheckpointLoader.register_scheme("", load_from_local, force=True)
