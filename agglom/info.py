"""`agglom info`: what there is, and what a folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agglom.errors import UserError


def listing(pattern: str = "") -> str:
    """Names of teachers and students, those that contain `pattern`."""
    import open_clip
    import timm

    from agglom.teachers.tiny import NAMES as TINY_NAMES

    tiny = [f"tiny:{name}" for name in TINY_NAMES]
    clips = [f"open_clip:{name}/{tag}" for name, tag in open_clip.list_pretrained()]
    models = [f"timm:{name}" for name in timm.list_pretrained()]
    lines = []
    for title, names in (
        ("embedded teachers", tiny),
        ("open_clip teachers", clips),
        ("timm teachers and students", models),
    ):
        chosen = [name for name in names if pattern in name]
        lines.append(f"{title} ({len(chosen)} of {len(names)}):")
        shown = chosen if pattern or len(chosen) <= 12 else [*chosen[:12], "... (agglom info --pattern TEXT)"]
        lines += [f"  {name}" for name in shown]
    return "\n".join(lines)


def describe(ref: str) -> str:
    """What a shard folder, an export, a run directory or a model reference holds.

    Raises:
        UserError: none of them, or a file of it can't be read.
    """
    path = Path(ref)
    folder = path / "export" if (path / "export").is_dir() else path
    if (path / "index.json").is_file():
        return _shards(path)
    if (folder / "agglom.json").is_file():
        return _export(folder)
    if (path / "teachers.json").is_file():
        lines = [f"run {path}: not finished, no export yet; resume with --ckpt_path last"]
        return "\n".join([*lines, *_teachers(path / "teachers.json", _json(path / "teachers.json"))])
    if path.exists() or ":" not in ref:
        raise UserError(
            f"{ref}: {'not recognised' if path.exists() else 'no such folder'}; valid: shards (index.json), an export "
            f"(agglom.json), a run (teachers.json), or a reference such as tiny:clip or timm:NAME"
        )
    return _model(ref)


def _shards(path: Path) -> str:
    from agglom.data import read_index

    index = read_index(path)
    lines = [f"shards {path}: {index.source}, licence {index.licence}"]
    lines += [
        f"  {split}: {count} samples in {len(index.shards(split))} shards, fields {', '.join(index.fields[split])}"
        for split, count in index.counts.items()
    ]
    return "\n".join([*lines, f"  classes: {', '.join(index.classes or ()) or 'none'}"])


def _export(folder: Path) -> str:
    about = _json(folder / "agglom.json")
    try:
        student, given = about["student"], about["input"]
        lines = [
            f"export {folder}: {student['name']}, {about['steps']} steps, agglom {about['agglom']}",
            f"  input: {given['size'][0]} px, mean {given['mean']}, std {given['std']}, stride {given['stride']}",
            f"  summary tokens: {student['summary_tokens']}, registers: {student['registers']}",
        ]
    except (KeyError, TypeError, IndexError) as err:
        raise UserError(f"{folder / 'agglom.json'}: broken, no {err}; export the run again") from err
    return "\n".join([*lines, *_teachers(folder / "agglom.json", about)])


def _model(ref: str) -> str:
    """Shapes and input contract alone, so neither weights nor a hub are needed."""
    import torch

    from agglom.teachers import from_ref

    options = {} if ref.startswith("torch:") else {"pretrained": False}
    with torch.device("meta"):
        model = from_ref(ref, **options)
    spec, size = model.input, model.input.size
    pixels = f"{size[0]} x {size[1]} px" if size else f"any multiple of {spec.stride} px"
    return "\n".join(
        [
            f"teacher {ref}: {type(model).__name__}",
            f"  input: {pixels}, mean {spec.mean}, std {spec.std}, {spec.interpolation}",
            f"  summary: {model.summary_dim or 'none'}",
            f"  map: {model.spatial_dim or 'none'} channels, stride {spec.stride}"
            + (f", {' x '.join(map(str, spec.grid(size)))} cells" if size else ""),
        ]
    )


def _teachers(path: Path, holder: dict[str, Any]) -> list[str]:
    try:
        return [
            f"  teacher {name}: {t['source']}, licence {t['licence']}, sha256 {t['sha256'][:16]}"
            for name, t in holder["teachers"].items()
        ]
    except (KeyError, TypeError, AttributeError) as err:
        raise UserError(f"{path}: broken list of teachers ({err}); train or export again") from err


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise UserError(f"{path}: not JSON ({err}); train or export again") from err
