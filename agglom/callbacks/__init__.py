"""Lightning callbacks: progress with throughput and data wait, weight EMA, probes, the run directory."""

from agglom.callbacks.ema import WeightEMA
from agglom.callbacks.metrics import RunCSVLogger, drop_rows_after
from agglom.callbacks.probes import OnlineProbes
from agglom.callbacks.progress import TrainingProgress
from agglom.callbacks.run_directory import RunDirectory, Stopped, checkpoint_path, export_module

__all__ = [
    "OnlineProbes",
    "RunCSVLogger",
    "RunDirectory",
    "Stopped",
    "TrainingProgress",
    "WeightEMA",
    "checkpoint_path",
    "drop_rows_after",
    "export_module",
]
