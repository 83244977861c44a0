"""`agglom check`: everything that can be known before training, all problems at once.

Nothing heavy is built: student and teachers only take shape on the meta device, without weights and without the hub.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import yaml

from agglom.cache.check import cache_problems, with_cached
from agglom.data.faults import printable
from agglom.errors import UserError, brief, nearest
from agglom.plan import Partition, Stage
from agglom.plan import problems as plan_problems
from agglom.schema import find_class, problems, signature_problems
from agglom.yaml_files import check_interpolations, parse, read_text


class Invalid(UserError):
    """A configuration with problems: the message has a line for each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))


_EXTRA = {
    "seed_everything": bool | int,
    "ckpt_path": str | None,
    "overwrite": bool,
    "checkpoint_every": int,
    "checkpoint_minutes": float | None,
    "checkpoint_keep": int,
    "stages": list[Stage] | None,
}


def check_file(path: str | Path) -> list[str]:
    """Problems of one YAML file, a line each; empty when it is ready to be trained.

    A path that doesn't exist on disk and starts with `configs/` means the file of that name inside the package.
    """
    try:
        config, repeated = read_yaml(path)
    except UserError as err:
        return [printable(str(err))]
    return [*map(printable, repeated), *check_config(config)]


def check_config(config: dict[str, Any]) -> list[str]:
    """Problems of a whole configuration as plain data: first its structure, then what the values mean together."""
    found = list(_structure(config))
    said = {line.split(":")[0] for line in found}
    try:
        for line in _meaning(config):
            if line.split(":")[0] not in said:
                found.append(line)
    except Exception:  # values of any kind, which have had their line
        if not said:
            raise
    return list(map(printable, found))


def locate(path: str | Path) -> Path:
    """A configuration on disk, or the packaged one of the same name.

    Raises:
        UserError: neither.
    """
    path = Path(path)
    if path.is_file():
        return path
    packaged = Path(str(files("agglom.configs")))
    inside = packaged / (path.relative_to("configs") if path.parts[:1] == ("configs",) else path)
    if not path.is_absolute() and inside.is_file():
        return inside
    names = [str(Path("configs") / p.relative_to(packaged)) for p in packaged.rglob("*.yaml")]
    raise UserError(f"{path}: no such file; {nearest(str(path), names)}")


def read_yaml(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Plain data of a YAML file with its interpolations resolved, and a line for each key that it gives twice.

    Raises:
        UserError: missing, not YAML, not a mapping, or an interpolation that can't be resolved.
    """
    raw, tree = parse(read_text(locate(path)))
    if not isinstance(raw, dict):
        raise UserError(
            f"holds {'nothing' if raw is None else type(raw).__name__}; valid: a mapping with model, data and trainer"
        )
    check_interpolations(raw)
    from omegaconf import OmegaConf

    try:
        resolved = OmegaConf.to_container(OmegaConf.create(numbers(raw)), resolve=True)
    except Exception as err:  # noqa: BLE001  whatever OmegaConf raises is about the file
        raise UserError(f"interpolation: {brief(err)}; valid: ${{KEY}} of a key in this file") from err
    return resolved, list(_repeated(tree))  # type: ignore[return-value]


def _repeated(node: yaml.Node | None, path: str = "") -> Iterator[str]:
    """A line for each key that a mapping gives twice: YAML would silently keep only the last."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                yield f"{path}{key.value}: given twice, again in line {line}; valid: once; rename or remove one"
            seen.add(key.value)
            yield from _repeated(value, f"{path}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            yield from _repeated(item, f"{path}{position}.")


def numbers(value: Any) -> Any:
    """`1e-3` is a string to YAML 1.1 and a number to everybody else."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [numbers(v) for v in value]
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    return value


def _structure(config: dict[str, Any]) -> Iterator[str]:
    from lightning.pytorch import Trainer

    from agglom.data import ShardDataModule
    from agglom.distiller import Distiller

    sections = {"model": Distiller, "data": ShardDataModule, "trainer": Trainer}
    for key, value in config.items():
        if key in sections:
            value = {} if value is None else value
            if isinstance(value, dict) and value.get("stages") is not None:
                yield f"{key}.stages: stands at the top level of the file; valid: stages; move it there"
                value = {name: item for name, item in value.items() if name != "stages"}
            yield from signature_problems(key, value, sections[key])
        elif key in _EXTRA:
            yield from problems(key, value, _EXTRA[key])
        else:
            yield f"{key}: unknown key; {nearest(str(key), [*sections, *_EXTRA])}; rename or remove it"
    for key in ("model", "data"):
        if key not in config:
            yield f"{key}: missing; valid: a mapping; add the section"


def _meaning(config: dict[str, Any]) -> Iterator[str]:
    config, lines = with_cached(config)
    yield from lines
    model, data, trainer = (_section(config, key) for key in ("model", "data", "trainer"))
    yield from _steps(model, trainer)
    seed = config.get("seed_everything")
    yield from outside([("seed_everything", seed, lambda v: 0 <= v < 1 << 32, f"0 to {(1 << 32) - 1}")])
    yield from _ranges(model, data, trainer)
    yield from _output(trainer)
    yield from _memory(model, data)
    yield from _shards(data, trainer)
    stages = _read_stages(config.get("stages"))
    yield from cache_problems(config, stages=any(part.size or part.resolutions for s in stages for part in s.parts()))
    yield from _plan(stages, model, data, trainer)
    yield from _objectives(model, trainer)
    yield from _strategy(stages, model, trainer)
    from agglom.model_checks import model_problems

    yield from model_problems(model, data, stages)


def _read_stages(value: Any) -> list[Stage]:
    """The stages as the run will have them; none where their structure is broken, which has been said."""
    if not isinstance(value, list) or list(problems("stages", value, list[Stage])):
        return []
    return [
        Stage(**{**item, "partitions": [Partition(**part) for part in item.get("partitions") or ()]}) for item in value
    ]


def _plan(stages: list[Stage], model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> Iterator[str]:
    """What stages say by themselves, and what they ask of trainer and data."""
    if not stages:
        return
    teachers, steps = list(_section(model, "teachers")), trainer.get("max_steps")
    yield from plan_problems(
        stages, max_steps=steps if isinstance(steps, int) and steps > 0 else None, teachers=teachers
    )
    ranks, micros = _world(trainer), trainer.get("accumulate_grad_batches", 1)
    objectives = _section(model, "objectives")
    across = [name for name, cls in zip(objectives, _classes(objectives), strict=True) if _reads_captions(cls)]
    for index, stage in enumerate(stages):
        sizes = [part.batch_size for part in stage.parts()]
        if ranks > 1 and len(set(sizes)) > 1 and across:
            yield (
                f"stages.{index}.partitions: batch_size {sizes}, but model.objectives.{across[0]} compares the images "
                f"of all ranks; valid: one batch_size for all; change it"
            )
        parts, slots = len(stage.parts()), ranks * (micros if isinstance(micros, int) else 1)
        if slots % parts:
            yield (
                f"stages.{index}.partitions: {parts} of them, but a step has {slots} micro-batches ({ranks} ranks x "
                f"accumulate_grad_batches {micros}); valid: a multiple of {parts}; set trainer.accumulate_grad_batches"
            )
    if model.get("remember_teachers") is True:
        yield "model.remember_teachers: true; valid: false, since stages change the views; remove the key"


def _strategy(stages: list[Stage], model: dict[str, Any], trainer: dict[str, Any]) -> Iterator[str]:
    """Several ranks must be told that some parameters may have no gradient."""
    apart = any(part.teachers is not None for stage in stages for part in stage.parts())
    apart |= any(stage.freeze_steps for stage in stages)
    objectives = _section(model, "objectives")
    for entry, cls in zip(objectives.values(), _classes(objectives), strict=True):
        options = _section(entry, "init_args") if isinstance(entry, dict) else {}
        apart |= bool(options.get("start") or options.get("stop") or getattr(cls, "partial", False))
    if apart and _world(trainer) > 1 and "find_unused" not in str(trainer.get("strategy")):
        yield (
            f"trainer.strategy: {trainer.get('strategy', 'auto')}; valid: ddp_find_unused_parameters_true, since some "
            f"parameters have no gradient at some steps or on some ranks; set it"
        )


def _objectives(model: dict[str, Any], trainer: dict[str, Any]) -> Iterator[str]:
    """Objectives beside the teachers: the average that they learn from, their names, their place in the run."""
    from agglom.selfdistill.base import conflicts

    objectives, teachers = _section(model, "objectives"), _section(model, "teachers")
    if not objectives:
        return
    yield from conflicts(
        teachers,
        objectives,
        anchored=any(getattr(cls, "anchors", False) for cls in _classes(objectives)),
        ema_decay=model.get("ema_decay", 0.0),
        ema_schedule=str(model.get("ema_schedule")),
        anneal_anyway=model.get("ema_anneal_anyway") is True,
    )
    total = trainer.get("max_steps")
    for name, entry in objectives.items():
        start = (_section(entry, "init_args") if isinstance(entry, dict) else {}).get("start")
        late = isinstance(start, float) and start >= 1
        if isinstance(start, int) and not isinstance(start, bool) and isinstance(total, int) and total > 0:
            late = start >= total
        if late:
            yield (
                f"model.objectives.{name}.init_args.start: {start}; valid: less than trainer.max_steps {total}, or a "
                f"fraction below 1; lower it"
            )


def _reads_captions(objective: type | None) -> bool:
    return "captions" in getattr(objective, "needs", ())


def _classes(objectives: dict[str, Any]) -> list[type | None]:
    """The class of each objective, None where there is no such class."""
    from agglom.selfdistill import Objective

    paths = [entry.get("class_path") if isinstance(entry, dict) else entry for entry in objectives.values()]
    return [find_class(str(path), Objective) for path in paths]


def _world(trainer: dict[str, Any]) -> int:
    """Ranks, as far as the configuration says."""
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    return (devices if isinstance(devices, int) and devices > 0 else 1) * (nodes if isinstance(nodes, int) else 1)


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _steps(model: dict[str, Any], trainer: dict[str, Any]) -> Iterator[str]:
    steps = trainer.get("max_steps")
    if steps is None or steps == -1:
        if not trainer.get("max_time"):
            yield "trainer.max_steps: missing; valid: > 0; streams have no end, so a run is counted in steps"
    elif not isinstance(steps, int) or steps <= 0:
        yield f"trainer.max_steps: {steps!r}; valid: an int > 0; set how many optimiser steps to train"
    warmup = model.get("warmup_steps", 100)
    if isinstance(warmup, int) and isinstance(steps, int) and steps > 0 and warmup >= steps:
        yield f"model.warmup_steps: {warmup} >= trainer.max_steps {steps}; valid: less than max_steps; lower it"


def _ranges(model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> Iterator[str]:
    rules = [
        ("model.lr", model.get("lr"), lambda v: v > 0, "> 0"),
        ("model.weight_decay", model.get("weight_decay"), lambda v: v >= 0, ">= 0"),
        ("model.warmup_steps", model.get("warmup_steps"), lambda v: v >= 0, ">= 0"),
        ("model.ema_decay", model.get("ema_decay"), lambda v: 0 <= v < 1, "0 <= decay < 1, or null"),
        ("data.batch_size", data.get("batch_size"), lambda v: v > 0, "> 0"),
        ("data.size", data.get("size"), lambda v: v > 0, "> 0"),
        ("data.num_workers", data.get("num_workers"), lambda v: v >= 0, ">= 0"),
        ("data.prefetch", data.get("prefetch"), lambda v: v > 0, "> 0"),
        ("data.shuffle", data.get("shuffle"), lambda v: v >= 0, ">= 0"),
        ("data.val_samples", data.get("val_samples"), lambda v: v > 0, "> 0, or null for all"),
        ("data.max_bad_fraction", data.get("max_bad_fraction"), lambda v: 0 <= v <= 1, "0 to 1"),
        ("trainer.accumulate_grad_batches", trainer.get("accumulate_grad_batches"), lambda v: v > 0, "> 0"),
        ("trainer.gradient_clip_val", trainer.get("gradient_clip_val"), lambda v: v >= 0, ">= 0, or null"),
        ("trainer.limit_train_batches", trainer.get("limit_train_batches"), lambda v: v > 0, "> 0, or null for all"),
        ("trainer.log_every_n_steps", trainer.get("log_every_n_steps"), lambda v: v >= 0, ">= 0; 0 for no metrics"),
        ("trainer.val_check_interval", trainer.get("val_check_interval"), lambda v: v > 0, "> 0 steps"),
    ]
    for place, beta in enumerate(betas if isinstance(betas := model.get("betas"), (list, tuple)) else ()):
        rules.append((f"model.betas.{place}", beta, lambda v: 0 <= v < 1, "0 <= beta < 1"))
    yield from outside(rules)
    if isinstance(model.get("optimizer"), str):
        from timm.optim import list_optimizers

        known = [str(name) for name in list_optimizers()]
        if model["optimizer"] not in known:
            yield f"model.optimizer: {model['optimizer']!r}; {nearest(model['optimizer'], known)}; take one"


def outside(rules: Iterable[tuple[str, Any, Callable[[Any], bool], str]]) -> Iterator[str]:
    """A line for each number that doesn't fit: (key, value, fits, what would be valid)."""
    for key, value, fits, valid in rules:
        if isinstance(value, (int, float)) and not fits(value):
            yield f"{key}: {value}; valid: {valid}; change it"


def _output(trainer: dict[str, Any]) -> Iterator[str]:
    """Whether the run directory can be made, without making it."""
    root = trainer.get("default_root_dir")
    if not isinstance(root, str) or "://" in root:
        return
    path, key = Path(root).absolute(), "trainer.default_root_dir"
    there = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
    if not there.is_dir():
        yield f"{key}: {root}: {there} is no folder; valid: a folder, or a path where one can be made; choose another"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"{key}: {root}: {there} can't be written; valid: a folder of yours; choose another"
    elif (path / "index.json").exists():
        yield f"{key}: {root} holds a data set; valid: a run directory or a new one; choose another"


def _memory(model: dict[str, Any], data: dict[str, Any]) -> Iterator[str]:
    """Remembered teachers have seen one view of each image, so there must be only one."""
    from agglom.data import view_options

    try:
        view = view_options(_section(data, "view"))
        view.view(1)
    except UserError as err:
        yield f"data.{err}; change it"
        return
    except (TypeError, ValueError, AttributeError):  # said already
        return
    if model.get("remember_teachers") is True and not view.fixed:
        yield (
            "model.remember_teachers: true, but data.view crops, flips or changes colours; valid: false, or a fixed "
            "view; set data.view: {scale: [1, 1], ratio: [1, 1], flip: 0}"
        )


def _shards(data: dict[str, Any], trainer: dict[str, Any]) -> Iterator[str]:
    if not isinstance(data.get("data"), str):
        return
    val, train = data.get("val_split", "val"), data.get("train_split", "train")
    sources = data.get("sources") or {}
    if data.get("follow_gap") and len(sources) < 2:
        yield "data.follow_gap: given, but there are no two data.sources; valid: null; remove it"
    yield from outside(
        (f"data.follow_gap.{key}", _section(data, "follow_gap").get(key), fits, valid)
        for key, fits, valid in (
            ("every", lambda v: v > 0, "> 0 steps"),
            ("strength", lambda v: 0 <= v <= 1, "0 to 1"),
            ("most", lambda v: v > 0, "> 0"),
        )
    )
    if not sources:
        yield from _split(data, trainer, "data.data", data["data"], {"train_split": train, "val_split": val}, train)
        return
    yield from _split(data, trainer, "data.data", data["data"], {"val_split": val}, None)
    if data.get("cache"):
        yield "data.cache: given, but it can't be of several data.sources; valid: null; remove one"
    for name, source in sources.items():
        if isinstance(weight := source.get("weight", 1.0), (int, float)) and not 0 < weight < float("inf"):
            yield f"data.sources.{name}.weight: {weight}; valid: > 0; change it or remove the source"
        split = source.get("split", "train")
        yield from _split(
            data, trainer, f"data.sources.{name}.data", source["data"], {f"sources.{name}.split": split}, split
        )


def _split(
    data: dict[str, Any],
    trainer: dict[str, Any],
    key: str,
    root: str,
    splits: dict[str, str | None],
    trained: str | None,
) -> Iterator[str]:
    """What is wrong with the shards at `root`, of which key -> split are read; `trained` by all workers and ranks."""
    from agglom.data import read_index, validate_layout
    from agglom.data.samples import check_fields

    try:
        index = read_index(root)
    except UserError as err:
        yield f"{key}: {err}"
        return
    for name, split in splits.items():
        try:
            if split is not None:
                check_fields(index, split, data.get("fields") or ("image",))
        except UserError as err:
            at_fault = name if split not in index.splits else "fields"
            yield f"data.{at_fault}: {str(err).removeprefix('fields: ')}; change data.{at_fault}"
            return
    workers = data.get("num_workers", "auto")
    workers = 1 if workers == "auto" else workers
    if trained is not None and isinstance(workers, int) and workers >= 0:
        yield from validate_layout(index, trained, num_workers=workers, world_size=_world(trainer))
