"""Files that are there whole or not at all, whatever happens to the process or the machine that writes them."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator


@contextmanager
def whole(path: Path, *, owner: str | None = None) -> Iterator[Path]:
    """Where to write what shall be `path`: beside it, under a name that begins with a dot and ends with .tmp.

    Once the block is left, the content is on the disk and then under its name, in place of an older one. An error in
    the block leaves neither. The folder is made where there is none.

    Args:
        path: of the file.
        owner: part of the other name, such that no two processes share it; left out: this process's number. With one
            that a later run has again, that run also clears away what a killed one left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid() if owner is None else owner}.tmp")
    try:
        yield scratch
        sync(scratch)
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems can't for folders
        if path.is_file():
            raise
    finally:
        os.close(descriptor)
