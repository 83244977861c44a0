"""`agglom info`: what there is, and what a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

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
    for title, names in (("embedded teachers", tiny), ("open_clip teachers", clips), ("timm teachers and students", models)):
        chosen = [name for name in names if pattern in name]
        lines.append(f"{title} ({len(chosen)} of {len(names)}):")
        shown = chosen if pattern or len(chosen) <= 12 else [*chosen[:12], "... (agglom info --pattern TEXT)"]
        lines += [f"  {name}" for name in shown]
    return "\n".join(lines)


def describe(ref: str) -> str:
    """What a shard folder, an export, a run directory or a model reference holds.

    Raises:
        UserError: none of them.
    """
    path = Path(ref)
    if (path / "index.json").is_file():
        from agglom.data import read_index

        index = read_index(path)
        lines = [f"shards {path}: {index.source}, licence {index.licence}"]
        lines += [
            f"  {split}: {count} samples in {len(index.shards(split))} shards, fields {', '.join(index.fields[split])}"
            for split, count in index.counts.items()
        ]
        return "\n".join([*lines, f"  classes: {', '.join(index.classes or ()) or 'none'}"])
    folder = path / "export" if (path / "export").is_dir() else path
    if (folder / "agglom.json").is_file():
        about = json.loads((folder / "agglom.json").read_text())
        student, given = about["student"], about["input"]
        lines = [
            f"export {folder}: {student['name']}, {about['steps']} steps, agglom {about['agglom']}",
            f"  input: {given['size'][0]} px, mean {given['mean']}, std {given['std']}, stride {given['stride']}",
            f"  summary tokens: {student['summary_tokens']}, registers: {student['registers']}",
        ]
        return "\n".join([*lines, *_teacher_lines(about["teachers"])])
    if (path / "teachers.json").is_file():
        lines = [f"run {path}: not finished, no export yet"]
        return "\n".join([*lines, *_teacher_lines(json.loads((path / "teachers.json").read_text())["teachers"])])
    if path.exists() or ":" not in ref:
        raise UserError(f"{ref}: neither shards (index.json), an export (agglom.json), a run (teachers.json) nor a reference")
    from agglom.runs import resolve

    model = resolve(ref)
    return f"{ref}: input {model.input}, summary {getattr(model, 'summary_dim', None)}, map {getattr(model, 'spatial_dim', None)}"


def _teacher_lines(teachers: dict) -> list[str]:
    return [f"  teacher {name}: {t['source']}, licence {t['licence']}, sha256 {t['sha256'][:16]}" for name, t in teachers.items()]
