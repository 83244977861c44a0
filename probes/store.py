"""Rows of arrays on disk, written in parts by any number of processes, then one .npy file an array.

Each part is one file that appears when it is complete, so whoever comes after a crash goes on with the parts that lack.
When all are there, one process joins them into a folder that appears as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agglom.errors import UserError
from agglom.whole import whole

VERSION = 3  # of what is stored; older folders are ignored
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
        return [part for part in range(self.number) if not self.has(part)]

    def has(self, part: int) -> bool:
        """Whether a part is there."""
        return self._file(part).is_file()

    def write(self, part: int, arrays: Mapping[str, np.ndarray], lists: Mapping[str, list[Any]], rows: int) -> None:
        """One part, atomically; of two processes that write the same one, the later wins with the same content.

        Raises:
            UserError: it can't be written.
        """
        kinds = {name: [array.dtype.str, array.shape[1:]] for name, array in arrays.items()}
        meta = {"rows": str(rows), "lists": json.dumps(lists), "kinds": json.dumps(kinds)}
        with _writing(self.folder), whole(self._file(part)) as scratch:
            save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, scratch, metadata=meta)

    def join(self) -> None:
        """All parts into one file an array; the parts are removed.

        Raises:
            UserError: a part can't be read (that one is removed), arrays of different shapes, or no place to write.
        """
        rows, kinds, lists = self._survey()
        scratch = self.place.parent / f".joined-{os.getpid()}-{self.place.name}"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            with _writing(scratch):
                scratch.mkdir()
                for name, (dtype, shape) in kinds.items():
                    with open(scratch / f"{name}.npy", "wb") as stream:
                        head = {"descr": dtype, "fortran_order": False, "shape": (rows, *shape)}
                        np.lib.format.write_array_header_1_0(stream, head)
                        for part in range(self.number):
                            stream.write(self._rows(part, name))
                meta = {"version": VERSION, "rows": rows, "arrays": sorted(kinds), "lists": lists}
                (scratch / "meta.json").write_text(json.dumps(meta))
                shutil.rmtree(self.place, ignore_errors=True)  # complete, but without something that is wanted now
                os.replace(scratch, self.place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _survey(self) -> tuple[int, dict[str, Any], dict[str, list[Any]]]:
        """Rows of all parts, name -> (dtype, shape of a row) of the arrays, and the lists."""
        rows = 0
        kinds: dict[str, Any] = {}
        lists: dict[str, list[Any]] = {}
        for part in range(self.number):
            with self._reading(part), safe_open(self._file(part), "numpy") as stored:
                said = {key: json.loads(value) for key, value in stored.metadata().items()}
                rows += said["rows"]
                here, more = said["kinds"], said["lists"]
            for name, values in more.items():
                lists.setdefault(name, []).extend(values)
            for name, kind in here.items():
                if kinds.setdefault(name, kind) != kind:
                    raise UserError(
                        f"{self.place.name}: {name} of {kind} after {kinds[name]}; is the model's output fixed?"
                    )
        return rows, kinds, lists

    def _rows(self, part: int, name: str) -> bytes:
        """An array of a part; nothing where the part has no rows."""
        with self._reading(part), safe_open(self._file(part), "numpy") as stored:
            return stored.get_tensor(name).tobytes() if name in stored.keys() else b""  # noqa: SIM118  it isn't a dict

    @contextmanager
    def _reading(self, part: int) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as err:
            self._file(part).unlink(missing_ok=True)
            raise UserError(f"{self._file(part)}: is broken ({err}); removed, run it again to make it anew") from err

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.safetensors"


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as err:
        raise UserError(f"{place}: can't be written ({err}); make room there or choose another folder") from err


def read_meta(place: Path) -> dict[str, Any] | None:
    """What a complete folder says of itself, or None."""
    try:
        meta = json.loads((place / "meta.json").read_text())
        there = all((place / f"{name}.npy").is_file() for name in meta["arrays"])
        return meta if there and meta["version"] == VERSION else None
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
