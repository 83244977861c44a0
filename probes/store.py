"""Rows of arrays on disk, written in parts by any number of processes, then one .npy file an array.

Each part is one file that appears when it is complete, so whoever comes after a crash goes on with the parts that lack.
When all are there, one process joins them into a folder that appears as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agglom.errors import UserError

VERSION = 2  # of what is stored; older folders are ignored
LARGE = 2**26  # bytes; what is copied of mapped arrays in memory, and not on disk, is smaller


@dataclass(frozen=True)
class Parts:
    """The parts of one folder to be.

    Attributes:
        place: the folder that will hold the joined arrays.
        variant: what else the arrays depend on; parts of another variant are not ours.
        number: how many parts there will be.
    """

    place: Path
    variant: str
    number: int

    @property
    def folder(self) -> Path:
        return self.place.parent / f".partial-{self.place.name}-{self.variant}"

    def missing(self) -> list[int]:
        """Parts that are not there yet."""
        return [part for part in range(self.number) if not self._file(part).is_file()]

    def write(self, part: int, arrays: Mapping[str, np.ndarray], lists: Mapping[str, list[Any]], rows: int) -> None:
        """One part, atomically; of two processes that write the same one, the later wins with the same content."""
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self._file(part).with_suffix(f".{os.getpid()}.tmp")
        meta = {"rows": str(rows), "lists": json.dumps(lists)}
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, scratch, metadata=meta)
        os.replace(scratch, self._file(part))

    def join(self) -> None:
        """All parts into one file an array; the parts are removed.

        Raises:
            UserError: a part can't be read, or arrays of different shapes.
        """
        counts: list[int] = []
        lists: dict[str, list[Any]] = {}
        scratch = self.place.parent / f".joined-{os.getpid()}-{self.place.name}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
            for part in range(self.number):
                with safe_open(self._file(part), "numpy") as stored:
                    counts.append(int(stored.metadata()["rows"]))
                    for name, values in json.loads(stored.metadata()["lists"]).items():
                        lists.setdefault(name, []).extend(values)
                    for name in stored.keys():  # noqa: SIM118  it isn't a dict
                        array = stored.get_tensor(name)
                        here = (array.shape[1:], array.dtype)
                        if shapes.setdefault(name, here) != here:
                            raise UserError(f"{self.place.name}: {name} of shape {here[0]} after {shapes[name][0]}")
            for name, (shape, dtype) in shapes.items():
                out = np.lib.format.open_memmap(
                    scratch / f"{name}.npy", mode="w+", dtype=dtype, shape=(sum(counts), *shape)
                )
                start = 0
                for part, count in enumerate(counts):
                    if count:
                        with safe_open(self._file(part), "numpy") as stored:
                            out[start : start + count] = stored.get_tensor(name)
                    start += count
                out.flush()
        except (SafetensorError, OSError) as err:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise UserError(f"{self.folder}: a part is broken ({err}); removed, run it again") from err
        meta = {"version": VERSION, "rows": sum(counts), "arrays": sorted(shapes), "lists": lists}
        (scratch / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(self.place, ignore_errors=True)  # complete, but without something that is wanted now
        os.replace(scratch, self.place)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.safetensors"


def read_meta(place: Path) -> dict[str, Any] | None:
    """What a complete folder says of itself, or None."""
    try:
        meta = json.loads((place / "meta.json").read_text())
        return meta if meta["version"] == VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_array(place: Path, name: str, meta: Mapping[str, Any]) -> np.ndarray | None:
    """An array of a complete folder, memory-mapped, or None where it has none of that name."""
    if name not in meta["arrays"]:
        return None
    # "c": nothing is ever written, but torch takes no read-only arrays without a warning
    return np.load(place / f"{name}.npy", mmap_mode="c", allow_pickle=False)


def select(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`array[rows]` in memory; of a mapped array, where that is `LARGE`, in a nameless file beside it, mapped again."""
    shape = (len(rows), *array.shape[1:])
    row = array[:1].nbytes
    path = getattr(array, "filename", None)
    if path is None or row * len(rows) <= LARGE:
        return array[rows]
    with tempfile.TemporaryFile(dir=Path(path).parent) as stream:  # gone with the last array that maps it
        step = max(1, LARGE // row)
        for start in range(0, len(rows), step):
            stream.write(np.ascontiguousarray(array[rows[start : start + step]]).data)
        stream.flush()
        return np.memmap(stream, array.dtype, mode="c", shape=shape)
