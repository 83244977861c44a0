"""Whether a run may read its teachers' features from a cache: what would have changed since."""

from __future__ import annotations

from dataclasses import asdict
from inspect import signature
from typing import Any, Iterator, Mapping

from agglom.cache.layout import CacheIndex, read_cache_index
from agglom.errors import UserError, nearest
from agglom.schema import find_class
from agglom.teachers import Teacher

CACHED = "agglom.teachers.CachedTeacher"
WORD = "cached"  # what a YAML may say for a teacher's encoder


def cached_teachers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The teachers of a configuration that its cache holds: name -> the encoder entry that reads them.

    Args:
        config: with `model.teachers` and `data.cache`, as plain data.

    Raises:
        UserError: there is no such cache.
    """
    root = (config.get("data") or {}).get("cache")
    teachers = (config.get("model") or {}).get("teachers") or {}
    if root is None:
        return {}
    index = read_cache_index(root)
    return {
        name: {"class_path": CACHED, "init_args": {"cache": root, "name": name}}
        for name in teachers
        if name in index.teachers
    }


def with_cached(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration with each encoder that is only called `cached` as the class that reads it, and what is amiss.

    Args:
        config: with `model.teachers` and `data.cache`, as plain data of any kind.
    """
    model = config.get("model")
    teachers = model.get("teachers") if isinstance(model, Mapping) else None
    entries = dict(teachers) if isinstance(teachers, Mapping) else {}
    asked = [name for name, entry in entries.items() if isinstance(entry, Mapping) and entry.get("encoder") == WORD]
    if not asked:
        return dict(config), []
    root, lines = (config.get("data") or {}).get("cache"), []
    try:
        found = cached_teachers(config)
    except UserError:  # said by `cache_problems`
        return dict(config), []
    for name in asked:
        if name in found:
            entries[name] = {**entries[name], "encoder": found[name]}
        else:
            there = f"data.cache {root} has no such teacher" if root else "data.cache is not set"
            lines.append(
                f"model.teachers.{name}.encoder: {WORD}, but {there}; valid: with the folder of an `agglom cache` that "
                "has it, or a class; set data.cache"
            )
    return {**config, "model": {**config["model"], "teachers": entries}}, lines


def cache_problems(config: Mapping[str, Any], stages: bool) -> Iterator[str]:
    """What keeps a run from its cache, a line each with full keys.

    Args:
        config: the whole configuration as plain data.
        stages: whether any stage changes what the images look like.
    """
    data, model = (config.get(key) or {} for key in ("data", "model"))
    root = data.get("cache")
    if not isinstance(root, str):
        return
    try:
        index = read_cache_index(root)
    except UserError as err:
        yield f"data.cache: {err}"
        return
    from agglom.data import view_options

    try:
        view = asdict(view_options(data.get("view") or {}))
    except (TypeError, ValueError, AttributeError):  # said elsewhere
        return
    split = data.get("train_split", "train")
    facts = {
        "data.size": (data.get("size"), index.size),
        **{f"data.view.{key}": (_plain(view[key]), _plain(index.view[key])) for key in index.view},
        "data.train_split": (split, next(iter(index.splits))),
        "data.margin": (data.get("margin", 0), 0),
    }
    for key, (here, there) in facts.items():
        if here != there:
            yield f"{key}: {here}, but the features of data.cache {root} are of {there}; valid: {there}; change one"
    if model.get("shift"):
        yield "model.shift: set, but cached features are of unshifted views; valid: null; remove it or data.cache"
    if stages:
        yield "stages: with sizes, but cached features are of data.size; valid: without; remove them or data.cache"
    yield from _teachers(index, model.get("teachers") or {}, data.get("data"))


def grid_problems(config: Mapping[str, Any], grid: tuple[int, int]) -> Iterator[str]:
    """Whether cached teachers of any size were shown images for another map than the student's.

    Args:
        config: with `model.teachers` and `data.cache`.
        grid: cells of the student's map at `data.size`.
    """
    try:
        cached = cached_teachers(config)
    except UserError:
        return  # said by `cache_problems`
    if not cached:
        return
    index = read_cache_index(config["data"]["cache"])
    free = [name for name in cached if index.teachers[name]["input"]["size"] is None]
    if free and index.grid != grid:
        yield (
            f"model.student: a map of {grid[0]} x {grid[1]} cells, but the features of teacher {free[0]} in data.cache "
            f"{index.root} are for one of {index.grid[0]} x {index.grid[1]}; valid: the same; write another cache"
        )


def _teachers(index: CacheIndex, teachers: Mapping[str, Any], data: Any) -> Iterator[str]:
    found = [name for name in teachers if name in index.teachers]
    if teachers and not found:
        yield (
            f"data.cache: {index.root} holds features of {', '.join(index.teachers)}, and the run has none of them; "
            f"{nearest(next(iter(teachers)), index.teachers)}; change one"
        )
    for name in found:
        key, entry = f"model.teachers.{name}", teachers[name] or {}
        if entry.get("mosaic") is True:
            yield f"{key}.mosaic: true, but its cached features are of single images; valid: false; change it"
        encoder = entry.get("encoder")
        if isinstance(encoder, dict) and encoder.get("class_path") != CACHED:
            here = {"class_path": encoder.get("class_path"), "init_args": encoder.get("init_args") or {}}
            there = {key: index.teachers[name][key] for key in ("class_path", "init_args")}
            if _stated(here) != _stated(there):
                yield (
                    f"{key}.encoder: {_stated(here)}, but the cached features are of {_stated(there)}; valid: the "
                    f"same; change it, or cache it under another name"
                )
    if lines := index.missing():
        first = f"{len(lines)} shards without features, first {lines[0]}"
        yield f"data.cache: {index.root}: {first}; valid: all of them; run agglom cache again"
    for name in data_shards(data, index):
        yield f"data.data: shard {name} is not in data.cache {index.root}; write the cache again"
        break


def data_shards(data: Any, index: CacheIndex) -> list[str]:
    """Shards of the run's data that the cache doesn't know."""
    from agglom.data import read_index

    try:
        shards = read_index(data)
    except (UserError, TypeError):
        return []  # said elsewhere
    return [
        shard.file
        for split, names in index.splits.items()
        if split in shards.splits
        for shard in shards.shards(split)
        if shard.count and shard.file not in names
    ]


def _stated(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Class and options, without those that are the class's defaults."""
    options = _plain(entry.get("init_args") or {})
    cls = find_class(str(entry.get("class_path")), Teacher)
    known = signature(cls).parameters if cls is not None else {}
    options = {k: v for k, v in options.items() if k not in known or v != _plain(known[k].default)}
    return {"class_path": str(entry.get("class_path")).rpartition(".")[2], "init_args": options}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value
