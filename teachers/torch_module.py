"""A user's own network as a teacher: a Python module or a TorchScript file."""

from __future__ import annotations

import importlib
import inspect
import os
import typing
from typing import Any, Literal, Mapping

import torch
from torch import Tensor, nn

from agglom.errors import UserError, brief
from agglom.features import IMAGENET_MEAN, IMAGENET_STD, Features, InputSpec
from agglom.teachers.base import Dtype, Teacher
from agglom.teachers.sizes import Size, legal_interpolation, pair

Key = str | int | None


class TorchTeacher(Teacher):
    """Any frozen module that takes normalised pixels (B, 3, h, w).

    What it returns is sorted by shape: (B, D) is the summary, (B, C, H, W) the spatial map. A tuple, list, dict or
    `Features` may hold one of each (and None); where it holds several of a shape, `summary` and `spatial` say which.
    Tokens (B, N, C) become a square map with `layout: NLC`, after the first `prefix_tokens` are dropped.

    Two lines suffice:

        class_path: agglom.teachers.TorchTeacher
        init_args: {module: my_package.models:encoder, input_size: 224}

    An import path runs its package's code, and a TorchScript file is a program too: load only what you trust.

    Args:
        module: "package.module:factory" (a module's class, or a function annotated to return one, `-> nn.Module`, as
            nothing else is called on a configuration's word), a TorchScript file, or a module.
        kwargs: arguments for the factory.
        input_size: pixels, one side or (height, width). None or "any": images keep their size, any multiple of the
            stride.
        mean: per channel, on the [0, 1] scale.
        std: per channel, on the [0, 1] scale.
        interpolation: "bilinear" or "bicubic".
        layout: of the map that the module returns: "NCHW", "NHWC" or "NLC" (tokens).
        prefix_tokens: leading tokens that are no patches, for "NLC".
        summary: key or index of the summary in what the module returns; None: by shape.
        spatial: key or index of the map in what the module returns; None: by shape.
        licence: of the weights, for the model card.
        dtype: "fp32" or "bf16" (norms stay in fp32; not for TorchScript).

    Raises:
        UserError: it can't be imported, loaded or run, or what it returns can't be sorted.
    """

    def __init__(
        self,
        *,
        module: str | nn.Module,
        kwargs: dict[str, Any] | None = None,
        input_size: Size = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        interpolation: str = "bicubic",
        layout: Literal["NCHW", "NHWC", "NLC"] = "NCHW",
        prefix_tokens: int = 0,
        summary: Key = None,
        spatial: Key = None,
        licence: str = "unknown",
        dtype: Dtype = "fp32",
    ) -> None:
        super().__init__()
        self._who = f"TorchTeacher {module if isinstance(module, str) else type(module).__name__}"
        network = load_module(module, dict(kwargs or {}), self._who)
        if dtype == "bf16" and isinstance(network, torch.jit.ScriptModule):
            raise UserError(f"{self._who}: dtype 'bf16' is not possible for TorchScript; set dtype: fp32")
        self.network = network
        self.source = module if isinstance(module, str) else f"{type(module).__module__}:{type(module).__qualname__}"
        self.licence = licence
        self._layout, self._prefix, self._keys = layout, prefix_tokens, (summary, spatial)
        self._discover(input_size, tuple(mean), tuple(std), interpolation)
        self.freeze(network, dtype=dtype)

    def encode(self, pixels: Tensor) -> Features:
        out = self.network(pixels)
        items = dict(out) if isinstance(out, Mapping) else _indexed(out)
        tensors = {key: value for key, value in items.items() if isinstance(value, Tensor)}
        rank = 3 if self._layout == "NLC" else 4
        summary, spatial = self._pick(tensors, "summary", 2), self._pick(tensors, "spatial", rank)
        if summary is None and spatial is None:
            shapes = {key: tuple(value.shape) for key, value in tensors.items()} or type(out).__name__
            raise UserError(
                f"{self._who}: returns {shapes}; a summary is (B, D), a map {self._layout} of {rank} dimensions"
            )
        return Features(summary, None if spatial is None else self._to_nchw(spatial))

    def _pick(self, tensors: dict[Any, Tensor], role: str, rank: int) -> Tensor | None:
        """The tensor under the key that the user named, else the only one of this rank."""
        key = self._keys[role == "spatial"]
        if key is not None:
            if key not in tensors or tensors[key].ndim != rank:
                shapes = {name: tuple(value.shape) for name, value in tensors.items()}
                raise UserError(f"{self._who}: {role} {key!r} is no tensor of {rank} dimensions; valid: {shapes}")
            return tensors[key]
        fits = {name: value for name, value in tensors.items() if value.ndim == rank}
        if len(fits) > 1 and role in fits:
            return fits[role]
        if len(fits) > 1:
            raise UserError(f"{self._who}: several outputs could be the {role}: {list(fits)}; set {role}: KEY")
        return next(iter(fits.values()), None)

    def _to_nchw(self, spatial: Tensor) -> Tensor:
        if self._layout == "NHWC":
            return spatial.permute(0, 3, 1, 2)
        if self._layout == "NLC":
            tokens = spatial[:, self._prefix :].transpose(1, 2)  # (B, C, N)
            side = round(tokens.shape[2] ** 0.5)
            if side * side != tokens.shape[2]:
                raise UserError(
                    f"{self._who}: {tokens.shape[2]} tokens are no square map; set prefix_tokens, or return NCHW"
                )
            return tokens.unflatten(2, (side, side))
        return spatial

    def _discover(self, asked: Size, mean: tuple[float, ...], std: tuple[float, ...], interpolation: str) -> None:
        """Widths and stride, read off a dry run (at 224 pixels where any size is taken)."""
        free = asked is None or asked == "any"
        size = (224, 224) if free else pair(asked)  # type: ignore[arg-type]
        try:
            summary, spatial = self.dry_run(size)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self._who}: can't run at {size} pixels ({brief(error)}); set input_size") from error
        self.summary_dim = None if summary is None else summary.shape[1]
        self.spatial_dim = None if spatial is None else spatial.shape[1]
        grid = (1, 1) if spatial is None else tuple(spatial.shape[-2:])
        strides = {side / cells for side, cells in zip(size, grid, strict=True)}
        if spatial is None:
            strides = {1.0}  # nothing to divide into cells
        if len(strides) > 1 or not (stride := strides.pop()).is_integer():
            raise UserError(f"{self._who}: {size} pixels give a {grid} map, no whole stride; set another input_size")
        interpolation = legal_interpolation(interpolation, self._who)
        self.input = InputSpec(mean, std, None if free else size, int(stride), interpolation)  # type: ignore[arg-type]


def load_module(module: str | nn.Module, kwargs: dict[str, Any], who: str) -> nn.Module:
    """Import path, TorchScript file or module -> module.

    Raises:
        UserError: naming what is missing.
    """
    if isinstance(module, nn.Module):
        return module
    if os.path.isfile(module):
        try:
            return torch.jit.load(module, map_location="cpu")
        except Exception as error:
            raise UserError(f"{who}: not a TorchScript file ({brief(error)}); save it with torch.jit.save") from error
    path, _, attribute = module.partition(":") if ":" in module else module.rpartition(".")
    from agglom.parsing import denied

    if denied(f"{path}.{attribute}"):
        raise UserError(f"{who}: not to be named by a configuration; valid: package.module:factory of yours, FILE.pt")
    try:
        factory = getattr(importlib.import_module(path), attribute)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{who}: no such file or import ({brief(error)}); valid: package.module:factory, FILE.pt"
        ) from error
    if not _gives_module(factory):
        raise UserError(
            f"{who}: no class of modules and no function that says it returns one; annotate it -> nn.Module"
        )
    try:
        built = factory(**kwargs)
    except Exception as error:
        raise UserError(f"{who}: {module}(**{kwargs}) failed: {brief(error)}") from error
    if not isinstance(built, nn.Module):
        raise UserError(f"{who}: {module} gives a {type(built).__name__}; it must give a torch.nn.Module")
    return built


def _gives_module(factory: Any) -> bool:
    """A class of modules, or a function whose annotation promises one."""
    if not inspect.isclass(factory):
        try:
            factory = typing.get_type_hints(factory).get("return")
        except Exception:  # noqa: BLE001  no function, or annotations that name nothing
            return False
    return inspect.isclass(factory) and issubclass(factory, nn.Module)


def _indexed(out: Any) -> dict[Any, Any]:
    """A tensor, tuple, list or NamedTuple -> by name where there are names, else by index."""
    if isinstance(out, tuple) and hasattr(out, "_asdict"):
        return out._asdict()
    return dict(enumerate(out)) if isinstance(out, (tuple, list)) else {0: out}
