"""Batches by plan: sizes and numbers change with the very batch of a stage's first step, on any number of workers."""

import itertools

import numpy as np
import pytest
from lightning.pytorch import LightningModule, Trainer

from agglom.data import ShardDataModule, write_index, write_shard
from agglom.plan import Partition, Plan, Stage, slot


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")

    def samples(start, stop):
        for number in range(start, stop):
            yield {"key": f"{number:09d}", "image": np.full((24, 24, 3), number, np.uint8)}

    train = [write_shard(folder / f"train-{n:06d}.tar", samples(20 * n, 20 * n + 20)) for n in range(4)]
    write_index(folder, {"train": train})
    return folder


STAGES = [
    Stage(steps=3, resolutions=[8, 16], batch_size=4),
    Stage(steps=2, partitions=[Partition(size=24, resolutions=[8], batch_size=2), Partition(size=12, batch_size=6)]),
    Stage(),
]


def module(root, **options):
    return ShardDataModule(data=str(root), batch_size=3, size=8, val_split=None, **options)


def shapes(batch):
    return tuple(batch["image"].shape), batch["part"]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("margin", [0, 2])
def test_every_batch_is_what_the_plan_says(root, workers, margin):
    data = module(root, num_workers=workers, stages=STAGES, margin=margin)
    data.setup("fit")
    plan = Plan(STAGES, size=8, batch_size=3)
    for step, batch in enumerate(itertools.islice(data.train_dataloader(), 9)):
        part = plan.part(step, 0)
        assert shapes(batch) == ((part.batch_size, 3, *(part.size + 2 * margin,) * 2), part)
    assert part.stage == 2 and part.size == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_of_two_ranks_are_all_partitions(root, workers, monkeypatch):
    """Two ranks with two micro-batches each: four slots a step, two of either partition."""
    stage = [Stage(partitions=[Partition(size=24, batch_size=2), Partition(size=12, batch_size=6)])]
    seen = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        data = module(root, num_workers=workers, stages=stage)
        monkeypatch.setattr(ShardDataModule, "micros", property(lambda self: 2))
        data.setup("fit")
        for number, batch in enumerate(itertools.islice(data.train_dataloader(), 4)):
            step, micro = divmod(number, 2)
            assert batch["part"] == data.plan.part(step, slot(micro, rank, 2))
            seen.append((step, batch["part"].partition, len(batch["key"])))
    assert sorted(seen) == sorted([(step, p, n) for step in (0, 1) for p, n in ((0, 2), (1, 6)) for _ in (0, 1)])


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        import torch

        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.global_step, *shapes(batch)))
        return self.layer(batch["image"].float().mean().view(1, 1)).sum() * 0

    def configure_optimizers(self):
        import torch

        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_in_the_middle_of_a_stage(root, tmp_path, workers):
    """Stopped in stage 1 between two steps; the sizes go on as if nothing had been, and the samples are counted."""

    def run(steps, ckpt=None):
        model, data = Recorder(), module(root, num_workers=workers, stages=STAGES)
        trainer = Trainer(
            max_steps=steps, accumulate_grad_batches=2, enable_checkpointing=False, logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=ckpt)
        return trainer, model, data

    _, whole, counted = run(7)
    trainer, first, data = run(4)
    assert data.samples_seen == 3 * 8 + 8 == sum(shape[0] for _, shape, _ in first.seen)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    _, second, data = run(7, tmp_path / "a.ckpt")
    assert first.seen + second.seen == whole.seen
    assert data.samples_seen == counted.samples_seen == 3 * 8 + 2 * 8 + 2 * 6
    assert [step for step, *_ in second.seen] == [4, 4, 5, 5, 6, 6]


def test_a_worker_that_starts_late_begins_where_the_others_did(root):
    """What was handed out meanwhile counts for the next iteration, not for this one."""
    data = module(root, num_workers=0, stages=STAGES)
    data.setup("fit")
    batches = data.train_dataloader().source
    batches.begin()
    late = iter(batches)
    for _ in range(3):
        batches.handed_out({"drawn": 0})
    assert next(late)["part"].stage == 0
    batches.begin()
    assert next(iter(batches))["part"].stage == 1
