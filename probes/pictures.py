"""What the report shows of a few test images: the images, colour maps of the features, predicted masks.

Computed once, while the models are there, and kept as plain arrays, so that the report can be written again without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from agglom.errors import UserError, brief
from agglom.features import Backbone, align
from agglom.probes.fingerprint import device_of

FILE = "pictures.npz"


def pca_maps(
    models: Mapping[str, Backbone], adaptors: Mapping[str, Callable[[Tensor], Any]], images: Tensor, reference: str
) -> dict[str, np.ndarray]:
    """Feature maps as colours.

    Each model's maps are reduced to their first three principal components over these images. Components have no
    order or sign to compare across models, so each model's are turned (an orthogonal matrix, which keeps distances)
    to agree with the reference's as well as they can. Where the reference has an adaptor for a model, its maps
    through that adaptor live in that model's space, and are shown in that model's own basis and colours.

    Args:
        models: name -> model; those without a feature map are left out.
        adaptors: model name -> the reference's answer in that model's space (images -> Features).
        images: (B, 3, H, W) in [0, 1].
        reference: whose colours the others follow; the first model where it has no feature map.

    Returns:
        "NAME" and "reference > NAME" -> (B, h, w, 3) uint8.
    """
    maps = {name: m for name, model in models.items() if (m := _maps(model, model, images)) is not None}
    if not maps:
        return {}
    reference = reference if reference in maps else next(iter(maps))
    grid = tuple(maps[reference].shape[2:])
    out: dict[str, np.ndarray] = {}
    target, _ = _project(maps[reference], _basis(maps[reference]))
    for name in [reference, *(n for n in maps if n != reference)]:
        basis = _basis(maps[name])
        points, shape = _project(maps[name], basis)
        turn = _turn(_on_grid(points, shape, grid), target)
        out[name] = _colours(points @ turn, points @ turn, shape)
        through = _maps(adaptors[name], models[reference], images) if name in adaptors else None
        if through is not None and through.shape[1] == maps[name].shape[1]:
            theirs, their_shape = _project(through, basis)
            out[f"{reference} > {name}"] = _colours(theirs @ turn, points @ turn, their_shape)
    return out


def _maps(call: Callable[[Tensor], Any], model: Backbone, images: Tensor) -> Tensor | None:
    with torch.inference_mode():
        spatial = call(images.to(device_of(model))).spatial
    return None if spatial is None else spatial.float().cpu()


def _basis(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), directions (C, 3) and standard deviations (3,) of the first three principal components."""
    points = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
    mean = points.mean(0)
    _, values, directions = torch.linalg.svd(points - mean, full_matrices=False)
    components = torch.zeros(maps.shape[1], 3)
    spread = torch.ones(3)
    rank = min(3, len(values))
    components[:, :rank] = directions[:rank].T
    spread[:rank] = (values[:rank] / len(points) ** 0.5).clamp_min(1e-6)
    return mean, components, spread


def _project(maps: Tensor, basis: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, tuple[int, int, int]]:
    """(B, C, h, w) -> (B h w, 3) components of unit spread, and (B, h, w)."""
    mean, components, spread = basis
    batch, channels, height, width = maps.shape
    points = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    return (points - mean) @ components / spread, (batch, height, width)


def _on_grid(points: Tensor, shape: tuple[int, int, int], grid: tuple[int, ...]) -> Tensor:
    maps = points.reshape(*shape, 3).permute(0, 3, 1, 2)
    return align(maps, grid).permute(0, 2, 3, 1).reshape(-1, 3)  # type: ignore[arg-type]


def _turn(points: Tensor, target: Tensor) -> Tensor:
    """The orthogonal (3, 3) that brings points nearest to the target (Schoenemann 1966)."""
    left, _, right = torch.linalg.svd(points.T @ target)
    return left @ right


def _colours(points: Tensor, scale_by: Tensor, shape: tuple[int, int, int]) -> np.ndarray:
    low, high = scale_by.quantile(0.02, dim=0), scale_by.quantile(0.98, dim=0)
    unit = ((points - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return unit.mul(255).round().byte().reshape(*shape, 3).numpy()


def save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays beside the report, atomically; keys are "KIND/NAME"."""
    scratch = folder / f".{FILE}.tmp.npz"
    np.savez_compressed(scratch, **arrays)  # type: ignore[arg-type]  # numpy's stub takes them for its flag
    scratch.replace(folder / FILE)


def load(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """KIND -> NAME -> array; empty where nothing was saved.

    Raises:
        UserError: the file is broken, or has pickled objects.
    """
    out: dict[str, dict[str, np.ndarray]] = {}
    if not (folder / FILE).is_file():
        return out
    try:
        with np.load(folder / FILE, allow_pickle=False) as stored:
            for key in stored.files:
                kind, _, name = key.partition("/")
                out.setdefault(kind, {})[name] = stored[key]
    except Exception as err:  # zip's, zlib's and numpy's own
        raise UserError(f"{folder / FILE}: can't be read ({brief(err)}); remove it, or probe again") from err
    return out
