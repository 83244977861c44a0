"""Which teachers a run had: fingerprints, and `teachers.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agglom.teachers.base import Teacher

LIBRARIES = ("torch", "timm", "open_clip_torch")


def fingerprint(module: nn.Module | Mapping[str, Tensor]) -> str:
    """sha256 over the tensors of a module: name, dtype, shape and bytes, sorted by name.

    Independent of the device, of the order of registration, of memory layout and of gradients. Two names of one tensor
    (tied weights) count as registered.

    Args:
        module: a teacher (its frozen networks), any module (parameters and buffers), or named tensors.
    """
    if isinstance(module, Teacher):
        named: Iterable[tuple[str, Tensor]] = module.tensors()
    elif isinstance(module, nn.Module):
        named = [*module.named_parameters(), *module.named_buffers()]
    else:
        named = module.items()
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        tensor = tensor.detach().cpu()
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def manifest(teachers: Mapping[str, Teacher]) -> dict[str, Any]:
    """What `teachers.json` of a run directory holds.

    Args:
        teachers: id in the config -> teacher.

    Returns:
        {"teachers": {id: {class, source, sha256, licence, dtype, dims, input}}, "versions": {library: version}},
        ready for `json.dump`.
    """
    entries = {
        name: {
            "class": f"{type(teacher).__module__}.{type(teacher).__qualname__}",
            "source": teacher.source,
            "sha256": getattr(teacher, "sha256", None) or fingerprint(teacher),  # one that only stands for another
            "licence": teacher.licence,
            "dtype": teacher.dtype,
            "dims": {"summary": teacher.summary_dim, "spatial": teacher.spatial_dim},
            "input": teacher.input.as_dict(),
        }
        for name, teacher in teachers.items()
    }
    versions = {library: metadata.version(library) for library in LIBRARIES}
    return json.loads(json.dumps({"teachers": entries, "versions": versions}))  # tuples -> lists, as read back


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two manifests, one line each; empty where a run may go on.

    Versions of libraries and places of weights may differ: the weights' bytes and the input contract decide.
    """
    before, after = old["teachers"], new["teachers"]
    lines = [f"teacher {name}: gone (was {before[name]['source']})" for name in before if name not in after]
    lines += [f"teacher {name}: new ({after[name]['source']})" for name in after if name not in before]
    for name in before:
        if name not in after:
            continue
        was, now = before[name], after[name]
        keys = ["dtype", "dims", "input"] + (["sha256"] if was["dtype"] == now["dtype"] else [])
        lines += [f"teacher {name}: {key} was {was[key]}, is {now[key]}" for key in keys if was[key] != now[key]]
    return lines


def save(teachers: Mapping[str, Teacher], path: str | Path) -> None:
    """Write the manifest as JSON."""
    Path(path).write_text(json.dumps(manifest(teachers), indent=2) + "\n", encoding="utf-8")
