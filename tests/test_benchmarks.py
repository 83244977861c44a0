"""The benchmarks on fashion scenes: a very small run of each, and the arithmetic of the ablation's table."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from agglom.data.scenes import write_scenes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TEACHERS = {
    "clip": {"knn": 0.8, "linear": 0.5, "zeroshot": 0.4, "segmentation": 0.2},
    "sam": {"knn": 0.2, "linear": 0.6, "segmentation": 0.25},
}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """A function: name -> the script as a module, which finds its neighbour as it does when it is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture(scope="module")
def larger_scenes(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared scenes at the demo's 64 px."""
    out = tmp_path_factory.mktemp("larger") / "scenes"
    write_scenes(out, source=scenes.parent, train=96, val=32, test=32, size=64, shard_size=32, workers=1)
    return out


def tiny_run(data: Path, out: Path) -> list[str]:
    small = {"steps": 2, "batch-size": 4, "seeds": 0, "train": 40, "test": 20}
    return ["--data", str(data), "--out", str(out), *(part for k, v in small.items() for part in (f"--{k}", str(v)))]


def names(table: str) -> list[str]:
    """The first column below the head."""
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    return rows[1:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ablation", "complementarity"])
def test_a_tiny_run_ends_in_a_table_and_is_not_repeated(name, benchmark, larger_scenes, tmp_path, monkeypatch):
    module = benchmark(name)
    module.main(tiny_run(larger_scenes, tmp_path))
    table = (tmp_path / "table.md").read_text()
    if name == "ablation":
        assert names(table) == list(module.CONFIGURATIONS) and len(module.CONFIGURATIONS) == 9
    else:
        assert names(table)[:3] == ["teacher clip", "teacher dino", "teacher sam"]
        assert {*module.STUDENTS, "student before training"} == set(names(table)[3:])

    monkeypatch.setattr(module, "train", lambda *args, **options: pytest.fail("trained again"))
    module.main(tiny_run(larger_scenes, tmp_path))
    assert (tmp_path / "table.md").read_text() == table
    with pytest.raises(SystemExit, match="lr .* instead of 0.5"):
        module.main([*tiny_run(larger_scenes, tmp_path), "--lr", "0.5"])


def test_the_ablation_goes_on_where_it_stopped(benchmark, tmp_path, monkeypatch):
    module, trained = benchmark("ablation"), []
    row = TEACHERS["clip"]
    monkeypatch.setattr(module, "train", lambda recipe, seed, options, out: trained.append(recipe))
    monkeypatch.setattr(module, "probe", lambda models, options, out: dict.fromkeys(models, row))
    run = ["--data", "nowhere", "--out", str(tmp_path), "--seeds", "3", "4"]
    module.main(run)
    everything = (tmp_path / "results.json").read_text()
    kept = json.loads(everything)
    del kept["ladder, seed 4"]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    trained.clear()
    module.main(run)
    assert trained == [module.CONFIGURATIONS["ladder"]]
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(everything)


def test_each_variant_differs_from_the_base_in_one_thing(benchmark):
    module = benchmark("ablation")
    base = vars(module.CONFIGURATIONS[module.BASE])
    changed = {
        name: [key for key, value in vars(recipe).items() if value != base[key]]
        for name, recipe in module.CONFIGURATIONS.items()
    }
    assert changed.pop(module.BASE) == []
    assert all(len(keys) == 1 for keys in changed.values()), changed


def test_retention_is_the_students_metric_over_the_best_teachers(benchmark):
    module = benchmark("ablation")
    kept = module.retention({"knn": 0.4, "linear": 0.3, "zeroshot": 0.3, "segmentation": 0.2}, TEACHERS)
    # each column has its own best teacher: kNN and zero-shot clip, the other two sam; the mean leaves out zero-shot
    assert kept == pytest.approx(
        {"knn": 50, "linear": 50, "zeroshot": 75, "segmentation": 80, "mean without zero-shot": 60}
    )
    assert "zeroshot" not in module.retention({"knn": 0.4, "linear": 0.3, "segmentation": 0.2}, TEACHERS)


def test_the_table_says_spread_and_marks_what_does_not_overlap_with_base(benchmark):
    module = benchmark("ablation")

    def rows(*knn: float) -> list[dict[str, float]]:
        return [{"knn": value, "linear": 0.6, "segmentation": 0.25} for value in knn]

    table = module.table({"base": rows(0.4, 0.56), "near": rows(0.48, 0.64), "far": rows(0.64, 0.8)}, TEACHERS)
    base, near, far = table.splitlines()[2:]
    assert base.startswith("| base | 60.0 ± 14.1 | 100.0 ± 0.0 | - | 100.0 ± 0.0 |")
    assert near.startswith("| near | 70.0 ± 14.1 |")
    assert far.startswith("| far | **90.0 ± 14.1** |")
    assert "**" not in module.table({"base": rows(0.4), "far": rows(0.8)}, TEACHERS)  # one seed has no spread
