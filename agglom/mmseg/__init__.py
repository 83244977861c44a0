"""Our models and shards inside mmsegmentation: `agglom.Backbone`, `agglom.BatchNorm` and `agglom.ShardDataset`.

Importing this package registers them; a config does it with `custom_imports = dict(imports=["agglom.mmseg"])`. Runner,
heads, pipelines, samplers, inference and metrics are mmseg's own.
"""

from agglom.mmseg.ops import MissingExtra, import_mmseg

import_mmseg()

from agglom.mmseg.backbone import Backbone, BatchNorm  # noqa: E402
from agglom.mmseg.checkpoints import load_from_local  # noqa: E402
from agglom.mmseg.shards import ShardDataset, ShardFile  # noqa: E402

__all__ = ["BatchNorm", "Backbone", "MissingExtra", "ShardDataset", "ShardFile", "load_from_local"]
