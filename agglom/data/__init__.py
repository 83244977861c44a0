"""Shards, views, the data module and the embedded data set.

The names below load on first use: a shard writer's worker processes should not pay for importing torch.
"""

from __future__ import annotations

from typing import Any

_LAZY = {
    "Index": "agglom.data.index",
    "ShardInfo": "agglom.data.index",
    "read_index": "agglom.data.index",
    "validate_layout": "agglom.data.index",
    "write_index": "agglom.data.index",
    "write_shard": "agglom.data.shards",
    "write_imagefolder": "agglom.data.imagefolder",
    "write_coco": "agglom.data.coco",
    "write_ade": "agglom.data.ade",
    "write_voc": "agglom.data.voc",
    "write_csv": "agglom.data.csv_table",
    "Writing": "agglom.data.writing",
    "collate": "agglom.data.samples",
    "decode_image": "agglom.data.samples",
    "eval_stream": "agglom.data.streams",
    "train_stream": "agglom.data.streams",
    "arrived": "agglom.data.arrival",
    "ColourOptions": "agglom.data.colours",
    "Loader": "agglom.data.loader",
    "eval_loader": "agglom.data.loader",
    "GapOptions": "agglom.data.mixture",
    "Source": "agglom.data.mixture",
    "follow": "agglom.data.mixture",
    "CropOptions": "agglom.data.crops",
    "MultiCrop": "agglom.data.crops",
    "block_masks": "agglom.data.masks",
    "most_masked": "agglom.data.masks",
    "positions": "agglom.data.masks",
    "EvalView": "agglom.data.views",
    "TrainView": "agglom.data.views",
    "View": "agglom.data.views",
    "ShardDataModule": "agglom.data.datamodule",
    "ViewOptions": "agglom.data.datamodule",
    "view_options": "agglom.data.datamodule",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'agglom.data' has no attribute {name!r}")
