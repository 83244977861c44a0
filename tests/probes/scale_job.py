"""A process that shows many feature rows to one probe and prints how far its memory grew; run by test_scale.py.

    python scale_job.py FOLDER PROBE ROWS QUERIES WIDTH CLASSES

FOLDER holds train.npy, val.npy and test.npy, which are mapped. The probe sees a small problem first, so that what it
loads once isn't counted. Chunks are small, so that a copy of the features can't hide behind them.
"""

import sys
from pathlib import Path

import numpy as np

from agglom.features import InputSpec
from agglom.probes import KnnProbe, LinearProbe, LinearSgdProbe, Subject, knn, solver
from agglom.probes.features import FeatureSet, Targets

knn.QUERIES, knn.ROWS, solver.ENTRIES = 64, 8192, 2**19
PROBES = {
    "knn": lambda: KnnProbe(ks=(10, 100)),
    "linear": lambda: LinearProbe(l2=(0.1,)),
    "linear_sgd": lambda: LinearSgdProbe(lrs=(1e-3, 1e-2), epochs=1),
}


class Model:
    input = InputSpec()


def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def subject(arrays, classes):
    def labels(x):
        return (x[:, :classes].argmax(1)).astype(np.int64)

    targets = {role: Targets([""] * len(x), labels(x)) for role, x in arrays.items()}
    return Subject("m", Model(), {role: FeatureSet(x) for role, x in arrays.items()}, targets)


def main(folder, probe, rows, queries, width, classes):
    rng = np.random.default_rng(0)
    small = {role: rng.normal(size=(300, int(width))).astype(np.float32) for role in ("train", "val", "test")}
    PROBES[probe]().evaluate(subject(small, int(classes)))
    maps = {role: np.load(Path(folder) / f"{role}.npy", mmap_mode="c") for role in ("train", "val", "test")}
    shapes = [x.shape for x in maps.values()]
    assert shapes == [(int(rows), int(width))] + 2 * [(int(queries), int(width))]
    before = kib("VmRSS")
    found = PROBES[probe]().evaluate(subject(maps, int(classes)))
    print((kib("VmHWM") - before) * 1024, found.metrics["top1"])


if __name__ == "__main__":
    main(*sys.argv[1:])
