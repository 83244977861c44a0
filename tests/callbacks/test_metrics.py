"""metrics.csv over several starts: continued, cut at the step of the checkpoint, columns kept."""

import csv

from agglom.callbacks import RunCSVLogger, drop_rows_after


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def log(root, steps, **values):
    logger = RunCSVLogger(str(root), flush_logs_every_n_steps=1)
    for step in steps:
        logger.log_metrics({"loss": float(step), **values}, step=step)
    logger.finalize("success")


def test_is_the_run_directorys_own_file(tmp_path):
    log(tmp_path, range(3))
    assert [path.name for path in tmp_path.rglob("*.csv")] == ["metrics.csv"]
    assert [row["loss"] for row in rows(tmp_path / "metrics.csv")] == ["0.0", "1.0", "2.0"]


def test_a_second_start_continues(tmp_path):
    log(tmp_path, range(3))
    log(tmp_path, range(3, 5))
    assert [int(row["step"]) for row in rows(tmp_path / "metrics.csv")] == [0, 1, 2, 3, 4]


def test_a_new_column_keeps_the_old_rows(tmp_path):
    log(tmp_path, range(2))
    log(tmp_path, range(2, 4), val=0.5)
    got = rows(tmp_path / "metrics.csv")
    assert [row["val"] for row in got] == ["", "", "0.5", "0.5"]
    assert [row["loss"] for row in got] == ["0.0", "1.0", "2.0", "3.0"]


def test_rows_from_the_checkpoint_on_are_dropped(tmp_path):
    log(tmp_path, range(6))
    drop_rows_after(tmp_path / "metrics.csv", 4)  # four steps are done: 0 to 3
    log(tmp_path, range(4, 7))
    assert [int(row["step"]) for row in rows(tmp_path / "metrics.csv")] == list(range(7))
    assert not list(tmp_path.glob("*.tmp"))


def test_nothing_to_drop(tmp_path):
    drop_rows_after(tmp_path / "metrics.csv", 4)
    assert not list(tmp_path.iterdir())
