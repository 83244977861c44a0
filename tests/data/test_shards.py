"""Shards: what is written is what is read, whole or not at all; who reads what over ranks and workers; broken data.

All tars are written here. Ranks are simulated by argument or environment, workers by worker info or real processes.
"""

import io
import itertools
import json
import logging
import os
import tarfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from agglom.data import (
    Loader,
    ShardInfo,
    TrainView,
    collate,
    decode_image,
    eval_loader,
    eval_stream,
    read_index,
    train_stream,
    validate_layout,
    write_index,
    write_shard,
)
from agglom.data import ranks as ranks_module
from agglom.data.ranks import distributed
from agglom.errors import UserError


def image_of(number, size=8):
    """A picture that says which one it is."""
    return np.full((size, size, 3), number % 256, np.uint8)


def samples(start, stop):
    for number in range(start, stop):
        yield {"key": f"{number:09d}", "image": image_of(number), "cls": number % 10}


def make(root, counts, split="train", **kwargs):
    """A shard folder with one split whose shards hold `counts` samples, numbered through."""
    starts = np.cumsum([0, *counts])
    infos = [
        write_shard(root / f"{split}-{n:06d}.tar", samples(a, b)) for n, (a, b) in enumerate(itertools.pairwise(starts))
    ]
    write_index(root, {split: infos}, **kwargs)
    return root


def rewrite(path, change):
    """Replace members of a tar: change(name, data) -> data or None to leave it out."""
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            if (data := change(name, data)) is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def keys(stream, number=None):
    return [sample["key"] for sample in itertools.islice(stream, number)]


def one_line(excinfo, *parts):
    message = str(excinfo.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# ---------------------------------------------------------------------------------------------------- writing


def test_round_trip_of_every_field(tmp_path):
    rng = np.random.default_rng(0)
    image, seg = rng.integers(0, 256, (7, 5, 3), np.uint8), rng.integers(0, 2, (7, 5), np.uint8) * 255
    boxes = [{"bbox": [1.5, 2, 3, 4], "label": 2, "iscrowd": 0}]
    sample = {
        "key": "000000012",
        "image": image,
        "cls": 3,
        "txt": "ein roter Schuh, 赤い靴",
        "seg": seg,
        "boxes": boxes,
    }
    info = write_shard(tmp_path / "deep" / "val-000000.tar", [sample])
    assert info == ShardInfo("val-000000.tar", 1)
    write_index(
        tmp_path / "deep",
        {"val": [info]},
        classes=list("abcd"),
        seg_classes=["x"],
        language="de",
        licence="MIT",
        source="here",
        extra={"size": 7},
    )
    index = read_index(tmp_path / "deep")
    assert index.counts == {"val": 1} and index.fields["val"] == ("boxes", "cls", "image", "seg", "txt")
    assert index.classes == ("a", "b", "c", "d") and index.seg_classes == ("x",) and index.language == "de"
    assert (index.licence, index.source, index.extra) == ("MIT", "here", {"size": 7})

    (read,) = eval_stream(tmp_path / "deep", "val", fields=["image", "cls", "txt", "seg", "boxes"])
    assert read["image"].dtype == read["seg"].dtype == torch.uint8
    assert torch.equal(read["image"], torch.from_numpy(image).permute(2, 0, 1)) and read["image"].is_contiguous()
    assert torch.equal(read["seg"], torch.from_numpy(seg))
    assert (read["key"], read["cls"], read["txt"], read["boxes"]) == ("000000012", 3, sample["txt"], boxes)
    (only,) = eval_stream(tmp_path / "deep", "val", fields=["cls"])
    assert only == {"key": "000000012", "shard": "val-000000.tar", "cls": 3}


def test_any_number_of_labels(tmp_path):
    labels = [[2, 0], [], np.array([1]).tolist()]
    info = write_shard(tmp_path / "a.tar", [{"key": str(n), "cls": cls} for n, cls in enumerate(labels)])
    write_index(tmp_path, {"a": [info]})
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.extractfile("0.cls").read() == b"[2,0]"
    read = list(eval_stream(tmp_path, "a", fields=["cls"]))
    assert [sample["cls"] for sample in read] == labels
    assert collate(read[::2])["cls"] == [[2, 0], [1]] and collate(read[2:])["cls"] == [[1]]
    assert torch.equal(collate([{"cls": 3}, {"cls": 4}])["cls"], torch.tensor([3, 4]))


@pytest.mark.parametrize("stored", [b"[1,", b"[1.5]", b"[true]", b'["a"]', b"{}", b"cat", b"1.5"])
def test_labels_that_are_none(tmp_path, stored):
    infos = [write_shard(tmp_path / "a.tar", samples(0, 2))]
    write_index(tmp_path, {"a": infos})
    rewrite(tmp_path / "a.tar", lambda name, data: stored if name == "000000001.cls" else data)
    stream = eval_stream(tmp_path, "a", fields=["cls"], max_bad_fraction=0.5)
    assert keys(stream) == ["000000000"]  # skipped and counted as any broken field


@pytest.mark.parametrize("image_format", ["png", "webp", "jpg"])
def test_image_formats(tmp_path, image_format):
    image = np.linspace(0, 255, 16 * 16 * 3).astype(np.uint8).reshape(16, 16, 3)
    info = write_shard(tmp_path / "a.tar", [{"key": "0", "image": image}], image_format=image_format)
    write_index(tmp_path, {"a": [info]})
    (read,) = eval_stream(tmp_path, "a")
    error = (read["image"].permute(1, 2, 0).int() - torch.from_numpy(image).int()).abs()
    assert error.max() == 0 if image_format != "jpg" else error.float().mean() < 3


def test_encoded_bytes_are_stored_untouched(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(image_of(9, 16)).save(buffer, "JPEG", quality=30)
    write_shard(tmp_path / "a.tar", [{"key": "0", "image": buffer.getvalue(), "ext": "jpg"}])
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == ["0.jpg"] and tar.extractfile("0.jpg").read() == buffer.getvalue()


def test_bytes_depend_on_the_samples_alone(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tar", samples(0, 3))
    monkeypatch.setattr("time.time", lambda: 1e9)
    write_shard(tmp_path / "b.tar", samples(0, 3))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_writer_that_dies_leaves_what_was_there(tmp_path):
    def dying():
        yield from samples(0, 2)
        raise RuntimeError("power cut")

    write_shard(tmp_path / "a.tar", samples(5, 6))
    before = (tmp_path / "a.tar").read_bytes()
    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a.tar", dying())
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"] and (tmp_path / "a.tar").read_bytes() == before


@pytest.mark.parametrize(
    "sample",
    [
        {"key": "a.b", "cls": 1},
        {"key": "", "cls": 1},
        {"key": "a", "image": np.zeros((4, 4, 3), np.float32)},
        {"key": "a", "image": np.zeros((3, 4, 4), np.uint8)},
        {"key": "a", "seg": np.zeros((4, 4, 1), np.uint8)},
        {"key": "a", "image": b"...", "ext": "gif"},
        {"key": "a", "label": 1},
        {"key": "a", "cls": 1.5},
        {"key": "a", "cls": "cat"},
        {"key": "a", "cls": [0, "cat"]},
        {"key": "a", "cls": None},
    ],
)
def test_samples_that_break_the_rules(tmp_path, sample):
    with pytest.raises(ValueError):
        write_shard(tmp_path / "a.tar", [sample])
    assert not list(tmp_path.iterdir())


def test_the_same_key_twice(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        write_shard(tmp_path / "a.tar", [*samples(0, 2), *samples(1, 2)])


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.tar").mkdir()
    for path in (tmp_path / "file" / "a.tar", tmp_path / "folder.tar", "/proc/nowhere/a.tar"):
        with pytest.raises(UserError) as err:
            write_shard(path, samples(0, 1))
        one_line(err, str(path), "can't be written")
    with pytest.raises(UserError) as err:
        write_index(tmp_path / "file", {"train": []})
    one_line(err, "index.json", "can't be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match="can't be written"):
            write_shard(tmp_path / "a.tar", samples(0, 1))
    finally:
        tmp_path.chmod(0o755)


def test_a_source_that_fails_is_not_blamed_on_the_target(tmp_path):
    def source():
        yield {"key": "0", "image": open(tmp_path / "gone.jpg", "rb").read(), "ext": "jpg"}

    with pytest.raises(UserError) as err:
        write_shard(tmp_path / "a.tar", source())
    one_line(err, "gone.jpg", "can't be read")


def test_unknown_image_format(tmp_path):
    with pytest.raises(UserError, match="valid: png, jpg, webp"):
        write_shard(tmp_path / "a.tar", samples(0, 1), image_format="gif")


# ---------------------------------------------------------------------------------------------------- the index


def break_json(root):
    (root / "index.json").write_text('{"format": ')


def other_json(root):
    (root / "index.json").write_text("[1, 2]")


def newer(root):
    body = json.loads((root / "index.json").read_text())
    (root / "index.json").write_text(json.dumps({**body, "version": 99}))


def no_counts(root):
    body = json.loads((root / "index.json").read_text())
    del body["splits"]["train"]["shards"][0]["count"]
    (root / "index.json").write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "index.json").unlink(), ["index.json"]),
        (break_json, ["JSON"]),
        (other_json, ["not a shard index"]),
        (newer, ["version 99", "reads version 1"]),
        (no_counts, ["broken", "count"]),
        (lambda root: (root / "train-000001.tar").unlink(), ["1 of 3 shards are missing", "train-000001.tar"]),
        (lambda root: (root / "train-000002.tar").write_bytes(b""), ["1 of 3 shards are empty", "train-000002.tar"]),
    ],
)
def test_broken_folders(tmp_path, spoil, words):
    make(tmp_path, [2, 2, 2])
    spoil(tmp_path)
    with pytest.raises(UserError) as err:
        read_index(tmp_path)
    one_line(err, str(tmp_path), *words)


def test_missing_folder_and_unknown_split(tmp_path):
    with pytest.raises(UserError) as err:
        read_index(tmp_path / "nowhere")
    one_line(err, "nowhere", "no such shard folder")
    make(tmp_path, [2])
    with pytest.raises(UserError) as err:
        eval_stream(tmp_path, "trian")
    one_line(err, "no split 'trian'", "did you mean train?")


def test_index_of_a_missing_or_unreadable_shard(tmp_path):
    with pytest.raises(UserError, match="not a readable shard"):
        write_index(tmp_path, {"train": [ShardInfo("train-000000.tar", 3)]})
    assert not (tmp_path / "index.json").exists()


def test_fields_are_checked_before_anything_is_read(tmp_path):
    make(tmp_path, [2])
    with pytest.raises(UserError) as err:
        train_stream(tmp_path, "train", fields=["image", "seg"])
    one_line(err, "'train'", "no field 'seg'", "cls, image")
    with pytest.raises(UserError, match="not a sample field.*did you mean image"):
        eval_stream(tmp_path, "train", fields=["imag"])


@pytest.mark.parametrize("root", ["pipe:cat {dir}/{{}}", "file://{dir}", "memory://shards"])
def test_other_addresses(tmp_path, other_addresses, root):
    make(tmp_path, [3, 2])
    if root.startswith("memory"):
        fsspec = pytest.importorskip("fsspec")
        fsspec.filesystem("memory").put(str(tmp_path) + "/", "/shards", recursive=True)
    root = root.format(dir=tmp_path)
    assert read_index(root).counts == {"train": 5}
    assert len(set(keys(eval_stream(root, "train")))) == 5


def test_a_pipe_that_fails(tmp_path, other_addresses):
    with pytest.raises(UserError) as err:
        read_index(f"pipe:cat {tmp_path}/{{}} 2>/dev/null")
    one_line(err, "index.json")


@pytest.mark.parametrize(
    ("counts", "workers", "ranks", "words"),
    [
        ([1] * 12, 3, 4, None),
        ([1] * 12, 0, 12, None),
        ([1] * 12, 4, 4, "12 shards < 4 workers x 4 ranks = 16; set num_workers <= 3 or write more shards"),
        ([1, 1, 0], 3, 1, "2 shards < 3 workers x 1 ranks = 3; set num_workers <= 2 or write more shards"),
        ([1, 1], 0, 4, "2 shards < 1 workers x 4 ranks = 4; use <= 2 ranks or write more shards"),
        ([0], 1, 1, "no samples"),
    ],
)
def test_layout(tmp_path, counts, workers, ranks, words):
    problems = validate_layout(read_index(make(tmp_path, counts)), "train", num_workers=workers, world_size=ranks)
    assert len(problems) == (words is not None)
    if words:
        assert words in problems[0] and problems[0].startswith("data.")


def test_layout_of_an_unknown_split(tmp_path):
    (problem,) = validate_layout(read_index(make(tmp_path, [1])), "val", num_workers=1, world_size=1)
    assert problem == "data.train_split: 'val'; valid: train"


# ---------------------------------------------------------------------------------------------------- who reads what


def on_worker(monkeypatch, worker, workers):
    info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
    monkeypatch.setattr(ranks_module, "get_worker_info", lambda: info)


@pytest.mark.parametrize("counts", [[7], [5, 1, 9], [3, 0, 4, 1], [1] * 6])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 3), (2, 2), (4, 0), (3, 5)])
def test_evaluation_sees_each_sample_once(tmp_path, monkeypatch, counts, ranks, workers):
    make(tmp_path, counts)
    seen, sizes = [], []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        for worker in range(max(workers, 1)):
            on_worker(monkeypatch, worker, workers)
            got = keys(eval_stream(tmp_path, "train", fields=["cls"]))
            seen += got
            sizes.append(len(got))
    assert seen == [f"{n:09d}" for n in range(sum(counts))]  # also: in order
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("limit", [1, 4, 7, 100])
def test_evaluation_of_the_first_samples_only(tmp_path, limit):
    make(tmp_path, [3, 4, 4])
    got = [
        key for rank in range(2) for key in keys(eval_stream(tmp_path, "train", limit=limit, rank=rank, world_size=2))
    ]
    assert got == [f"{n:09d}" for n in range(min(limit, 11))]


def test_evaluation_with_real_workers(tmp_path):
    make(tmp_path, [5, 6, 2])
    loader = eval_loader(tmp_path, "train", fields=["image", "cls"], batch_size=4, num_workers=2)
    for _ in range(2):  # and again, with the workers of the first time
        batches = list(loader)
        assert sorted(key for batch in batches for key in batch["key"]) == [f"{n:09d}" for n in range(13)]
        for batch in batches:
            numbers = torch.tensor([int(key) for key in batch["key"]])
            assert torch.equal(batch["cls"], numbers % 10) and batch["cls"].dtype == torch.int64
            assert torch.equal(batch["image"][:, 0, 0, 0].long(), numbers) and batch["image"].dtype == torch.uint8


def test_training_deals_each_shard_to_one_reader_a_pass(tmp_path, monkeypatch):
    make(tmp_path, [4] * 12)
    passes = []
    for rank, worker in itertools.product(range(2), range(3)):
        on_worker(monkeypatch, worker, 3)
        stream = train_stream(tmp_path, "train", fields=["cls"], shuffle=0, rank=rank, world_size=2)
        passes.append(keys(stream, 16))  # two shards of four a pass, two passes
    for part in (slice(0, 8), slice(8, 16)):
        assert sorted(key for got in passes for key in got[part]) == [f"{n:09d}" for n in range(48)]
    assert any(set(got[:8]) != set(got[8:]) for got in passes)  # the second pass is dealt anew


def test_training_frequencies_are_even_over_shards_of_any_size(tmp_path, monkeypatch):
    make(tmp_path, [2, 9, 5, 1, 8])
    counts = Counter()
    for worker in range(2):
        on_worker(monkeypatch, worker, 2)
        counts.update(keys(train_stream(tmp_path, "train", fields=["cls"], shuffle=10), 2500))
    # 5,000 draws of 25 samples: 200 each. A reader makes about 200 passes and gets a given shard in half of them.
    assert len(counts) == 25 and all(abs(count - 200) < 50 for count in counts.values()), counts


def test_training_is_shuffled_within_a_shard(tmp_path):
    make(tmp_path, [400])
    order = np.array([int(key) for key in keys(train_stream(tmp_path, "train", fields=["cls"]), 400)])
    # a random order has rank correlation ~ N(0, 1/20)
    assert abs(np.corrcoef(order, np.arange(400))[0, 1]) < 0.25


def first(tmp_path, monkeypatch, number=40, worker=0, **kwargs):
    on_worker(monkeypatch, worker, 2)
    return keys(train_stream(tmp_path, "train", fields=["cls"], **kwargs), number)


def test_training_order_follows_from_seed_and_place(tmp_path, monkeypatch):
    make(tmp_path, [10] * 8)
    usual = first(tmp_path, monkeypatch, seed=3)
    assert first(tmp_path, monkeypatch, seed=3) == usual
    others = [
        first(tmp_path, monkeypatch, seed=4),
        first(tmp_path, monkeypatch, seed=3, start=1),
        first(tmp_path, monkeypatch, seed=3, start=2),
        first(tmp_path, monkeypatch, seed=3, worker=1),
        first(tmp_path, monkeypatch, seed=3, rank=1, world_size=2),
    ]
    assert len({tuple(order) for order in [usual, *others]}) == 6


def test_views_follow_from_the_seed_and_differ_between_readers(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    infos = [write_shard(tmp_path / f"{n}.tar", [{"key": str(n), "image": noise}]) for n in range(4)]
    write_index(tmp_path, {"train": infos})

    def views(worker, seed):
        on_worker(monkeypatch, worker, 2)
        torch.manual_seed(worker + seed)  # must not matter
        stream = train_stream(tmp_path, "train", transform=TrainView(size=16), seed=seed)
        return torch.stack([sample["image"] for sample in itertools.islice(stream, 6)])

    assert torch.equal(views(0, 0), views(0, 0))
    assert not torch.equal(views(0, 0), views(1, 0)) and not torch.equal(views(0, 0), views(0, 1))
    assert len(views(0, 0).unique(dim=0)) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_training_loader_gives_full_batches_and_a_new_order_each_time(tmp_path, workers):
    make(tmp_path, [6] * 4)
    loader = Loader(train_stream(tmp_path, "train", fields=["cls"]), batch_size=5, num_workers=workers)
    rounds = [[batch["key"] for batch in itertools.islice(loader, 6)] for _ in range(3)]
    assert all(len(batch) == 5 for got in rounds for batch in got)
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]
    again = Loader(train_stream(tmp_path, "train", fields=["cls"]), batch_size=5, num_workers=workers)
    assert [batch["key"] for batch in itertools.islice(again, 6)] == rounds[0]


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"start": -1}, {"shuffle": -1}])
def test_negative_numbers_are_refused(tmp_path, wrong):
    make(tmp_path, [1])
    with pytest.raises(UserError, match=f"{next(iter(wrong))} -1.*valid"):
        train_stream(tmp_path, "train", **wrong)
    with pytest.raises(UserError, match="limit: 0"):
        eval_stream(tmp_path, "train", limit=0)


def test_fewer_shards_than_readers_is_refused(tmp_path, monkeypatch):
    make(tmp_path, [4, 4])
    on_worker(monkeypatch, 0, 3)
    with pytest.raises(UserError) as err:
        next(iter(train_stream(tmp_path, "train")))
    one_line(err, "2 shards for 3 readers")


def test_where_this_process_stands(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert distributed() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")  # what was allotted, not what was started
    assert distributed() == (0, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert distributed() == (0, 8)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed() == (1, 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert distributed() == (3, 4)


# ---------------------------------------------------------------------------------------------------- broken data


def spoil_image(number):
    return lambda name, data: data[: len(data) // 2] if name == f"{number:09d}.png" else data


def test_a_corrupt_image_is_skipped_and_counted(tmp_path, caplog):
    make(tmp_path, [100, 100])
    rewrite(tmp_path / "train-000001.tar", spoil_image(123))
    stream = eval_stream(tmp_path, "train")
    with caplog.at_level(logging.WARNING, "agglom.data"):
        got = keys(stream)
    assert got == [f"{n:09d}" for n in range(200) if n != 123]
    assert (stream.seen, stream.bad) == (200, 1)
    assert len(caplog.messages) == 1 and "000000123" in caplog.messages[0] and "train-000001.tar" in caplog.messages[0]

    train = train_stream(tmp_path, "train")
    assert "000000123" not in keys(train, 1000) and train.bad >= 4


def test_too_many_corrupt_images_stop_the_run(tmp_path):
    make(tmp_path, [100])
    rewrite(tmp_path / "train-000000.tar", lambda name, data: b"rubbish" if name < "000000002" else data)
    for stream in (eval_stream(tmp_path, "train"), train_stream(tmp_path, "train")):
        with pytest.raises(UserError) as err:
            keys(stream, 200)
        one_line(err, "2 of ", "max_bad_fraction 0.01", "00000000")
    assert len(keys(eval_stream(tmp_path, "train", max_bad_fraction=0.02))) == 98


def test_counts_and_errors_come_back_from_workers(tmp_path):
    make(tmp_path, [100, 100])
    rewrite(tmp_path / "train-000000.tar", spoil_image(50))
    loader = eval_loader(tmp_path, "train", fields=["image"], batch_size=10, num_workers=2)
    assert sum(len(batch["key"]) for batch in loader) == 199
    assert (loader.source.seen, loader.source.bad) == (200, 1)
    rewrite(tmp_path / "train-000000.tar", lambda name, data: b"rubbish" if name.endswith("png") else data)
    with pytest.raises(UserError) as err:
        list(loader)
    one_line(err, "max_bad_fraction", "train-000000.tar")


def test_a_missing_field_names_all_there_is_to_know(tmp_path):
    make(tmp_path, [4])
    rewrite(tmp_path / "train-000000.tar", lambda name, data: None if name == "000000002.cls" else data)
    with pytest.raises(UserError) as err:
        keys(eval_stream(tmp_path, "train", fields=["cls"]))
    one_line(err, "train-000000.tar", "000000002", "no field 'cls'", "it has: image")


@pytest.mark.parametrize("keep", [0.9951, 0.5, 0.03])
def test_a_truncated_shard_loses_its_tail_and_says_so(tmp_path, caplog, keep):
    make(tmp_path, [50, 50])
    path = tmp_path / "train-000000.tar"
    size = 50 * 4 * 512  # a header and a block for image and class each; the rest is padding
    path.write_bytes(path.read_bytes()[: int(size * keep)])
    stream = eval_stream(tmp_path, "train", max_bad_fraction=0.5)
    got = keys(stream)
    assert got == [f"{n:09d}" for n in range(100) if n >= 50 or n < len(got) - 50]
    assert stream.bad == 100 - len(got) > 0 and stream.seen == 100
    assert any("train-000000.tar" in message for message in caplog.messages)
    with pytest.raises(UserError, match="max_bad_fraction"):
        keys(eval_stream(tmp_path, "train", max_bad_fraction=0.005))


def test_truncation_between_two_files_is_noticed_too(tmp_path):
    make(tmp_path, [10])
    path = tmp_path / "train-000000.tar"
    path.write_bytes(path.read_bytes()[: 5 * 4 * 512 + 1024])  # five samples and the class of the sixth
    stream = eval_stream(tmp_path, "train", max_bad_fraction=1)
    assert len(keys(stream)) == 5 and stream.bad == 5


def test_a_shard_that_is_no_tar_or_gone(tmp_path):
    make(tmp_path, [5, 5])
    index = read_index(tmp_path)
    (tmp_path / "train-000000.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "train-000001.tar").unlink()
    stream = eval_stream(index, "train", max_bad_fraction=1)
    assert keys(stream) == [] and stream.bad == 10
    with pytest.raises(UserError, match="nothing could be read"):
        next(iter(train_stream(index, "train", max_bad_fraction=1)))
    with pytest.raises(UserError, match="FileNotFoundError: No such file"):
        (tmp_path / "train-000000.tar").unlink()
        next(iter(train_stream(index, "train")))


def test_an_empty_shard_is_no_trouble(tmp_path):
    make(tmp_path, [3, 0, 2])
    assert len(keys(eval_stream(tmp_path, "train"))) == 5
    assert len(set(keys(train_stream(tmp_path, "train"), 50))) == 5


def test_a_split_without_samples(tmp_path):
    make(tmp_path, [0])
    with pytest.raises(UserError, match="no samples|no field"):
        eval_stream(tmp_path, "train")


def test_a_shard_that_holds_more_than_the_index_says(tmp_path):
    make(tmp_path, [5])
    body = json.loads((tmp_path / "index.json").read_text())
    body["splits"]["train"]["shards"][0]["count"] = 4
    (tmp_path / "index.json").write_text(json.dumps(body))
    for stream in (eval_stream(tmp_path, "train"), train_stream(tmp_path, "train", shuffle=0)):
        with pytest.raises(UserError) as err:
            keys(stream, 10)
        one_line(err, "more than the 4 samples")


# ---------------------------------------------------------------------------------------------------- pictures


def encoded(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_modes_of_pictures():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    assert torch.equal(decode_image(encoded(Image.fromarray(grey))), torch.from_numpy(grey).expand(3, 3, 4))
    deep = grey.astype(np.uint16) * 256 + 7
    assert torch.equal(decode_image(encoded(Image.fromarray(deep))), torch.from_numpy(grey).expand(3, 3, 4))
    palette = Image.fromarray(np.dstack([grey] * 3)).quantize(12)
    assert torch.equal(decode_image(encoded(palette)), torch.from_numpy(grey).expand(3, 3, 4))
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    pixels = decode_image(encoded(clear))
    assert pixels[:, 0, 0].tolist() == [10, 20, 30] and pixels[:, 1, 1].tolist() == [255, 255, 255]
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert (decode_image(encoded(red, "JPEG")).float().mean((1, 2)) - torch.tensor([254.0, 0, 0])).abs().max() < 4


def test_pictures_are_turned_upright():
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to show
    upright = decode_image(encoded(image, exif=exif))
    assert torch.equal(upright[0], torch.from_numpy(np.array(image)).rot90(-1, (0, 1)))


def test_masks_keep_their_numbers(tmp_path):
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    palette = Image.fromarray(labels, "P")
    palette.putpalette(bytes(range(256)) * 3)
    info = write_shard(tmp_path / "a.tar", [{"key": "0", "seg": labels}])
    rewrite(tmp_path / "a.tar", lambda name, data: encoded(palette))
    write_index(tmp_path, {"a": [info]})
    (read,) = eval_stream(tmp_path, "a", fields=["seg"])
    assert torch.equal(read["seg"], torch.from_numpy(labels))
