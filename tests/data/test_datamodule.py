"""The data module: batches, the layout it refuses, and a resume in Lightning that goes on with an order of its own."""

import itertools
import logging
import pickle
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
        self.keys, self.val_keys = [], []

    def training_step(self, batch, batch_idx):
        self.keys.append(tuple(batch["key"]))
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


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_goes_on_with_another_order(root, tmp_path, workers):
    def run(steps, ckpt=None):
        model, data = Recorder(), module(root, num_workers=workers, shuffle=10)
        fit = trainer(tmp_path, steps, val_check_interval=6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit.fit(model, data, ckpt_path=ckpt)
        return fit, model, data

    fit, first, data = run(6)
    assert len(first.keys) == 6 and data.samples_seen == 24
    assert sorted(first.val_keys) == [f"{n:09d}" for n in range(100, 107)]
    fit.save_checkpoint(tmp_path / "a.ckpt")
    fit, second, data = run(12, tmp_path / "a.ckpt")
    assert fit.global_step == 12 and len(second.keys) == 6 and data.samples_seen == 48
    assert second.keys != first.keys
    _, again, _ = run(12, tmp_path / "a.ckpt")
    assert again.keys == second.keys, "a resume is as reproducible as a start"
    fit.save_checkpoint(tmp_path / "b.ckpt")
    _, third, data = run(18, tmp_path / "b.ckpt")
    assert data.samples_seen == 72 and len({tuple(m.keys) for m in (first, second, third)}) == 3


def test_errors_of_workers_stop_the_trainer_with_one_line(root):
    for path in root.glob("train-*.tar"):
        path.write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError) as err, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(root, 2).fit(Recorder(), module(root, num_workers=1))
    assert "max_bad_fraction" in str(err.value) and "\n" not in str(err.value)
