"""A table of pictures into shards: labels, captions and masks beside the paths."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from agglom.data.writing import (
    DEFAULTS,
    SPLITS,
    Writing,
    check_fractions,
    log,
    read_mask,
    read_picture,
    split_by_path,
    write_pictures,
)
from agglom.errors import UserError, brief, nearest

COLUMNS = ("image", "label", "caption", "mask", "split")
BETWEEN = ";"  # two labels of one cell


class Entry(NamedTuple):
    """One row: paths relative to the root, label or labels by number; None where the table has no such column."""

    file: str
    cls: int | list[int] | None
    caption: str | None
    mask: str | None


def write_csv(
    out: str | Path,
    *,
    source: str | Path,
    root: str | Path | None = None,
    classes: str | Path | None = None,
    seg_classes: str | Path | None = None,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    language: str | None = None,
    writing: Writing = DEFAULTS,
) -> Path:
    """Write the pictures of a table, one a row, as shards.

    The first line names the columns, in any order; others than these are left out and named in the log.

    | column    | is                                                                                          |
    |-----------|---------------------------------------------------------------------------------------------|
    | `image`   | path of the picture; needed                                                                 |
    | `label`   | name of its class, or its number where all are numbers (and no names); if any cell has `;`, |
    |           | all are lists and an empty cell is no label at all                                          |
    | `caption` | text; several captions one a line (in a quoted cell)                                        |
    | `mask`    | path of a mask: 8-bit grey or palette, of the picture's size; 255 is ignored                |
    | `split`   | train, val or test                                                                          |

    Pictures and masks that can't be read or do not fit are skipped, counted and named in the log.

    Args:
        out: the shard folder. `{split}-files.tsv` there says which file each sample key was.
        source: the table, in UTF-8: separated by tabs if its name ends with .tsv, else by commas.
        root: folder that the paths are relative to; None: the table's.
        classes: text file with the names of the classes, one a line, in order; None: those of the table, sorted.
        seg_classes: text file with the names of the mask's values, one a line, from 0 on; None: they have no names.
        val_fraction, test_fraction: part of the pictures that goes to these splits, by a hash of the path. Not for a
            table with a column `split`.
        language: of the captions, for the index.
        writing: size of the shards and the like.

    Returns:
        The path of index.json.

    Raises:
        UserError: a table or names that are missing or broken (with the line), a value out of range, no picture that
            can be read, or `out` can't be written or holds shards already.
    """
    source = Path(source)
    check_fractions(val_fraction, test_fraction)
    rows, columns = read_table(source)
    if "split" in columns and (val_fraction or test_fraction):
        raise UserError(f"source: {source} has a column split; leave the fractions at 0 or take the column out")
    for option, column, value in (("classes", "label", classes), ("seg_classes", "mask", seg_classes)):
        if value is not None and column not in columns:
            raise UserError(f"{option}: {value}, but {source} has no column {column}; add it or leave {option} out")
    labels, names = _labels(source, rows, None if classes is None else _lines(Path(classes), "classes"))
    entries = [
        Entry(row["image"], label, _captions(row.get("caption")), row.get("mask"))
        for row, label in zip(rows.values(), labels, strict=True)
    ]
    if "split" in columns:
        splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
        for entry, row in zip(entries, rows.values(), strict=True):
            splits[row["split"]].append(entry)
        splits = {split: some for split, some in splits.items() if some}
    else:
        splits = split_by_path(entries, val_fraction, test_fraction)
    extra = {}
    if "caption" in columns:
        extra["images_without_caption"] = sum(not entry.caption for entry in entries)
        if extra["images_without_caption"]:
            log.warning("%s: images without caption: %d", source, extra["images_without_caption"])
    return write_pictures(
        Path(out),
        splits,
        partial(_read, root=source.parent if root is None else Path(root)),
        layout="csv",
        where=f"source: {source}",
        about=f"pictures of the table {source.name}",
        writing=writing,
        extra=extra,
        classes=names,
        seg_classes=None if seg_classes is None else _lines(Path(seg_classes), "seg_classes"),
        language=language if "caption" in columns else None,
    )


def read_table(path: Path) -> tuple[dict[int, dict[str, str]], list[str]]:
    """The rows by their (last) line in the file, and those of the known columns that the table has.

    Raises:
        UserError: no such file, no column `image`, or, with its line: more or fewer cells than columns, no path, an
            unknown split, a picture for the second time.
    """
    rows: dict[int, dict[str, str]] = {}
    seen: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:  # -sig: spreadsheets begin with a mark
            reader = csv.DictReader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            columns = _columns(path, header)
            for cells in reader:
                line = f"{path}: line {reader.line_num}"
                if None in cells or None in cells.values():
                    raise UserError(f"{line}: not {len(header)} cells as in the first line; mend it or quote the cell")
                row = {name: cells[name].strip() for name in columns}
                empty = next((name for name in ("image", "mask") if row.get(name) == ""), None)
                if empty:
                    raise UserError(f"{line}: no {empty}; valid: a path; fill it in or take the row out")
                if "split" in row and row["split"] not in SPLITS:
                    raise UserError(f"{line}: split {row['split']!r}; {nearest(row['split'], SPLITS)}")
                if row["image"] in seen:
                    raise UserError(
                        f"{line}: {row['image']} is on line {seen[row['image']]} too; put labels into one cell with "
                        f"{BETWEEN!r} between them, and captions one a line"
                    )
                seen[row["image"]] = reader.line_num
                rows[reader.line_num] = row
    except OSError as err:
        raise UserError(f"source: {path}: can't be read ({err.strerror}); name a .csv or .tsv file") from err
    except (csv.Error, UnicodeDecodeError) as err:
        raise UserError(f"source: {path}: no table in UTF-8 ({brief(err)}); write it again") from err
    if not rows:
        raise UserError(f"source: {path} has no rows below its first line; add some")
    return rows, columns


def _columns(path: Path, header: list[str]) -> list[str]:
    twice = [name for name in COLUMNS if header.count(name) > 1]
    if twice:
        raise UserError(f"source: {path}: column {twice[0]} twice; keep one")
    if "image" not in header:
        raise UserError(f"source: {path}: no column image in its first line ({', '.join(header)[:80]}); name it there")
    unused = [name for name in header if name not in COLUMNS]
    if unused:
        log.warning("%s: columns left out: %s; used are %s", path, ", ".join(unused), ", ".join(COLUMNS))
    return [name for name in COLUMNS if name in header]


def _labels(
    path: Path, rows: dict[int, dict[str, str]], names: list[str] | None
) -> tuple[list[int | list[int] | None], list[str] | None]:
    """The labels by number, a row each, and the names of the classes if they have any."""
    if "label" not in next(iter(rows.values())):
        return [None] * len(rows), None
    cells = {line: [c.strip() for c in row["label"].split(BETWEEN) if c.strip()] for line, row in rows.items()}
    lists = any(BETWEEN in row["label"] for row in rows.values())
    for line, cell in cells.items():
        if not cell and not lists:
            raise UserError(f"{path}: line {line}: no label; valid: a name or number; fill it in or take the row out")
    given = {label for cell in cells.values() for label in cell}
    by_number = all(label.isascii() and label.isdecimal() for label in given) and not given <= set(names or ())
    if by_number:
        numbers = {label: int(label) for label in given if names is None or int(label) < len(names)}
    else:
        names = sorted(given) if names is None else names
        numbers = {name: number for number, name in enumerate(names)}
    for line, cell in cells.items():
        for label in cell:
            if label not in numbers:
                valid = f"valid: 0 to {len(names or ()) - 1}" if by_number else nearest(label, numbers)
                raise UserError(f"{path}: line {line}: label {label!r} is not among the classes; {valid}")
    labels = [sorted({numbers[label] for label in cell}) for cell in cells.values()]
    return [label if lists else label[0] for label in labels], names


def _captions(cell: str | None) -> str | None:
    return None if cell is None else "\n".join(" ".join(line.split()) for line in cell.splitlines() if line.strip())


def _lines(path: Path, option: str) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"{option}: {path}: can't be read ({brief(err)}); name a text file, one name a line") from err
    while lines and not lines[-1]:
        lines.pop()
    odd = next((n for n, name in enumerate(lines) if not name or name in lines[:n]), None)
    if odd is not None or not lines:
        what = "no names" if odd is None else f"line {odd + 1}: {lines[odd] or 'empty'!r} is no new name"
        raise UserError(f"{option}: {path}: {what}; valid: one name a line, each once")
    return lines


def _read(entry: Entry, *, root: Path) -> dict[str, Any]:
    data, ext, size = read_picture(root / entry.file)
    sample: dict[str, Any] = {"image": data, "ext": ext}
    if entry.cls is not None:
        sample["cls"] = entry.cls
    if entry.caption is not None:
        sample["txt"] = entry.caption
    if entry.mask is not None:
        sample["seg"] = read_mask(root / entry.mask, size)
    return sample
