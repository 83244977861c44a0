"""Progress: throughput and data wait against a clock that the test moves, plain lines, time left."""

import types

import pytest

from agglom.callbacks import TrainingProgress
from agglom.callbacks import progress as module


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


def run(monkeypatch, *, steps, wait, compute, images=8, ranks=1, every=2, every_s=1e9):
    clock, logged = Clock(), []
    monkeypatch.setattr(module.time, "perf_counter", clock.perf_counter)
    trainer = types.SimpleNamespace(
        global_step=0, is_global_zero=True, max_steps=steps, world_size=ranks, log_every_n_steps=every,
        logged_metrics={"train/loss": 1.5, "train/clip/loss": 0.25, "train/clip/summary_loss": 9.0},
    )  # fmt: skip
    pl_module = types.SimpleNamespace(
        log_dict=lambda metrics, **_: logged.append(metrics), device=types.SimpleNamespace(type="cpu")
    )
    bar = TrainingProgress(every_s)
    bar.on_train_start(trainer, pl_module)
    for index in range(steps):
        clock.now += wait
        bar.on_train_batch_start(trainer, pl_module, None, index)
        clock.now += compute
        trainer.global_step += 1
        bar.on_train_batch_end(trainer, pl_module, None, {"image": [0] * images}, index)
    bar.on_train_end(trainer, pl_module)
    return logged


@pytest.mark.parametrize("ranks", [1, 4])
def test_throughput_and_wait(monkeypatch, ranks):
    logged = run(monkeypatch, steps=4, wait=0.1, compute=0.3, ranks=ranks)
    assert len(logged) == 2
    for metrics in logged:
        assert metrics["train/images_per_s"] == pytest.approx(8 * ranks / 0.4)
        assert metrics["train/data_wait"] == pytest.approx(0.25)


def test_validation_is_neither_work_nor_wait(monkeypatch):
    clock, logged = Clock(), []
    monkeypatch.setattr(module.time, "perf_counter", clock.perf_counter)
    trainer = types.SimpleNamespace(
        global_step=0, is_global_zero=True, max_steps=9, world_size=1, log_every_n_steps=1, logged_metrics={}
    )
    pl_module = types.SimpleNamespace(log_dict=lambda metrics, **_: logged.append(metrics))
    bar = TrainingProgress(1e9)
    bar.on_train_start(trainer, pl_module)
    clock.now += 50
    bar.on_validation_end(trainer, pl_module)
    bar.on_train_batch_start(trainer, pl_module)
    clock.now += 2
    trainer.global_step = 1
    bar.on_train_batch_end(trainer, pl_module, None, {"image": [0] * 8}, 0)
    assert logged == [{"train/images_per_s": 4.0, "train/data_wait": 0.0}]


def test_plain_lines(monkeypatch, capsys):
    run(monkeypatch, steps=4, wait=0.0, compute=1.0, every_s=2.0)
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert last.startswith("peak memory: ") and last.endswith(" GiB")
    assert lines[0].endswith("8 img/s, wait 0.0 %, loss 1.500, clip 0.250, 0:02 left")
    assert lines[1].endswith("0:00 left")


def test_the_last_step_always_speaks(monkeypatch, capsys):
    run(monkeypatch, steps=3, wait=0.0, compute=1.0)
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[:-1]] == ["step 3/3"]


def test_clock():
    assert [module._clock(s) for s in (0, 61, 3600 + 62)] == ["0:00", "1:01", "1:01:02"]
