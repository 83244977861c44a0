"""Which model, which data: short hashes that key the feature cache and go into the report."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from agglom.features import Backbone

_HEAD = 65_536  # bytes of each local shard that go into the data hash


def weights_hash(model: Backbone) -> str:
    """sha256 (16 hex digits) over names, shapes, dtypes and bytes of a model's tensors.

    Something that isn't a module, or has no tensors, is named by its `sha256` or by its type.
    """
    digest = hashlib.sha256()
    tensors = tensors_of(model)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    if not tensors:
        digest.update(str(getattr(model, "sha256", type(model).__qualname__)).encode())
    return digest.hexdigest()[:16]


def behaviour_hash(model: Backbone, size: tuple[int, int]) -> str:
    """Hash of the answer to one fixed image of noise, coarsely rounded.

    Two models with equal weights may still differ in which block or token they answer with; the answer knows.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, *size, generator=generator).to(device_of(model))
    with torch.inference_mode():
        features = model(image)
    digest = hashlib.sha256()
    for tensor in features:
        if tensor is None:
            digest.update(b"none")
            continue
        vector = (tensor.mean((2, 3)) if tensor.ndim == 4 else tensor).float().cpu().flatten()
        scale = vector.std(correction=0).clamp_min(1e-12)
        # one decimal: differences of threads and BLAS almost never show
        digest.update(f"{tuple(tensor.shape)} {(vector / scale).mul(10).round().int().tolist()}".encode())
    return digest.hexdigest()[:16]


def data_hash(index: Any) -> str:
    """Hash of an index and of the start of each local shard, so that rewritten shards are noticed."""
    digest = hashlib.sha256()
    body = asdict(index)
    body.pop("root", None)
    digest.update(json.dumps(body, sort_keys=True, default=str).encode())
    for split in sorted(index.splits):
        for shard in index.splits[split]:
            path = index.url(shard).removeprefix("file://")
            if os.path.isfile(path):
                with open(path, "rb") as stream:
                    digest.update(f"{os.path.getsize(path)}".encode() + stream.read(_HEAD))
    return digest.hexdigest()[:16]


def device_of(model: Backbone) -> torch.device:
    """Where the model's tensors are; the CPU where it has none."""
    return next((tensor.device for _, tensor in tensors_of(model)), torch.device("cpu"))


def tensors_of(model: Backbone) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer with its name; nothing for what is no module."""
    frozen = getattr(model, "tensors", None)
    if callable(frozen):  # a teacher shows its parameters to nobody who might train them
        return list(frozen())
    if not isinstance(model, nn.Module):
        return []
    return [*model.named_parameters(), *model.named_buffers()]
