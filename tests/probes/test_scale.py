"""Memory: 200,000 rows of features through kNN and both linear probes, in real processes, under stated bounds."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

N, Q, D, K = 200_000, 256, 64, 8
MAPPED = 4 * (N + 2 * Q) * D  # pages of the features' files, all read: 51 MB
LABELS = 8 * 3 * N  # classes, their copy, and an order of the rows
SLACK = 24 * 2**20  # the allocator's, BLAS's and, of chunks of 2^19 numbers, a few
BOUNDS = {  # bytes above an idle process
    "knn": MAPPED + LABELS + SLACK,  # no copy
    "linear": MAPPED + 4 * N * D + LABELS + SLACK,  # the standardised copy
    "linear_sgd": MAPPED + LABELS + SLACK,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(1)
    for role, count in (("train", N), ("val", Q), ("test", Q)):
        np.save(out / f"{role}.npy", rng.standard_normal((count, D), np.float32))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("probe", BOUNDS)
def test_peak_memory(probe, folder):
    script = Path(__file__).parent / "scale_job.py"
    done = subprocess.run(
        [sys.executable, script, folder, probe, *map(str, (N, Q, D, K))], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown, accuracy = map(float, done.stdout.split())
    print(f"{probe}: {grown / 1e6:.0f} of {BOUNDS[probe] / 1e6:.0f} MB, top-1 {accuracy:.2f}")
    assert MAPPED / 2 < grown < BOUNDS[probe], f"{grown / 1e6:.0f} MB; bound {BOUNDS[probe] / 1e6:.0f} MB"
    assert accuracy > {"knn": 0.5, "linear": 0.85, "linear_sgd": 0.85}[probe]
