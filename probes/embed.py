"""`agglom embed`: a model's vectors of one split in one file, for whatever is done with them elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Mapping

import numpy as np

import agglom
from agglom.errors import UserError, brief, nearest
from agglom.features import Backbone
from agglom.probes.extract import Wanted, extract
from agglom.probes.fingerprint import weights_hash
from agglom.probes.gather import ThroughModel
from agglom.probes.source import Source
from agglom.whole import whole

ROWS = 16_384  # of a row group of Parquet; what is in memory at once


def write_embeddings(
    model: Backbone,
    data: str | Path,
    out: str | Path,
    *,
    name: str = "model",
    split: str = "train",
    size: int | None = None,
    limit: int | None = None,
    adaptor: str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> str:
    """Write what a model says of each image of a split, in the order of the shards.

    The file has the columns `key`; `summary` (N, D) float32, where the model has one; `mean` (N, C) float32, the mean
    over the map's cells, where it has a map; `label`, where the data have classes: (N,) int64, or (N, K) bool where an
    image may have several. And `about`, JSON of model and data: an array of no dimension in .npz, metadata in .parquet.

    The work is done in parts beside the file, so that one that was killed goes on where it was. They are removed at the
    end, unless several processes share them.

    Args:
        model: any teacher, student or export.
        data: shard folder or address.
        out: the file, .npz or .parquet (which needs pyarrow); replaced where there is one.
        name: of the model, for the file and for messages.
        split: of the data.
        size: pixels that images are resized and cropped to; None: they all have one size already.
        limit: only the first so many images.
        adaptor: the teacher in whose space the vectors are, instead of the model's own.
        rank, world_size: which process this is of how many; the first writes the file.

    Returns:
        what was written, in a line; empty in all processes but the first.

    Raises:
        UserError: another kind of file, no pyarrow, a place that can't be written, no such split or adaptor; bad data
            (see `agglom.probes.extract`).
    """
    out = Path(out)
    write = _writer(out)
    for option, value in (("size", size), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{option}: {value}; valid: 1 or more; leave it out to take all as they are")
    source = Source.open(data, size=size, fields=("cls",), limits=None if limit is None else {split: limit})
    splits = [found for found, count in source.index.counts.items() if count]
    if split not in splits:
        raise UserError(f"split: {split!r}; {nearest(split, splits)}; choose one that {data} has")
    if adaptor is not None:
        known = getattr(model, "adaptors", {})
        if adaptor not in known:
            raise UserError(f"adaptor: {adaptor!r}; {nearest(adaptor, known)}; left out: the model's own vectors")
        model = ThroughModel(model, adaptor)
    parts = out.with_name(f".{out.name}.parts")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        parts.mkdir(exist_ok=True)
    except OSError as err:
        raise UserError(f"out: {out}: {err.strerror or err}; valid: a file in a folder that can be written") from err
    targets, found, _ = extract({name: Wanted(model)}, source, split, parts, rank=rank, world_size=world_size)
    if rank:
        return ""
    features = found[name]
    columns = {"key": np.array(targets.keys), "summary": features.summary, "mean": features.mean}
    columns = {key: column for key, column in (*columns.items(), ("label", targets.labels)) if column is not None}
    about = {
        "model": name,
        "adaptor": adaptor,
        "fingerprint": weights_hash(model),
        "data": str(data),
        "data_hash": source.hash,
        "split": split,
        "size": size,
        "agglom": agglom.__version__,
    }
    try:
        with whole(out, owner="embed") as scratch:
            write(scratch, columns, json.dumps(about))
    except OSError as err:
        raise UserError(f"out: {out}: {err.strerror or err}; make room there or choose another place") from err
    if world_size == 1:
        shutil.rmtree(parts, ignore_errors=True)
    said = ", ".join(f"{key} ({column.shape[1]})" if column.ndim == 2 else key for key, column in columns.items())
    return f"{out}: {len(targets.keys)} images; {said}"


def _writer(out: Path) -> Any:
    """The function that writes this kind of file."""
    if out.suffix == ".npz":
        return _npz
    if out.suffix != ".parquet":
        raise UserError(f"out: {out}; valid: a file called .npz or .parquet; name it so")
    try:
        import pyarrow  # noqa: F401
    except ImportError as err:  # not there, or built for another numpy
        fix = "take .npz, or pip install --upgrade 'agglom[parquet]'"
        raise UserError(f"out: {out} needs pyarrow, which can't be imported ({brief(err)}); {fix}") from err
    return _parquet


def _npz(path: Path, columns: Mapping[str, np.ndarray], about: str) -> None:
    with open(path, "wb") as stream:  # a name would get another ending
        np.savez(stream, **{"about": np.array(about), **columns})  # type: ignore[arg-type]


def _parquet(path: Path, columns: Mapping[str, np.ndarray], about: str) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    def array(x: np.ndarray) -> Any:
        flat = pa.array(np.ascontiguousarray(x).reshape(-1))
        return flat if x.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, x.shape[1])

    def table(start: int) -> Any:
        return pa.table({key: array(column[start : start + ROWS]) for key, column in columns.items()})

    schema = table(0).schema.with_metadata({"agglom": about})
    with ParquetWriter(path, schema) as writer:
        for start in range(0, len(columns["key"]), ROWS):
            writer.write_table(table(start).cast(schema))
