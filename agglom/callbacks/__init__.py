"""Lightning callbacks: progress with throughput and data wait, weight EMA, probes, checkpoints, the run directory."""

from agglom.callbacks.checkpoint_files import Unreadable, checkpoint_path, newest, read_checkpoint, remove_checkpoints
from agglom.callbacks.checkpoints import Checkpoints, Stopped
from agglom.callbacks.ema import WeightEMA
from agglom.callbacks.guard import Guard, NotFinite
from agglom.callbacks.metrics import OnlyFresh, RunCSVLogger, drop_rows_after
from agglom.callbacks.mixing import Mixing
from agglom.callbacks.probes import OnlineProbes
from agglom.callbacks.progress import TrainingProgress
from agglom.callbacks.random_state import RandomState
from agglom.callbacks.run_directory import RunDirectory, export_module, model_differences, origin_of

__all__ = [
    "Checkpoints",
    "Guard",
    "Mixing",
    "NotFinite",
    "OnlineProbes",
    "OnlyFresh",
    "RandomState",
    "RunCSVLogger",
    "RunDirectory",
    "Stopped",
    "TrainingProgress",
    "Unreadable",
    "WeightEMA",
    "checkpoint_path",
    "drop_rows_after",
    "export_module",
    "model_differences",
    "newest",
    "origin_of",
    "read_checkpoint",
    "remove_checkpoints",
]
