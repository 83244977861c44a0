"""What student, teachers, adaptors and objectives say together, found on the meta device, without weights."""

from __future__ import annotations

import inspect
import logging
import warnings
from typing import Any, Callable, Iterator

import torch
from torch import nn

from agglom.adaptors import Adaptor
from agglom.cache.check import grid_problems
from agglom.data.crops import CropOptions
from agglom.data.crops import problems as crop_problems
from agglom.errors import UserError
from agglom.features import Dims
from agglom.heads import TeacherConfig, summary_tokens, teacher_weights
from agglom.mosaic import places
from agglom.plan import Stage
from agglom.schema import find_class, problems, signature_problems
from agglom.selfdistill import Objective
from agglom.students import Student, TimmStudent
from agglom.teachers import Teacher


def section(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def model_problems(model: dict[str, Any], data: dict[str, Any], stages: list[Stage]) -> Iterator[str]:
    """Shapes of student and teachers on the meta device: divisibility, missing summaries, tokens, taps, mosaics."""
    student, lines = on_meta(model.get("student"), Student)
    yield from (f"model.student: {line}" if not line.startswith("student") else f"model.{line}" for line in lines)
    if student is not None and not isinstance(student, TimmStudent):
        yield (
            f"model.student.class_path: {type(student).__name__} is no TimmStudent; valid: TimmStudent or a subclass, "
            "as exports are timm's; register your network with timm"
        )
    resolutions = list(_resolutions(data, stages))
    if student is not None:
        for key, pixels in resolutions:
            yield from _fits(student, key, pixels)
        yield from _margin(student, model, data)
        if isinstance(size := data.get("size"), int):
            yield from grid_problems({"model": model, "data": data}, student.input.grid((size, size)))
        yield from _needs(student, model, data)
    configs: dict[str, Any] = {}
    entries = model.get("teachers")
    for name, entry in (entries if isinstance(entries, dict) else {}).items():
        if not isinstance(name, str) or "." in name or hasattr(nn.ModuleDict(), name):
            yield f"model.teachers.{name}: no usable name; valid: letters, digits, _; no dict method's name; rename it"
            continue
        if not isinstance(entry, dict):
            continue
        encoder, lines = on_meta(entry.get("encoder"), Teacher)
        yield from (f"model.teachers.{name}.encoder: {line}" for line in lines)
        if encoder is None:
            continue
        weights: dict[str, Any] = {
            k: entry.get(k) for k in ("summary_weight", "spatial_weight") if isinstance(entry.get(k), (int, float))
        }
        config = TeacherConfig(encoder=encoder, **weights)
        try:
            used = teacher_weights(name, config)
            configs[name] = config
        except UserError as err:
            yield str(err)
            continue
        if entry.get("mosaic") is True:
            yield from _mosaic(name, encoder, used, [pixels for _, pixels in resolutions])
        if student is not None:
            yield from _adaptor(name, entry.get("adaptor") or model.get("adaptor"), student, encoder, used)
    if configs and isinstance(entries, dict) and len(configs) == len(entries):
        if student is not None:
            try:
                summary_tokens(student, configs)
            except UserError as err:
                yield str(err)
        yield from _balance(model.get("balance"), entries, data)


def _resolutions(data: dict[str, Any], stages: list[Stage]) -> Iterator[tuple[str, int]]:
    """(key, pixels) of every resolution that the student will see, validation's first."""
    size = data.get("size")
    if not isinstance(size, int):
        return
    yield "data.size", size
    for index, stage in enumerate(stages):
        for number, part in enumerate(stage.parts()):
            own = stage.partitions[number] if stage.partitions else None
            key = f"stages.{index}"
            if own is not None and (own.resolutions is not None or own.size is not None):
                key += f".partitions.{number}"
            chosen = part.resolutions or ([part.size] if part.size else [])
            yield from ((f"{key}.{'resolutions' if part.resolutions else 'size'}", pixels) for pixels in chosen)


def _fits(student: Any, key: str, pixels: int) -> Iterator[str]:
    fixed, stride = student.input.size, student.input.stride
    if fixed is not None and fixed != (pixels, pixels):
        fix = "change it or the student's img_size"
        if key != "data.size":
            fix = "change it, or set the student's kwargs.dynamic_img_size: true"
        yield f"{key}: {pixels}; valid: {fixed[0]}, the student's fixed size; {fix}"
    elif pixels % stride:
        below = pixels - pixels % stride
        yield (
            f"{key}: {pixels} is not divisible by the student's stride {stride}; "
            f"valid: multiples of it, such as {max(below, stride)}; change it"
        )


def _margin(student: Any, model: dict[str, Any], data: dict[str, Any]) -> Iterator[str]:
    """Shifted crops need exactly their margin around the images, and nobody else needs one."""
    shift, margin = model.get("shift"), data.get("margin", 0)
    wanted = 0
    if isinstance(shift, dict):
        std, limit = shift.get("std", 0.5), shift.get("limit", 2)
        if isinstance(std, (int, float)) and std <= 0:
            yield f"model.shift.std: {std}; valid: > 0 patches; change it"
        if isinstance(limit, int) and limit < 1:
            yield f"model.shift.limit: {limit}; valid: >= 1 patch; change it"
            return
        wanted = limit * student.input.stride if isinstance(limit, int) else 0
        if model.get("remember_teachers") is True:
            yield "model.remember_teachers: true; valid: false, since shifts change the views; remove the key"
    if isinstance(margin, int) and margin != wanted:
        why = (
            f"model.shift.limit x the student's stride {student.input.stride}" if wanted else "there is no model.shift"
        )
        yield f"data.margin: {margin}; valid: {wanted} ({why}); set it"


def _needs(student: Any, model: dict[str, Any], data: dict[str, Any]) -> Iterator[str]:
    """What objectives beside the teachers need of data and student, and whether the crops fit."""
    crops = data.get("crops")
    options = None
    if isinstance(crops, dict) and not list(problems("data.crops", crops, CropOptions)):
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in crops.items()}
        options = CropOptions(**values)
        lines = list(crop_problems(options))
        yield from (f"{line}; change it" for line in lines)
        if not lines:
            for name in ("global_size", *(["local_size"] if options.local_crops else [])):
                yield from _fits(student, f"data.crops.{name}", getattr(options, name))
    needed = False
    for name, entry in section(model, "objectives").items():
        entry = {"class_path": entry} if isinstance(entry, str) else entry
        cls = find_class(str(entry.get("class_path")), Objective) if isinstance(entry, dict) else None
        if cls is None or not issubclass(cls, Objective) or list(problems("", entry, Callable[[Dims], Objective])):
            continue
        key, given = f"model.objectives.{name}", entry.get("init_args") or {}
        build: Any = cls
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        frozen = [option for option in ("encoder", "text") if option in given]
        for option in frozen:
            given[option], lines = on_meta(given[option], Teacher)
            yield from (f"{key}.init_args.{option}: {line}" for line in lines)
        if any(given[option] is None for option in frozen):
            continue
        try:
            with torch.device("meta"):
                objective = build(student.dims, **given)
        except UserError as err:
            yield f"{key}.init_args.{err}"
            needed = True  # for all that is known
            continue
        if "patches" in objective.needs and not getattr(student, "is_vit", True):
            yield f"{key}: masks patches, which a CNN doesn't have; valid: a ViT as the student, or no such term"
        fields = data.get("fields") or ("image",)
        if "captions" in objective.needs and isinstance(fields, (list, tuple)) and "txt" not in fields:
            yield f"data.fields: {list(fields)}; valid: with txt, as {key} needs captions; add it"
        if "crops" in objective.needs:
            needed = True
            if not isinstance(crops, dict):
                yield f"{key}: needs crops; valid: data.crops: {{global_size: PIXELS, local_size: PIXELS}}; add it"
            elif options is not None and type(options.start) is type(objective.start):
                if options.start > objective.start:
                    yield f"data.crops.start: {options.start}; valid: at most {objective.start}, when {key} starts"
    if isinstance(crops, dict) and not needed:
        yield "data.crops: no objective looks at crops; valid: null; remove the section"


def _mosaic(name: str, encoder: Any, weights: dict[str, float], resolutions: list[int]) -> Iterator[str]:
    key, spec = f"model.teachers.{name}.mosaic", encoder.input
    if weights["summary"]:
        yield (
            f"{key}: true, but it has a summary loss, and a canvas of several images has one summary; "
            f"valid: false, or model.teachers.{name}.summary_weight: 0"
        )
    if spec.size is None:
        yield f"{key}: true, but its input size is free; valid: a fixed input_size, or false; change one"
        return
    whole = [pixels for pixels in resolutions if pixels % spec.stride == 0]
    yield from (
        f"{key}: true, but {pixels} pixels are not divisible by its stride {spec.stride}; valid: multiples; change it"
        for pixels in sorted({*resolutions} - {*whole})
    )
    if whole and all(places((pixels, pixels), spec) == (1, 1) for pixels in whole):
        yield (
            f"{key}: true, but no two images of {min(whole)} pixels fit on its canvas of {spec.size[0]} x "
            f"{spec.size[1]}; valid: resolutions up to {max(spec.size) // 2}, or false; change one"
        )


def _adaptor(name: str, entry: Any, student: Any, encoder: Any, weights: dict[str, float]) -> Iterator[str]:
    """What an adaptor says against these two, such as a rung past the depth."""
    if isinstance(entry, str):
        entry = {"class_path": entry}
    cls = find_class(str(entry.get("class_path")), Adaptor) if isinstance(entry, dict) else None
    if (
        cls is None
        or not issubclass(cls, Adaptor)
        or list(signature_problems("", entry.get("init_args") or {}, cls, given=4))
    ):
        return
    summary, spatial = (getattr(encoder.dims, kind) if weights[kind] else None for kind in ("summary", "spatial"))
    options = {**(entry.get("init_args") or {})}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cls(student.dims, Dims(summary, spatial), 0, student.tap_names, **options)
    except UserError as err:
        yield f"model.teachers.{name}.adaptor.init_args.{err}"


def _balance(entry: Any, teachers: dict[str, Any], data: dict[str, Any]) -> Iterator[str]:
    """Balances that name a number of teachers, or look at whose data an image is."""
    if not isinstance(entry, dict):
        return
    options = entry.get("init_args") or {}
    for option, number in (("teachers", options.get("teachers")), ("weights", options.get("weights"))):
        count = len(number) if isinstance(number, list) else number
        if isinstance(count, int) and count != len(teachers):
            yield (
                f"model.balance.init_args.{option}: for {count} teachers; valid: {len(teachers)}, one for each of "
                f"{', '.join(teachers)}; change it"
            )
    owners = [name for name, config in teachers.items() if isinstance(config, dict) and config.get("own_data")]
    if options.get("own_data") is True and not owners:
        yield (
            "model.balance.init_args.own_data: true, but no teacher has own data; valid: model.teachers.NAME.own_data "
            "with names of shards; set it or false"
        )


def on_meta(entry: Any, base: type) -> tuple[Any, list[str]]:
    """An object built without weights, or None with what keeps it from that (nothing if it is known already)."""
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
