"""`agglom check`: everything that can be known before training, all problems at once.

Nothing heavy is built: student and teachers only take shape on the meta device, without weights and without the hub.
"""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any, Iterator

import yaml

from agglom.errors import UserError, brief, nearest
from agglom.schema import find_class, problems, signature_problems


class Invalid(UserError):
    """A configuration with problems: the message has a line for each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))


_EXTRA = {"seed_everything": bool | int, "ckpt_path": str | None, "overwrite": bool, "checkpoint_every": int}


def check_file(path: str | Path) -> list[str]:
    """Problems of one YAML file, a line each; empty when it is ready to be trained.

    A path that doesn't exist on disk and starts with `configs/` means the file of that name inside the package.
    """
    try:
        config, repeated = read_yaml(path)
    except UserError as err:
        return [str(err)]
    return [*repeated, *check_config(config)]


def check_config(config: dict[str, Any]) -> list[str]:
    """Problems of a whole configuration as plain data: first its structure, then what the values mean together."""
    found = list(_structure(config))
    found += [line for line in _meaning(config) if line.split(":")[0] not in {old.split(":")[0] for old in found}]
    return found


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
    path = locate(path)
    try:
        text = path.read_text(encoding="utf-8")
        tree, raw = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise UserError(f"not YAML: {brief(err)}; mend the file") from err
    if not isinstance(raw, dict):
        raise UserError(
            f"holds {'nothing' if raw is None else type(raw).__name__}; valid: a mapping with model, data and trainer"
        )
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
            yield from signature_problems(key, {} if value is None else value, sections[key])
        elif key in _EXTRA:
            yield from problems(key, value, _EXTRA[key])
        else:
            yield f"{key}: unknown key; {nearest(str(key), [*sections, *_EXTRA])}; rename or remove it"
    for key in ("model", "data"):
        if key not in config:
            yield f"{key}: missing; valid: a mapping; add the section"


def _meaning(config: dict[str, Any]) -> Iterator[str]:
    model, data, trainer = (_section(config, key) for key in ("model", "data", "trainer"))
    yield from _steps(model, trainer)
    yield from _ranges(model, data)
    yield from _output(trainer)
    yield from _memory(model, data)
    yield from _shards(data, trainer)
    yield from _models(model, data)


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


def _ranges(model: dict[str, Any], data: dict[str, Any]) -> Iterator[str]:
    rules = [
        ("model.lr", model.get("lr"), lambda v: v > 0, "> 0"),
        ("model.weight_decay", model.get("weight_decay"), lambda v: v >= 0, ">= 0"),
        ("model.warmup_steps", model.get("warmup_steps"), lambda v: v >= 0, ">= 0"),
        ("model.ema_decay", model.get("ema_decay"), lambda v: 0 <= v < 1, "0 <= decay < 1, or null"),
        ("data.batch_size", data.get("batch_size"), lambda v: v > 0, "> 0"),
        ("data.size", data.get("size"), lambda v: v > 0, "> 0"),
        ("data.num_workers", data.get("num_workers"), lambda v: v >= 0, ">= 0"),
    ]
    for key, value, fits, valid in rules:
        if isinstance(value, (int, float)) and not fits(value):
            yield f"{key}: {value}; valid: {valid}; change it"
    if isinstance(model.get("optimizer"), str):
        from timm.optim import list_optimizers

        known = [str(name) for name in list_optimizers()]
        if model["optimizer"] not in known:
            yield f"model.optimizer: {model['optimizer']!r}; {nearest(model['optimizer'], known)}; take one"


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
    view: dict[str, Any] = {"scale": (), "ratio": (), "flip": 0.5} | _section(data, "view")
    if not all(isinstance(view[key], (list, tuple)) for key in ("scale", "ratio")):
        return  # said already
    fixed = view["flip"] == 0 and all(list(view[key]) == [1, 1] for key in ("scale", "ratio"))
    if model.get("remember_teachers") is True and not fixed:
        yield (
            "model.remember_teachers: true, but data.view crops or flips; valid: false, or a fixed view; "
            "set data.view: {scale: [1, 1], ratio: [1, 1], flip: 0}"
        )


def _shards(data: dict[str, Any], trainer: dict[str, Any]) -> Iterator[str]:
    from agglom.data import read_index, validate_layout
    from agglom.data.samples import check_fields

    if not isinstance(data.get("data"), str):
        return
    try:
        index = read_index(data["data"])
    except UserError as err:
        yield f"data.data: {err}"
        return
    for key, default in (("train_split", "train"), ("val_split", "val")):
        split = data.get(key, default)
        try:
            if split is not None:
                check_fields(index, split, data.get("fields") or ("image",))
        except UserError as err:
            at_fault = key if split not in index.splits else "fields"
            yield f"data.{at_fault}: {str(err).removeprefix('fields: ')}; change data.{at_fault}"
            return
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    world = (devices if isinstance(devices, int) and devices > 0 else 1) * (nodes if isinstance(nodes, int) else 1)
    workers = data.get("num_workers", 1)
    if isinstance(workers, int) and workers >= 0:
        yield from validate_layout(index, data.get("train_split", "train"), num_workers=workers, world_size=world)


def _models(model: dict[str, Any], data: dict[str, Any]) -> Iterator[str]:
    """Shapes of student and teachers on the meta device: divisibility, missing summaries, summary tokens."""
    from torch import nn

    from agglom.distiller import summary_tokens, teacher_weights
    from agglom.heads import TeacherConfig
    from agglom.students import Student
    from agglom.teachers import Teacher

    student, lines = _on_meta(model.get("student"), Student)
    yield from (f"model.student: {line}" if not line.startswith("student") else f"model.{line}" for line in lines)
    size = data.get("size")
    if student is not None and isinstance(size, int):
        fixed = student.input.size
        if fixed is not None and fixed != (size, size):
            yield f"data.size: {size}; valid: {fixed[0]}, the student's fixed size; change it or the student's img_size"
        elif size % student.input.stride:
            below = size - size % student.input.stride
            yield (
                f"data.size: {size} is not divisible by the student's stride {student.input.stride}; "
                f"valid: multiples of it, such as {max(below, student.input.stride)}; change it"
            )
    configs: dict[str, Any] = {}
    entries = model.get("teachers")
    for name, entry in (entries if isinstance(entries, dict) else {}).items():
        if not isinstance(name, str) or "." in name or hasattr(nn.ModuleDict(), name):
            yield f"model.teachers.{name}: no usable name; valid: letters, digits, _; no dict method's name; rename it"
            continue
        if not isinstance(entry, dict):
            continue
        encoder, lines = _on_meta(entry.get("encoder"), Teacher)
        yield from (f"model.teachers.{name}.encoder: {line}" for line in lines)
        if encoder is None:
            continue
        if encoder.input.size is None and isinstance(size, int) and size % encoder.input.stride:
            stride = encoder.input.stride
            yield f"model.teachers.{name}: data.size {size} is not divisible by its stride {stride}; set input_size"
        weights: dict[str, Any] = {
            k: entry.get(k) for k in ("summary_weight", "spatial_weight") if isinstance(entry.get(k), (int, float))
        }
        config = TeacherConfig(encoder=encoder, **weights)
        try:
            teacher_weights(name, config)
            configs[name] = config
        except UserError as err:
            yield str(err)
    if student is not None and configs and isinstance(entries, dict) and len(configs) == len(entries):
        try:
            summary_tokens(student, configs)
        except UserError as err:
            yield str(err)


def _on_meta(entry: Any, base: type) -> tuple[Any, list[str]]:
    """An object built without weights, or None with what keeps it from that (nothing if it is known already)."""
    import torch

    if isinstance(entry, str):
        entry = {"class_path": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("class_path"), str):
        return None, []
    cls = find_class(entry["class_path"], base)
    if cls is None or not issubclass(cls, base) or list(problems("", entry, base)):
        return None, []
    options = dict(entry.get("init_args") or {})
    if "pretrained" in inspect.signature(cls).parameters:
        options["pretrained"] = False
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # shapes are all we want
            return cls(**options), []
    except Exception as err:  # noqa: BLE001  a check reports whatever the constructor says
        return None, [" ".join(str(err).split()) or type(err).__name__]
    finally:
        logging.disable(logging.NOTSET)
