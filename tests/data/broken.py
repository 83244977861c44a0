"""Shard folders to break, one fault at a time."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from agglom.data import write_index, write_shard

SIZE = 16
COUNT = 5  # samples a shard
FIELDS = ("image", "cls", "txt", "seg", "boxes")


def samples(start, stop):
    """Each says in every field which one it is."""
    for n in range(start, stop):
        yield {
            "key": f"{n:09d}",
            "image": encoded(np.full((SIZE, SIZE, 3), n % 256, np.uint8), "JPEG", quality=95),
            "ext": "jpg",
            "cls": n % 10,
            "txt": f"number {n}",
            "seg": np.full((SIZE, SIZE), n % 3, np.uint8),
            "boxes": [{"bbox": [n % 8, 1, 4, 5], "label": n % 10, "iscrowd": 0}],
        }


def folder(root, shards=12, count=COUNT, split="train"):
    """`shards` shards of `count` samples each, numbered through."""
    infos = [write_shard(root / f"{split}-{i:06d}.tar", samples(i * count, i * count + count)) for i in range(shards)]
    write_index(root, {split: infos}, classes=[f"c{n}" for n in range(10)], seg_classes=["a", "b", "c"])
    return root


def encoded(pixels, image_format="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def bomb(side=20000):
    """A PNG of side x side pixels in a few hundred bytes; it says so in its header."""
    data = bytearray(encoded(np.zeros((1, 1), np.uint8)))
    data[16:24] = side.to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def key(shard, place=2, count=COUNT):
    return f"{shard * count + place:09d}"


def path(root, shard, split="train"):
    return root / f"{split}-{shard:06d}.tar"


def members(file):
    with tarfile.open(file) as tar:
        return [(m, tar.extractfile(m).read() if m.isreg() else b"") for m in tar.getmembers()]


def write(file, entries):
    """(name or TarInfo, bytes) a member."""
    with tarfile.open(file, "w") as tar:
        for info, data in entries:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def change(root, shard, extension, data, place=2):
    """Replace one file of a sample; None takes it out."""
    name = f"{key(shard, place)}.{extension}"
    old = members(path(root, shard))
    assert any(m.name == name for m, _ in old), name
    new = [(m, data if m.name == name else was) for m, was in old if data is not None or m.name != name]
    write(path(root, shard), new)


def append(root, shard, *entries):
    write(path(root, shard), [*members(path(root, shard)), *entries])


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def truncate(root, shard, share=0.5):
    data = path(root, shard).read_bytes()
    path(root, shard).write_bytes(data[: int(len(data) * share)])


def spoil_header(root, shard, place=2):
    """Bytes of the checksum of the first file of a sample."""
    with tarfile.open(path(root, shard)) as tar:
        offset = next(m.offset for m in tar if m.name.startswith(key(shard, place)))
    data = bytearray(path(root, shard).read_bytes())
    data[offset + 148 : offset + 156] = b"rubbish "
    path(root, shard).write_bytes(data)


def recount(root, shard, count, split="train"):
    body = json.loads((root / "index.json").read_text())
    body["splits"][split]["shards"][shard]["count"] = count
    (root / "index.json").write_text(json.dumps(body))
