"""Bad shards before both streams: each is skipped and counted by kind, or refused with one line.

None hangs, none ends in a traceback, and no picture ever meets another one's label: every sample's fields say which
one it is.

Then random bytes: flipped, cut and put in, in tars and in `index.json`.
"""

import gzip
import io
import itertools
import json
import logging
import random
import signal
import tarfile

import numpy as np
import pytest
from broken import (
    COUNT,
    FIELDS,
    append,
    bomb,
    change,
    encoded,
    folder,
    key,
    link,
    members,
    path,
    recount,
    spoil_header,
    truncate,
    write,
)
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from agglom.data import EvalView, TrainView, eval_loader, eval_stream, read_index, train_stream
from agglom.data.faults import KINDS
from agglom.data.reading import ShardReader
from agglom.data.samples import decode_sample, sample_faults
from agglom.errors import UserError
from agglom.probes.boxes import truth_of

SHARDS = 3


@pytest.fixture(autouse=True)
def no_hang():
    def late(signum, frame):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def own(sample, odd=()):
    """Whether all fields are of the sample that the key names. Pictures are of one colour, so views don't matter."""
    n = int(sample["key"])
    paired = sample["cls"] == n % 10 and sample["txt"] == f"number {n}"
    paired &= all(box["label"] == n % 10 for box in sample["boxes"])
    return paired and (n in odd or bool((sample["seg"] == n % 3).all() and abs(sample["image"].float().mean() - n) < 1))


# ---------------------------------------------------------------------------------------------------- broken shards


def field(extension, data):
    return lambda root: change(root, 1, extension, data)


def again(name):
    """One file of a sample comes twice, in its place."""

    def spoil(root):
        entries = members(path(root, 1))
        at = next(i for i, (m, _) in enumerate(entries) if m.name == f"{key(1)}.{name}")
        write(path(root, 1), [*entries[:at], entries[at], (f"{key(1)}.{name}", entries[at - 5][1]), *entries[at + 1 :]])

    return spoil


def linked(root):
    """A sample's picture is a link to the picture of another one, or to a file of this machine."""
    entries = members(path(root, 1))
    names = [m.name for m, _ in entries]
    entries[names.index(f"{key(1)}.jpg")] = link(f"{key(1)}.jpg", "/etc/passwd")
    entries[names.index(f"{key(1, 3)}.jpg")] = link(f"{key(1, 3)}.jpg", f"{key(1)}.jpg", tarfile.LNKTYPE)
    write(path(root, 1), entries)


def devices(root):
    """A sample's picture is a device, a pipe, a hard link to a file of this machine, a folder."""
    entries = members(path(root, 1))
    names = [m.name for m, _ in entries]
    for place, kind in enumerate((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE)):
        entries[names.index(f"{key(1, place)}.jpg")] = link(f"{key(1, place)}.jpg", "/etc/passwd", kind)
    write(path(root, 1), entries)


def heavy(kind):
    """The attributes or the long name of a sample's first file claim two gigabytes, and a compressed tar keeps that."""

    def spoil(root):
        info = tarfile.TarInfo("evil")
        info.type, info.size = kind, 2 << 30
        with tarfile.open(path(root, 1)) as tar:
            offset = next(m.offset for m in tar if m.name.startswith(key(1)))
        data = path(root, 1).read_bytes()
        zeros = bytes(8 << 20)
        path(root, 1).write_bytes(gzip.compress(data[:offset] + info.tobuf(tarfile.GNU_FORMAT)[:512] + zeros, 1))

    return spoil


def renamed(before):
    def spoil(root):
        write(
            path(root, 1), [(before + m.name if m.name.startswith(key(1)) else m, d) for m, d in members(path(root, 1))]
        )

    return spoil


def swapped(root):
    """The files of two samples lie mixed."""
    entries = members(path(root, 1))
    entries[7], entries[12] = entries[12], entries[7]
    write(path(root, 1), entries)


def zipped(share):
    def spoil(root):
        data = gzip.compress(path(root, 1).read_bytes())
        path(root, 1).write_bytes(data[: int(len(data) * share)])

    return spoil


def claiming(size):
    """The header of a sample's first file claims another size."""

    def spoil(root):
        with tarfile.open(path(root, 1)) as tar:
            info = next(m for m in tar if m.name.startswith(key(1)))
        offset, info.size = info.offset, size
        data = bytearray(path(root, 1).read_bytes())
        data[offset : offset + 512] = info.tobuf(tarfile.GNU_FORMAT)[:512]
        path(root, 1).write_bytes(data)

    return spoil


def sparse(root):
    """A file that claims to be 2^50 zeros, in one block."""
    info = tarfile.TarInfo(f"{key(1)}.jpg")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = tarfile.GNUTYPE_SPARSE
    block[483:495] = tarfile.itn(1 << 50, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    entries = members(path(root, 1))
    write(path(root, 1), [e for e in entries if e[0].name != f"{key(1)}.jpg"])
    data = path(root, 1).read_bytes()
    with tarfile.open(path(root, 1)) as tar:
        offset = next(m.offset for m in tar if m.name.startswith(key(1)))
    path(root, 1).write_bytes(data[:offset] + bytes(block) + data[offset:])


WIDE, WIDE_MASK = encoded(np.full((1, 5000, 3), 7, np.uint8)), encoded(np.full((1, 5000), 1, np.uint8))

SKIPPED = {
    "truncated tar": (lambda root: truncate(root, 1, 0.57), {"truncated tar"}),
    "truncated in the first header": (lambda root: truncate(root, 1, 0.01), {"truncated tar"}),
    "bad header": (lambda root: spoil_header(root, 1), {"bad tar header"}),
    "no tar": (lambda root: path(root, 1).write_bytes(random.Random(0).randbytes(20_000)), {"bad tar header"}),
    "zero bytes later": (lambda root: path(root, 1).write_bytes(b""), {"empty shard"}),
    "gone later": (lambda root: path(root, 1).unlink(), {"missing shard"}),
    "a folder later": (lambda root: (path(root, 1).unlink(), path(root, 1).mkdir()), {"unreadable shard"}),
    "compressed and cut": (zipped(0.6), {"truncated tar"}),
    "a size of 2^60": (claiming(1 << 60), {"too large", "truncated tar"}),
    "a size below 0": (claiming(-5000), {"bad tar header"}),
    "a sparse file of 2^50 bytes": (sparse, {"too large"}),
    "picture cut": (lambda root: change(root, 1, "jpg", members(path(root, 1))[2][1][:300]), {"bad image"}),
    "picture empty": (field("jpg", b""), {"bad image"}),
    "no picture": (field("jpg", b"\xff\xd8\xff" + b"x" * 500), {"bad image"}),
    "bomb": (field("jpg", bomb()), {"too large"}),
    "bomb as mask": (field("seg.png", bomb()), {"too large"}),
    "mask of another size": (field("seg.png", encoded(np.zeros((16, 15), np.uint8))), {"mask size"}),
    "mask in colour": (field("seg.png", encoded(np.zeros((16, 16, 3), np.uint8))), {"bad mask"}),
    "mask value": (field("seg.png", encoded(np.full((16, 16), 9, np.uint8))), {"mask value"}),
    "boxes cut": (field("boxes.json", b'[{"bbox": [1,'), {"bad JSON"}),
    "boxes deep": (field("boxes.json", b"[" * 10_000), {"bad JSON"}),
    "boxes of another kind": (field("boxes.json", b'{"bbox": [1, 1, 2, 2]}'), {"bad box"}),
    "box outside": (field("boxes.json", b'[{"bbox": [20, 1, 2, 2], "label": 7}]'), {"bad box"}),
    "box without area": (field("boxes.json", b'[{"bbox": [2, 1, 0, 2], "label": 7}]'), {"bad box"}),
    "box of an unknown class": (field("boxes.json", b'[{"bbox": [2, 1, 2, 2], "label": 70}]'), {"class value"}),
    "class in words": (field("cls", b"cat"), {"bad class"}),
    "class of 5000 digits": (field("cls", b"7" * 5000), {"bad class"}),
    "class outside": (field("cls", b"70"), {"class value"}),
    "caption in latin-1": (field("txt", b"gr\xf6\xdfe"), {"bad caption"}),
    "key without image": (field("jpg", None), {"missing field"}),
    "key without caption": (field("txt", None), {"missing field"}),
    "links": (linked, {"unsafe member"}),
    "devices": (devices, {"unsafe member"}),
    "attributes of 2 GiB": (heavy(tarfile.XHDTYPE), {"bad tar header"}),
    "attributes of all files of 2 GiB": (heavy(tarfile.XGLTYPE), {"bad tar header"}),
    "a name of 2 GiB": (heavy(tarfile.GNUTYPE_LONGNAME), {"bad tar header"}),
    "name with ..": (renamed("../../"), {"unsafe member"}),
    "absolute name": (renamed("/tmp/"), {"unsafe member"}),
    "fewer than the index says": (lambda root: recount(root, 1, COUNT + 2), {"wrong count"}),
}  # fmt: skip

READ = {
    "compressed": zipped(1),
    "cmyk": field("jpg", encoded(__import__("PIL.Image").Image.new("CMYK", (16, 16)), "JPEG")),
    "16 bits": field("jpg", encoded(np.zeros((16, 16), np.uint16))),
    "wide": lambda root: [
        change(root, 1, name, data) for name, data in (("jpg", WIDE), ("seg.png", WIDE_MASK), ("boxes.json", b"[]"))
    ],
}

REFUSED = {
    "zero-byte shard": (lambda root: path(root, 1).write_bytes(b""), "1 of 3 shards are empty"),
    "missing shard": (lambda root: path(root, 1).unlink(), "1 of 3 shards are missing"),
    "more than the index says": (lambda root: recount(root, 1, COUNT - 1), "holds more than the 4 samples"),
    "a key twice": (
        lambda root: append(root, 1, *[(m.name, d) for m, d in members(path(root, 1))[:5]]),
        "holds more than the 5 samples",
    ),
    "a file twice": (again("cls"), "holds more than the 5 samples"),
    "samples mixed": (swapped, "holds more than the 5 samples"),
    "a stray link": (lambda root: append(root, 1, link("evil", "/etc/passwd")), "holds more than the 5 samples"),
}


def streams(root):
    yield eval_stream(root, "train", fields=FIELDS, max_bad_fraction=0.9)
    yield eval_stream(root, "train", fields=FIELDS, max_bad_fraction=0.9, transform=EvalView(size=8))
    yield train_stream(root, "train", fields=FIELDS, max_bad_fraction=0.9, shuffle=4)
    yield train_stream(root, "train", fields=FIELDS, max_bad_fraction=0.9, transform=TrainView(size=8, scale=(0.2, 1)))


@pytest.mark.parametrize("name", SKIPPED)
def test_skipped_and_counted_by_kind(tmp_path, caplog, name):
    spoil, kinds = SKIPPED[name]
    index = read_index(folder(tmp_path, shards=SHARDS))
    spoil(tmp_path)
    index = index if "later" in name else read_index(tmp_path)
    for stream in streams(index):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "agglom.data"):
            seen = list(itertools.islice(stream, 60))
        assert set(stream.bad_kinds) <= kinds <= {*stream.bad_kinds, "too large"}, stream.bad_kinds
        assert stream.bad == sum(stream.bad_kinds.values()) > 0
        assert all(own(sample) for sample in seen)
        shown = [message for message in caplog.messages if "train-000001.tar" in message]
        assert shown and len(shown) == len(caplog.messages) <= 3 * len(stream.bad_kinds)
        assert all("\n" not in message for message in shown)


@pytest.mark.parametrize("name", READ)
def test_odd_but_read(tmp_path, name):
    READ[name](folder(tmp_path, shards=SHARDS))
    for stream in streams(tmp_path):
        seen = list(itertools.islice(stream, 100))
        assert stream.bad == 0 and all(own(sample, odd={int(key(1))}) for sample in seen)
        assert key(1) in {sample["key"] for sample in seen}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(tmp_path, name):
    spoil, words = REFUSED[name]
    spoil(folder(tmp_path, shards=SHARDS))
    for make in (eval_stream, train_stream):
        seen = []
        with pytest.raises(UserError, match=words) as err:
            for sample in itertools.islice(make(tmp_path, "train", fields=FIELDS, max_bad_fraction=0.9), 200):
                seen.append(sample)
        assert "\n" not in str(err.value) and all(own(sample) for sample in seen)


def test_too_many_are_refused_with_their_kinds(tmp_path):
    folder(tmp_path, shards=SHARDS)
    change(tmp_path, 0, "txt", b"\xff")
    change(tmp_path, 1, "jpg", b"")
    change(tmp_path, 2, "cls", b"cat")
    with pytest.raises(UserError) as err:
        list(eval_stream(tmp_path, "train", fields=FIELDS, max_bad_fraction=0.15))
    message = str(err.value)
    assert "3 of 13 samples read are bad (bad image 1, bad class 1, bad caption 1)" in message and key(2) in message
    assert "agglom data verify" in message and "\n" not in message


def test_a_class_without_names_fits_into_a_batch(tmp_path):
    folder(tmp_path, shards=1)
    body = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**body, "classes": None}))
    change(tmp_path, 0, "cls", b"9" * 30)
    loader = eval_loader(tmp_path, "train", fields=("cls",), batch_size=5, max_bad_fraction=0.5)
    assert [batch["cls"].tolist() for batch in loader] == [[0, 1, 3, 4]]


def test_workers_count_by_kind(tmp_path):
    folder(tmp_path, shards=SHARDS)
    change(tmp_path, 0, "txt", b"\xff")
    truncate(tmp_path, 1, 0.57)
    loader = eval_loader(tmp_path, "train", fields=FIELDS, batch_size=4, num_workers=2, max_bad_fraction=0.5)
    seen = [at for batch in loader for at in batch["key"]]
    assert loader.source.bad_kinds["bad caption"] == 1 and set(loader.source.bad_kinds) == {
        "bad caption",
        "truncated tar",
    }
    assert len(seen) == len(set(seen)) == SHARDS * COUNT - loader.source.bad


# ---------------------------------------------------------------------------------------------------- broken indices


def shard(body, **values):
    body["splits"]["train"]["shards"][0] |= values


INDICES = {
    "count below 0": lambda body: shard(body, count=-1),
    "count of 10^30": lambda body: shard(body, count=10**30),
    "count in parts": lambda body: shard(body, count=1.5),
    "count infinite": lambda body: shard(body, count=float("inf")),
    "count of truth": lambda body: shard(body, count=True),
    "count in words": lambda body: shard(body, count="5"),
    "file of none": lambda body: shard(body, file=None),
    "file without a name": lambda body: shard(body, file=""),
    "file that is a command": lambda body: shard(body, file="pipe:touch evil; cat x"),
    "file with a line break": lambda body: shard(body, file="a\nb"),
    "file of half a letter": lambda body: shard(body, file="\ud800"),
    "shards of one": lambda body: body["splits"]["train"].update(shards={"file": "a", "count": 1}),
    "shards of numbers": lambda body: body["splits"]["train"].update(shards=[1]),
    "splits in a row": lambda body: body.update(splits=[1]),
    "no splits": lambda body: body.pop("splits"),
    "split of nothing": lambda body: body["splits"].update(train=None),
    "fields in words": lambda body: body["splits"]["train"].update(fields="image"),
    "fields of fields": lambda body: body["splits"]["train"].update(fields=[["image"]]),
    "classes in words": lambda body: body.update(classes="cat"),
    "classes of numbers": lambda body: body.update(classes=[1, 2]),
    "seg_classes by name": lambda body: body.update(seg_classes={"a": 1}),
    "licence of numbers": lambda body: body.update(licence=7),
    "extra in words": lambda body: body.update(extra="more"),
    "version": lambda body: body.update(version=[1]),
    "format": lambda body: body.pop("format"),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_are_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path, shards=1)
    body = json.loads((tmp_path / "index.json").read_text())
    INDICES[name](body)
    (tmp_path / "index.json").write_text(json.dumps(body))
    with pytest.raises(UserError) as err:
        read_index(tmp_path)
    assert str(err.value).startswith(str(tmp_path / "index.json")) and str(err.value).isprintable()
    assert not (tmp_path / "evil").exists()


# ---------------------------------------------------------------------------------------------------- random bytes

BOUNDED = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# where, and what is done there: a byte put in its place, cut off, taken out, or rubbish put in
HARM = st.lists(
    st.tuples(
        st.floats(0, 0.9999), st.sampled_from(["flip", "cut", "drop", "insert"]), st.binary(min_size=1, max_size=8)
    ),
    min_size=1,
    max_size=4,
)


def harmed(data, harm):
    data = bytearray(data)
    for share, how, rubbish in harm:
        at = int(share * len(data))
        if how == "flip":
            data[at : at + len(rubbish)] = rubbish
        elif how == "cut":
            del data[at:]
        elif how == "drop":
            del data[at : at + len(rubbish)]
        else:
            data[at:at] = rubbish
    return bytes(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = folder(tmp_path_factory.mktemp("whole"), shards=1)
    return read_index(root), path(root, 0).read_bytes()


@BOUNDED
@given(harm=HARM)
def test_the_reader_takes_any_bytes(whole, harm):
    index, data = whole
    reader = ShardReader(io.BytesIO(harmed(data, harm)), "a.tar")
    for raw in itertools.islice(reader, 1000):
        assert all(fault.kind in KINDS and "\n" not in fault.detail for fault in sample_faults(raw, FIELDS, index))
    assert reader.damage is None or reader.damage.kind in KINDS


@BOUNDED
@given(harm=HARM)
def test_a_stream_counts_or_refuses_any_bytes(whole, tmp_path, harm):
    index, data = whole
    root = tmp_path / "harmed"
    root.mkdir(exist_ok=True)
    (root / "index.json").write_bytes((path(type(tmp_path)(index.root), 0).parent / "index.json").read_bytes())
    path(root, 0).write_bytes(harmed(data, harm))
    try:
        stream = eval_stream(root, "train", fields=FIELDS, max_bad_fraction=1, transform=EvalView(size=8))
        seen = list(stream)
        assert len(seen) + stream.bad == COUNT == stream.seen
    except UserError as err:
        assert "\n" not in str(err)


@BOUNDED
@given(harm=HARM)
def test_any_index_is_read_or_refused(whole, tmp_path, harm):
    index, data = whole
    good = (path(type(tmp_path)(index.root), 0).parent / "index.json").read_bytes()
    (tmp_path / "index.json").write_bytes(harmed(good, harm))
    path(tmp_path, 0).write_bytes(data)
    try:
        for split in read_index(tmp_path).splits:
            next(iter(eval_stream(tmp_path, split, fields=FIELDS, max_bad_fraction=1)), None)
    except UserError as err:
        assert "\n" not in str(err)


class Counting(io.BytesIO):
    """How much of it was read."""

    given = 0

    def read(self, size=-1):
        data = super().read(size)
        self.given += len(data)
        return data


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_of_a_header_no_more_is_read_than_its_bound(kind):
    info = tarfile.TarInfo("evil")
    info.type, info.size = kind, 32 << 20
    stream = Counting(info.tobuf(tarfile.GNU_FORMAT)[:512] + bytes(32 << 20))
    reader = ShardReader(stream, "a.tar")
    assert list(reader) == [] and reader.damage.kind == "bad tar header" and stream.given < 1 << 20


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@BOUNDED
@given(part=st.sampled_from(["splits", "classes", "shards", "fields", "file", "count", "licence"]), value=JSON)
def test_any_value_in_an_index_is_read_or_refused(whole, tmp_path, part, value):
    index, data = whole
    body = json.loads((path(type(tmp_path)(index.root), 0).parent / "index.json").read_text())
    split = body["splits"]["train"]
    place = {"shards": split, "fields": split, "file": split["shards"][0], "count": split["shards"][0]}.get(part, body)
    place[part] = value
    (tmp_path / "index.json").write_text(json.dumps(body))
    path(tmp_path, 0).write_bytes(data)
    try:
        for name in read_index(tmp_path).splits:
            next(iter(eval_stream(tmp_path, name, fields=("cls",), max_bad_fraction=1)), None)
    except UserError as err:
        assert "\n" not in str(err)


PICTURE = encoded(np.zeros((16, 16, 3), np.uint8))
NUMBER = st.integers(-2, 20) | st.floats(-2, 20) | st.floats() | st.integers() | st.booleans()
BOX = st.fixed_dictionaries(
    {"bbox": st.lists(NUMBER, min_size=4, max_size=4) | st.lists(NUMBER, max_size=5) | JSON, "label": NUMBER | JSON},
    optional={"iscrowd": JSON},
) | st.builds(
    lambda bbox, label: {"bbox": bbox, "label": label},
    st.tuples(*[st.integers(0, 7)] * 2, *[st.integers(0, 9)] * 2),
    st.integers(0, 10),
)


@settings(BOUNDED, max_examples=400)
@given(boxes=st.lists(BOX, max_size=3) | JSON)
def test_any_boxes_are_taken_or_a_fault(whole, boxes):
    """Those that pass have an area within the picture, and the detection probe takes just them."""
    index, _ = whole
    raw = {"__key__": "a", "__url__": "a.tar", "png": PICTURE, "boxes.json": json.dumps(boxes).encode()}
    faults = sample_faults(raw, ("image", "boxes"), index)
    event("refused" if faults else "taken")
    assert all(fault.kind in ("bad box", "class value") and "\n" not in fault.detail for fault in faults)
    if faults:
        return
    taken = decode_sample(raw, ("image", "boxes"), index=index)["boxes"]
    assert len(truth_of("a", taken, (16, 16), len(index.classes)).boxes) == len(boxes)
    for x, y, width, height in (box["bbox"] for box in taken):
        assert width > 0 and height > 0 and min(x, y) > -0.1 and max(x + width, y + height) < 16.1
