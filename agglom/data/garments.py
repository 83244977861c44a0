"""Where the garments come from: the 70,000 real ones of Fashion-MNIST, split by item."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np

from agglom.errors import UserError

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
DOWNLOAD = Path("~/.cache/agglom").expanduser()
_MAGIC = {"images": 2051, "labels": 2049}  # of the idx format: unsigned bytes, three or one dimensions


class Garments(NamedTuple):
    """Grey-scale garments, bright on black.

    Attributes:
        images: (N, 28, 28) uint8.
        labels: (N,) uint8, an index into `CLASSES`.
    """

    images: np.ndarray
    labels: np.ndarray


def load_garments(source: str | Path | None = None) -> dict[str, Garments]:
    """Fashion-MNIST as train, val and test garments, no garment in two of them.

    Train is Fashion-MNIST's own train set. Its test set, without the items that occur in train byte for byte or twice,
    is dealt out: every third item to val, the rest to test.

    Args:
        source: a folder with the four idx files, gzipped or not. None: Debian's package `dataset-fashion-mnist`
            where it is installed, else torchvision's download (checksummed) into ~/.cache/agglom.

    Raises:
        UserError: the files are not there, or are not Fashion-MNIST's.
    """
    folder = _find(source)
    train, test = _read_pair(folder, "train"), _read_pair(folder, "t10k")
    seen = {image.tobytes() for image in train.images}
    fresh = []
    for i, image in enumerate(test.images):
        data = image.tobytes()
        if data not in seen:
            seen.add(data)
            fresh.append(i)
    val, held = fresh[::3], [item for i, item in enumerate(fresh) if i % 3]
    return {
        "train": train,
        "val": Garments(test.images[val], test.labels[val]),
        "test": Garments(test.images[held], test.labels[held]),
    }


def _find(source: str | Path | None) -> Path:
    if source is not None:
        return Path(source)
    if DEBIAN.is_dir():
        return DEBIAN
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(DOWNLOAD), train=True, download=True)
    except Exception as err:  # no network, a proxy's page instead of the file, a full disk: the way out is the same
        raise UserError(
            f"Fashion-MNIST: not in {DEBIAN}, and its download into {DOWNLOAD} failed ({type(err).__name__}); "
            "either `apt install dataset-fashion-mnist`, or give --source DIR with its four idx files, "
            "or run once with network access for the download"
        ) from err
    return DOWNLOAD / "FashionMNIST" / "raw"


def _read_pair(folder: Path, name: str) -> Garments:
    images = _read_idx(folder, f"{name}-images-idx3-ubyte", "images")
    labels = _read_idx(folder, f"{name}-labels-idx1-ubyte", "labels")
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max(initial=0) >= len(CLASSES):
        raise UserError(f"{folder}: {name} holds {images.shape} images and {len(labels)} labels; not Fashion-MNIST's")
    return Garments(images, labels)


def _read_idx(folder: Path, name: str, kind: str) -> np.ndarray:
    plain, packed = folder / name, folder / f"{name}.gz"
    try:
        data = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError) as err:
        raise UserError(
            f"source: {folder} has no readable {name} or {name}.gz; give a folder with Fashion-MNIST's four idx files"
        ) from err
    rank = 3 if kind == "images" else 1
    header = np.frombuffer(data[: 4 + 4 * rank], dtype=">u4")
    if len(header) <= rank or header[0] != _MAGIC[kind] or len(data) != 4 + 4 * rank + int(np.prod(header[1:])):
        raise UserError(f"source: {folder / name} is not an idx file of {kind}; fetch Fashion-MNIST again")
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank).reshape(tuple(int(n) for n in header[1:]))
