"""Our registries: in a config their entries are called `agglom.NAME`."""

from mmengine.registry import DATASETS as ROOT_DATASETS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry

MODELS = Registry("model", parent=ROOT_MODELS, scope="agglom")
DATASETS = Registry("dataset", parent=ROOT_DATASETS, scope="agglom")
