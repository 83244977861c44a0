"""The benchmarks: a very small run of each, and the arithmetic of the tables."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from agglom.data.scenes import write_scenes
from agglom.probes import LinearProbe, SegmentationProbe, measure

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


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes whose cost doesn't come from the 50,000 pixels and the many strengths of L2 that they fit."""
    monkeypatch.setitem(measure.PROBES, "segmentation", partial(SegmentationProbe, pixels=400, l2=(0.01,)))
    monkeypatch.setitem(measure.PROBES, "linear", partial(LinearProbe, l2=(0.01,), features=("mean",)))


def check_tiny_run(module: ModuleType, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run it; a second time nothing is trained; results of other settings are refused -> the table's first column."""
    module.main(tiny_run(data, out))
    table = (out / "table.md").read_text()
    monkeypatch.setattr(module, "train", lambda *args, **options: pytest.fail("trained again"))
    module.main(tiny_run(data, out))
    assert (out / "table.md").read_text() == table
    with pytest.raises(SystemExit, match="lr .* instead of 0.5"):
        module.main([*tiny_run(data, out), "--lr", "0.5"])
    return names(table)


@pytest.mark.slow
def test_a_tiny_ablation(benchmark, larger_scenes, tmp_path, monkeypatch, quick_probes):
    module = benchmark("ablation")
    some = {name: module.CONFIGURATIONS[name] for name in ("sam alone", "base")}  # one without zero-shot
    monkeypatch.setattr(module, "CONFIGURATIONS", some)
    assert check_tiny_run(module, larger_scenes, tmp_path, monkeypatch) == list(some)


@pytest.mark.slow
def test_a_tiny_complementarity(benchmark, larger_scenes, tmp_path, monkeypatch, quick_probes):
    module = benchmark("complementarity")
    some = {name: module.STUDENTS[name] for name in ("student of sam", "student of all three")}
    monkeypatch.setattr(module, "STUDENTS", some)
    teachers = ["teacher clip", "teacher dino", "teacher sam"]
    found = check_tiny_run(module, larger_scenes, tmp_path, monkeypatch)
    assert found == [*teachers, *some, "student before training"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["+ dino, ibot", "+ mesa", "+ gram", "+ gram at 2x"])
def test_a_tiny_self_distillation(variant, benchmark, larger_scenes, tmp_path, monkeypatch, quick_probes):
    module = benchmark("self_distillation")
    some = {name: module.CONFIGURATIONS[name] for name in (module.BASE, variant)}
    monkeypatch.setattr(module, "CONFIGURATIONS", some)
    monkeypatch.setattr(module, "TEACHERS", ("clip",))
    found = check_tiny_run(module, larger_scenes, tmp_path, monkeypatch)
    assert found == ["teacher clip", module.UNTRAINED, *some]
    kept = json.loads((tmp_path / "results.json").read_text())
    rows = [row for key, found in kept.items() if key != "settings" for row in found.values()]
    assert all(0 < row[column] < 2 for row in rows for column in ("cell", "half"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip alone", "dino alone", "ladder", "dropping", "raw", "phi_s", "adaloss"])
def test_the_other_configurations_train(name, benchmark, larger_scenes, tmp_path):
    module = benchmark("ablation")
    options = module.parser("", name="ablation", steps=2, lr=1e-2).parse_args(tiny_run(larger_scenes, tmp_path))
    recipe = module.CONFIGURATIONS[name]
    assert list(module.train(recipe, 0, options, tmp_path / "export").adaptors) == list(recipe.teachers)


def test_the_ablation_has_a_row_for_each_configuration_and_goes_on_where_it_stopped(benchmark, tmp_path, monkeypatch):
    module, trained = benchmark("ablation"), []
    row = TEACHERS["clip"]
    monkeypatch.setattr(module, "train", lambda recipe, seed, options, out: trained.append(recipe))
    monkeypatch.setattr(module, "probe", lambda models, options, out: dict.fromkeys(models, row))
    run = ["--data", "nowhere", "--out", str(tmp_path), "--seeds", "3", "4"]
    module.main(run)
    assert names((tmp_path / "table.md").read_text()) == list(module.CONFIGURATIONS)
    assert len(trained) == 2 * len(module.CONFIGURATIONS) == 18
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


def test_self_distillation_adds_one_objective_to_the_same_recipe(benchmark):
    module = benchmark("self_distillation")
    base = vars(module.CONFIGURATIONS[module.BASE])
    changed = {
        name: {key for key, value in vars(recipe).items() if value != base[key]}
        for name, recipe in module.CONFIGURATIONS.items()
    }
    assert changed.pop(module.BASE) == set() and base["shift"] and base["ema_decay"] and not base["objectives"]
    assert changed.pop("+ dino, ibot") == {"objectives", "crops"}
    assert changed and all(keys == {"objectives"} for keys in changed.values())
    assert all(len(module.CONFIGURATIONS[name].objectives) == 1 for name in changed)


def test_bold_is_for_variants_whose_seeds_lie_apart_from_the_base(benchmark):
    module = benchmark("self_distillation")

    def rows(*half: float) -> list[dict[str, float]]:
        return [{"knn": 0.2, "segmentation": 0.1, "cell": 0.3, "half": value} for value in half]

    found = {"teacher clip": rows(0.9), module.UNTRAINED: rows(0.1, 0.1), module.BASE: rows(0.5, 0.6)}
    table = module.table({**found, "+ mesa": rows(0.3, 0.4), "+ gram": rows(0.4, 0.55)})
    cells = {line.split(" | ")[0][2:]: line.split(" | ")[-1] for line in table.splitlines()[2:]}
    assert cells == {
        "teacher clip": "90.0 |",
        module.UNTRAINED: "10.0 ± 0.0 |",
        module.BASE: "55.0 ± 7.1 |",
        "+ mesa": "**35.0 ± 7.1** |",
        "+ gram": "47.5 ± 10.6 |",
    }


@pytest.mark.slow
def test_masking_does_a_quarter_of_the_work(benchmark, capsys):
    """A quarter of the patches in the blocks; embedding, class token and positions are whole on both sides."""
    shares = benchmark("masking").main(["--quick"])
    assert 0.25 < shares["unmasked"]["flops"] < 0.27
    assert shares["full"]["flops"] == pytest.approx(0.75 * shares["unmasked"]["flops"], rel=0.02)  # 9 of 12 blocks
    assert all(0 < share["low"] <= share["wall"] <= share["high"] for share in shares.values())
    said = capsys.readouterr().out
    assert "blocks run: 9 and 9; in full 12 and 12" in said and "unmasked" in said.splitlines()[-1]


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


@pytest.mark.slow
def test_what_probes_cost_is_told_for_each(benchmark, tmp_path):
    found = benchmark("probes").main(["--quick", "--json", str(tmp_path / "costs.json")])
    assert list(found) == ["extraction", "heads", "knn, width 16"]
    assert json.loads((tmp_path / "costs.json").read_text()) == found
    assert all(value > 0 for costs in found.values() for value in costs.values())


@pytest.mark.slow
def test_loaders_are_compared_at_equal_augmentation(benchmark, tmp_path):
    module = benchmark("data")
    small = ["--pictures", "40", "--side", "240", "--rounds", "1", "--batches", "1"]
    found = module.main([*small, "--json", str(tmp_path / "data.json")])
    assert json.loads((tmp_path / "data.json").read_text()) == found
    names = ["agglom", *module.OTHERS]
    assert [(case["name"], case["workers"]) for case in found["cases"]] == [
        ("decode only", 0), *((name, workers) for workers in (1, 0) for name in names)
    ]  # fmt: skip
    assert all(case["images_per_s"] > 0 and case["speedup"] > 0 for case in found["cases"])
    assert all(case["speedup"] == 1 for case in found["cases"] if case["name"] == "agglom")


@pytest.mark.slow
def test_a_step_costs_what_a_bare_one_does(benchmark, tmp_path):
    """Equal losses are asserted inside; bytes and reads by the host are exact, times of a tiny run mean nothing."""
    tiny = ["--size", "32", "--batch", "2", "--rounds", "2", "--json", str(tmp_path / "step.json")]
    found = benchmark("step").main([*tiny, "--precisions", "fp32"])
    assert [case["name"] for case in found["cases"]] == ["ladder fp32", "mlp fp32"]
    for case in found["cases"]:
        assert case["difference"] < 1e-5 and case["memory_ratio"] < 1.05 and case["syncs"] == []
        assert case["time_ratio"] > 0
    assert json.loads((tmp_path / "step.json").read_text()) == found


def test_reads_by_the_host_are_counted(benchmark):
    module, x = benchmark("step"), torch.arange(3.0)
    with module.Syncs("cpu") as syncs:
        y = (x + 1).sum()
    assert syncs.found == []
    with syncs:
        float(y), bool(y > 0), y.item(), x.tolist(), x.nonzero(), x[x > 0], x.numpy(), x.cpu()
    assert len(syncs.found) == 8


def test_the_peak_is_that_of_all_tensors_alive(benchmark):
    module = benchmark("step")

    def run() -> None:
        first = torch.zeros(2**20)  # 4 MiB
        second = torch.zeros(2 * 2**20)
        del first
        third = torch.zeros(2**19)
        del second, third

    found = module.peak_mib(module.Setting(device="cpu"), run)
    assert found == pytest.approx(12, abs=0.01)


def test_the_exponent_of_the_growth_does_not_see_what_is_constant(benchmark):
    exponent = benchmark("scale").exponent
    for p in (0.5, 1.0, 2.0):
        assert exponent([1, 2, 4, 8], [7 + 3 * n**p for n in (1, 2, 4, 8)]) == pytest.approx(p)
    with pytest.raises(ValueError, match="three that grow"):
        exponent([1, 2, 4], [3, 2, 1])


@pytest.mark.slow
def test_cost_and_memory_of_streamed_images_are_told_by_a_process_of_its_own(benchmark, tmp_path):
    module = benchmark("scale")
    data = benchmark("probes").pictures(tmp_path / "data", 64)
    seconds, resident = module.child("--stream-of", str(data), "64")
    assert 0.01 < seconds < 60 and 2e8 < resident < 4e9


def test_the_sizing_table_in_the_documentation_is_what_its_command_prints(benchmark, capsys):
    module = benchmark("sizing")
    module.main([])
    table = capsys.readouterr().out
    assert table in (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
    # by hand: a ViT-B with a tenth of a teacher's cost and 2 devices
    size = module.size_of("vit_base_patch16_224")
    assert size.parameters == 85_798_656 and size.tokens(224) == 196
    assert size.forward(224) == 2 * 85_798_656 * 196 + 4 * 12 * 196**2 * 768
    found = module.memory(size, 1e9, 224, 4, 2, True)
    assert found == pytest.approx(85_798_656 * 1.125 * 8 + 2e9 + 34 * 768 * 12 * 196 * 4)


def test_a_process_is_timed_until_its_line(benchmark):
    until = benchmark("startup").until
    script = "import time; print('step 1', flush=True); time.sleep(0.5)"
    assert until([sys.executable, "-c", script], ".", "step 1") + 0.4 < until([sys.executable, "-c", script], ".", None)
    with pytest.raises(SystemExit, match="step 1"):  # what it said is shown
        until([sys.executable, "-c", script], ".", "step 2")


def test_tables_are_replaced_and_the_rest_stays(benchmark, tmp_path):
    module, docs = benchmark("table"), tmp_path / "benchmarks.md"
    about = {"cpu": "a CPU", "cores": 2, "capability": "AVX512", "torch": "2", "gpu": None, "load": 0.1}
    case = {"name": "check", "seconds": 4.567, "low": 4.0, "high": 5.0, "cpu": 4.4}
    (tmp_path / "startup.json").write_text(json.dumps({"machine": about, "cases": [case]}))
    docs.write_text(f"words\n{module.MARKER}\nold\n")
    module.main([str(tmp_path), "--docs", str(docs)])
    text = docs.read_text()
    assert text.startswith(f"words\n{module.MARKER}\n") and "old" not in text
    assert "| check | 4.57 | 4.00-5.00 | 4.40 |" in text and "a CPU, 2 cores" in text
    module.main([str(tmp_path), "--docs", str(docs)])
    assert docs.read_text() == text
    docs.write_text("no such line")
    with pytest.raises(SystemExit, match="no line"):
        module.main([str(tmp_path), "--docs", str(docs)])
