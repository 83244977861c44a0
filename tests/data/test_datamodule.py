"""The data module: batches, the layout it refuses, and a resume in Lightning that goes on with the next batches."""

import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

from agglom.data import ShardDataModule, ViewOptions, write_index, write_shard
from agglom.errors import UserError


@pytest.fixture
def root(tmp_path):
    """Four training shards of 10 pictures and one of 7 for validation, 12 x 12, each of one grey."""

    def samples(start, stop):
        for number in range(start, stop):
            image = np.full((12, 12, 3), number, np.uint8)
            yield {"key": f"{number:09d}", "image": image, "cls": number % 3}

    train = [write_shard(tmp_path / f"train-{n:06d}.tar", samples(10 * n, 10 * n + 10)) for n in range(4)]
    val = [write_shard(tmp_path / "val-000000.tar", samples(100, 107))]
    write_index(tmp_path, {"train": train, "val": val})
    return tmp_path


def module(root, **options):
    options = {"batch_size": 4, "size": 8, "num_workers": 0, **options}
    return ShardDataModule(data=str(root), **options)


def check_batch(batch, size):
    numbers = torch.tensor([int(key) for key in batch["key"]])
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (size, 3, 8, 8)
    assert torch.equal(batch["image"].flatten(1).float().mean(1).round().long(), numbers)
    assert torch.equal(batch["cls"], numbers % 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(root, workers):
    data = module(root, fields=("image", "cls"), num_workers=workers)
    data.setup("fit")
    for batch in itertools.islice(data.train_dataloader(), 15):
        check_batch(batch, 4)
    batches = list(data.val_dataloader())
    assert sorted(key for batch in batches for key in batch["key"]) == [f"{n:09d}" for n in range(100, 107)]
    for batch in batches:
        check_batch(batch, len(batch["key"]))


def test_validation_may_be_shorter_or_absent(root):
    data = module(root, val_samples=5)
    data.setup("fit")
    assert [len(batch["key"]) for batch in data.val_dataloader()] == [4, 1]
    data = module(root, val_split=None)
    data.setup("fit")
    assert data.val_dataloader() == []


def test_only_the_fields_asked_for(root):
    data = module(root)
    data.setup("fit")
    assert set(next(iter(data.train_dataloader()))) == {"key", "shard", "image", "part"}
    assert set(next(iter(data.val_dataloader()))) == {"key", "shard", "image"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_workers": 5}, "data.num_workers: 4 shards < 5 workers x 1 ranks = 5; set num_workers <= 4"),
        ({"train_split": "trian"}, "data.train_split: 'trian'; valid: train, val (did you mean train?)"),
        ({"val_split": "test"}, "no split 'test'; valid: train, val"),
        ({"fields": ("image", "seg")}, "no field 'seg'; they have: cls, image"),
        ({"batch_size": 0}, "data.batch_size: 0; valid: 1 or more"),
        ({"num_workers": -1}, "data.num_workers: -1"),
        ({"view": ViewOptions(flip=2)}, "view.flip: 2"),
    ],
)
def test_what_is_refused(root, options, words):
    with pytest.raises(UserError) as err:
        module(root, **options).setup("fit")
    assert words in str(err.value) and "\n" not in str(err.value)


def test_missing_data(tmp_path):
    with pytest.raises(UserError, match="no such shard folder"):
        module(tmp_path / "nowhere").setup("fit")


def test_bad_samples_are_counted(root, caplog):
    data = module(root, max_bad_fraction=0.5)
    path = root / "train-000002.tar"
    path.write_bytes(path.read_bytes()[: 4 * 2048])  # four samples of ten
    data.setup("fit")
    with caplog.at_level(logging.WARNING, "agglom.data"):
        list(itertools.islice(data.train_dataloader(), 20))
    assert data.bad_samples >= 6 and data.bad_samples % 6 == 0
    assert "train-000002.tar: 6 samples can't be read" in caplog.text


def test_the_stream_can_be_sent_to_spawned_workers(root):
    data = module(root)
    data.setup("fit")
    stream = data.train_dataloader().source.stream
    copy = pickle.loads(ForkingPickler.dumps(stream))
    first = [sample["key"] for sample in itertools.islice(stream, 12)]
    copy._round.zero_()  # shared memory: the first stream's beginning counted for both
    assert [sample["key"] for sample in itertools.islice(copy, 12)] == first


def test_configuration(root):
    parser = ArgumentParser()
    parser.add_class_arguments(ShardDataModule, "data")
    args = ["--data.data", str(root), "--data.batch_size=2", "--data.size=8", "--data.view.scale=[0.5,0.9]"]
    config = parser.parse_args([*args, "--data.fields=[image,cls]", "--data.val_split=null"])
    data = parser.instantiate_classes(config).data
    assert data.train_view.scale == (0.5, 0.9) and data.train_view.flip == 0.5 and data.train_view.size == 8
    assert data.fields == ("image", "cls") and data.val_split is None


class Recorder(LightningModule):
    """Learns nothing and remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.keys, self.val_keys, self.images = [], [], []

    def training_step(self, batch, batch_idx):
        self.keys.append(tuple(batch["key"]))
        self.images.append(batch["image"])
        return self.layer(batch["image"].float().mean().view(1, 1)).sum() * 0

    def validation_step(self, batch, batch_idx):
        self.val_keys += batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(root, steps, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(
        max_steps=steps, enable_checkpointing=False, num_sanity_val_steps=0, default_root_dir=root, **quiet, **options
    )


def run(root, folder, steps, ckpt=None, micros=1, **options):
    """Train so many steps and leave a checkpoint `STEPS.ckpt`; returns what the model and the data module hold."""
    model, data = Recorder(), module(root, **{"shuffle": 10, "max_bad_fraction": 0.9, **options})
    fit = trainer(folder, steps, val_check_interval=6, accumulate_grad_batches=micros)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(model, data, ckpt_path=ckpt)
    fit.save_checkpoint(folder / f"{steps}.ckpt")
    return model, data


def spoil(root):
    """A truncated shard, a missing one, and two pictures that are none."""
    path = root / "train-000002.tar"
    path.write_bytes(path.read_bytes()[: 4 * 2048])
    path = root / "train-000001.tar"
    path.write_bytes(path.read_bytes().replace(b"PNG", b"GNP", 2))


@pytest.mark.parametrize(("workers", "broken"), [(0, True), (1, False), (3, True)])
def test_a_resumed_run_goes_on_with_the_same_batches(root, tmp_path, workers, broken):
    """Pixels too, as views are random; stopped twice, where it isn't the first worker's turn, and in a later pass."""
    if broken:
        spoil(root)
    options = {"num_workers": workers, "val_split": None}
    whole, counted = run(root, tmp_path, 44, **options)
    first, _ = run(root, tmp_path, 4, **options)
    second, _ = run(root, tmp_path, 24, tmp_path / "4.ckpt", **options)
    third, data = run(root, tmp_path, 44, tmp_path / "24.ckpt", **options)
    assert first.keys + second.keys + third.keys == whole.keys and len(third.keys) == 20
    assert all(
        torch.equal(a, b) for a, b in zip(first.images + second.images + third.images, whole.images, strict=True)
    )
    assert data.samples_seen == counted.samples_seen == 176


@pytest.mark.parametrize("change", [{"num_workers": 2}, {"seed": 1}, {"shuffle": 5}])
def test_other_readers_go_on_with_an_order_not_seen_before(root, tmp_path, change, caplog):
    """Neither the first order again nor its continuation, and that is said; another resume gives the same."""
    whole, _ = run(root, tmp_path, 12, num_workers=1)
    run(root, tmp_path, 6, num_workers=1)
    options = {"num_workers": 1, **change}
    with caplog.at_level(logging.WARNING, "agglom.data"):
        second, data = run(root, tmp_path, 12, tmp_path / "6.ckpt", **options)
    assert "going on with a new order" in caplog.text and data.samples_seen == 48
    seen, now = (sum(keys, ()) for keys in (whole.keys, second.keys))  # 24 of 40 samples meet by chance once in 2 times
    for begin in range(len(seen) - len(now) + 1):
        assert sum(a == b for a, b in zip(seen[begin:], now, strict=False)) < 6
    again, _ = run(root, tmp_path, 12, tmp_path / "6.ckpt", **options)
    assert again.keys == second.keys, "a resume is as reproducible as a start"


def test_other_batches_of_the_same_order(root, tmp_path):
    """The size of a batch doesn't matter to the order: samples go on where they were."""
    whole, _ = run(root, tmp_path, 12)
    run(root, tmp_path, 6)
    second, _ = run(root, tmp_path, 9, tmp_path / "6.ckpt", batch_size=8)
    assert sum(second.keys, ()) == sum(whole.keys[6:], ())


def test_finding_the_place_reads_only_what_the_buffer_held(root, monkeypatch):
    """After ten passes of 40 samples, the buffer's 10 lie in few shards; nothing is decoded on the way."""
    from agglom.data import streams

    def stream():
        return streams.train_stream(root, "train", shuffle=10)

    whole = [sample["key"] for sample in itertools.islice(stream(), 410)]
    opened, decoded = [], []
    monkeypatch.setattr(streams, "open_read", lambda url, f=streams.open_read: opened.append(url) or f(url))
    monkeypatch.setattr(
        streams, "decode_sample", lambda *a, f=streams.decode_sample, **k: decoded.append(1) or f(*a, **k)
    )
    resumed = stream()
    resumed.resume(1, [400], 0)
    assert [sample["key"] for sample in itertools.islice(resumed, 10)] == whole[400:]
    assert len(opened) <= 8 and len(decoded) == 10


def test_workers_leave_signals_to_the_trainer(root):
    """Those that reach all processes of a job, Ctrl-C's and a scheduler's: batches go on, and the next pass too."""
    data = module(root, num_workers=2, fields=("image", "cls"))
    data.setup("fit")
    loader = data.train_dataloader()
    batches = iter(loader)
    check_batch(next(batches), 4)
    workers = loader._iterator._workers
    for worker, number in itertools.product(workers, (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)):
        os.kill(worker.pid, number)
    for batch in itertools.islice(batches, 20):
        check_batch(batch, 4)
    assert all(worker.is_alive() for worker in workers)


def test_signals_wait_for_workers_that_have_just_been_started(root):
    """One that comes between a worker's start and its first own line is no end to it."""
    data = module(root, num_workers=2, fields=("image", "cls"))
    data.setup("fit")
    loader = data.train_dataloader()
    own, sent, others = loader.worker_init_fn, [], set(multiprocessing.active_children())

    def slow(worker):
        time.sleep(1)
        own(worker)

    def send():
        while len(workers := set(multiprocessing.active_children()) - others) < 2:
            time.sleep(0.01)
        for worker, number in itertools.product(workers, (signal.SIGINT, signal.SIGUSR1)):
            os.kill(worker.pid, number)
            sent.append(number)

    loader.worker_init_fn = slow
    thread = threading.Thread(target=send)
    thread.start()
    for batch in itertools.islice(loader, 4):
        check_batch(batch, 4)
        assert len(sent) == 4
    thread.join()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_errors_of_workers_stop_the_trainer_with_one_line(root):
    for path in root.glob("train-*.tar"):
        path.write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError) as err, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(root, 2).fit(Recorder(), module(root, num_workers=1))
    assert "max_bad_fraction" in str(err.value) and "\n" not in str(err.value)


@pytest.mark.parametrize(
    ("cores", "shards", "ranks", "local", "expected"),
    [(2, 9, 1, 1, 1), (1, 9, 1, 1, 1), (16, 99, 1, 1, 8), (32, 99, 16, 8, 3), (16, 6, 2, 2, 3), (16, 1, 1, 1, 1)],
)
def test_readers_for_the_machine(cores, shards, ranks, local, expected, monkeypatch):
    from agglom.data import processes

    monkeypatch.setattr(processes, "cores", lambda: cores)
    assert processes.readers(shards, ranks=ranks, local_ranks=local) == expected


def test_auto_takes_no_more_workers_than_there_are_shards(scenes, monkeypatch):
    """Three shards, many cores."""
    from agglom.data import processes

    monkeypatch.setattr(processes, "cores", lambda: 64)
    data = ShardDataModule(data=str(scenes), batch_size=4, size=32, num_workers="auto")
    data.setup("fit")
    assert data.num_workers == 3 and data.train_dataloader().num_workers == 3
