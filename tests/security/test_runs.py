"""What a run says of the broken samples that it met: in its metrics, and on its lines."""

import csv
import json
import shutil
import tarfile
from pathlib import Path

from small_run import config, write

from agglom.cli import main


def test_bad_samples_are_in_the_metrics(here, scenes, capsys):
    """One shard in three ends early; the run goes on and its metrics count what was lost, up to the last row."""
    data = Path(shutil.copytree(scenes, here / "data"))
    shard = data / json.loads((data / "index.json").read_text())["splits"]["train"]["shards"][1]["file"]
    with tarfile.open(shard) as tar:
        keys = list(dict.fromkeys(m.name.partition(".")[0] for m in tar))
        end = next(m.offset for m in tar if m.name.startswith(keys[24]))
    shard.write_bytes(shard.read_bytes()[:end])
    whole = config(data, here / "run")
    whole["data"].update(max_bad_fraction=0.5, shuffle=1)
    whole["trainer"].update(max_steps=24, log_every_n_steps=4)  # a pass of 96 samples
    main(["fit", "--config", str(write(here / "c.yaml", whole))])
    with (here / "run" / "metrics.csv").open(newline="") as file:
        counts = [float(row["train/bad_samples"]) for row in csv.DictReader(file) if row.get("train/bad_samples")]
    assert counts[0] <= 8 and counts[-1] == 8 and counts == sorted(counts)
    assert "8 bad samples skipped" in capsys.readouterr().out
