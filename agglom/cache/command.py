"""`agglom cache`: from a training's YAML to a cache of its teachers' features."""

from __future__ import annotations

import inspect
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Sequence

from agglom.cache.check import CACHED, with_cached
from agglom.cache.layout import CacheIndex, Stored, read_cache_index
from agglom.cache.write import Plan, dry_run, write_cache
from agglom.checks import Invalid, check_config, read_yaml
from agglom.data import read_index, view_options
from agglom.data.ranks import distributed
from agglom.devices import choose
from agglom.errors import UserError, nearest
from agglom.features import InputSpec
from agglom.model_checks import on_meta
from agglom.runs import build_teachers
from agglom.students import Student
from agglom.teachers import manifest

SEED = 0


def cache_teachers(
    config: str | Path | dict[str, Any],
    out: Path,
    *,
    views: int,
    dtype: Stored,
    pool: int,
    names: Sequence[str] | None,
    batch: int,
    device: str = "auto",
    dry: bool = False,
) -> str:
    """Write (or with `dry` only measure) the cache of a configuration (a file or plain data) -> what to tell the user.

    Raises:
        UserError: a configuration that doesn't pass `agglom check`, a number below 1, an unknown teacher, a mosaic, a
            pool that doesn't divide a teacher's grid, or what `write_cache` raises.
    """
    for key, value in {"views": views, "pool": pool, "batch": batch}.items():
        if value < 1:
            raise UserError(f"{key}: {value}; valid: 1 or more; change it")
    content, lines = (config, []) if isinstance(config, dict) else read_yaml(config)
    if lines := [*lines, *check_config(content)]:
        raise Invalid(lines)
    content, _ = with_cached(content)
    entries: dict[str, Any] = content["model"]["teachers"]
    for name in names or ():
        if name not in entries:
            raise UserError(f"teachers: {name!r}; {nearest(name, entries)}; take some of them")
    entries = {name: entry for name, entry in entries.items() if names is None or name in names}
    if not entries:
        raise UserError("model.teachers: none; valid: at least one; there is nothing to cache")
    if tiled := [name for name, entry in entries.items() if entry.get("mosaic")]:
        raise UserError(
            f"model.teachers.{tiled[0]}.mosaic: true; valid: false, or another set of --teachers; change one"
        )
    plan = _plan(content, entries, out, views=views, dtype=dtype, pool=pool, batch=batch, device=device)
    if dry:
        return _spoken(dry_run(plan), plan)
    started = time.monotonic()
    files = write_cache(plan)
    size = sum(path.stat().st_size for path in files)
    rank, world = distributed()
    share = f" (rank {rank} of {world})" if world > 1 else ""
    return f"{out}{share}: {len(files)} files, {size / 1e6:.1f} MB, {time.monotonic() - started:.0f} s"


def _plan(
    content: dict[str, Any],
    entries: dict[str, Any],
    out: Path,
    *,
    views: int,
    dtype: Stored,
    pool: int,
    batch: int,
    device: str,
) -> Plan:
    data, place = content["data"], choose(device)
    shards = read_index(data["data"])
    view = view_options(data.get("view") or {})
    student, problems = on_meta(content["model"]["student"], Student)
    if student is None:
        raise Invalid([f"model.student: {line}" for line in problems])
    teachers = build_teachers({"model": {"teachers": entries}})
    for teacher in teachers.values():
        teacher.to(place)
    size = (data["size"], data["size"])
    grid = student.input.grid(size)
    known = manifest(teachers)
    splits = {data.get("train_split", "train"): shards.shards(data.get("train_split", "train"))}
    validation = data.get("val_split", inspect.signature(_defaults()).parameters["val_split"].default)
    if validation is not None:
        splits[validation] = shards.shards(validation)
    index = CacheIndex(
        root=str(out),
        size=data["size"],
        view=asdict(view),
        views=views,
        dtype=dtype,
        pool=pool,
        seed=SEED,
        grid=grid,
        splits={split: tuple(shard.file for shard in found if shard.count) for split, found in splits.items()},
        teachers={
            name: {
                **known["teachers"][name],
                **_entry(entries[name]["encoder"]),
                "shapes": _shapes(teacher.dims, teacher.input, size, grid, pool, name),
            }
            for name, teacher in teachers.items()
        },
        versions=known["versions"],
    )
    bad = data.get("max_bad_fraction", inspect.signature(_defaults()).parameters["max_bad_fraction"].default)
    return Plan(index, shards, teachers, view.view(data["size"]), batch, bad)


def _defaults() -> Any:
    from agglom.data import ShardDataModule

    return ShardDataModule


def _entry(encoder: Any) -> dict[str, Any]:
    """class_path and init_args of an encoder as it stands in the YAML; of a cached one, its original's."""
    if isinstance(encoder, str):
        return {"class_path": encoder, "init_args": {}}
    path, options = encoder["class_path"], dict(encoder.get("init_args") or {})
    if path == CACHED:
        there = read_cache_index(options["cache"]).teachers[options["name"]]
        path, options = there["class_path"], dict(there["init_args"])
    return {"class_path": path, "init_args": options}


def _shapes(
    dims: Any, spec: InputSpec, size: tuple[int, int], grid: tuple[int, int], pool: int, name: str
) -> dict[str, list[int]]:
    """Kind -> shape of what is stored of a view."""
    out: dict[str, list[int]] = {}
    if dims.summary is not None:
        out["summary"] = [dims.summary]
    if dims.spatial is not None:
        cells = spec.grid(size) if spec.size is not None else grid
        if any(n % pool for n in cells):
            raise UserError(f"pool: {pool}, but teacher {name} has a grid of {cells}; valid: a divisor; change it")
        out["spatial"] = [dims.spatial, *(n // pool for n in cells)]
    return out


def _spoken(found: dict[str, float], plan: Plan) -> str:
    return (
        f"{found['bytes_per_image']:.0f} bytes an image ({plan.index.views} views, {plan.index.dtype}), "
        f"{found['gigabytes']:.3g} GB in all; {found['images_per_second']:.1f} images/s, {found['seconds']:.0f} s in "
        f"one process; {found['gigabytes_in_memory']:.3g} GB in memory for the largest shard. Nothing was written."
    )
