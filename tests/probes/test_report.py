"""From shards to the report: extraction and its cache, the runner, report.json's schema, the pages.

Also: escaping of what data says, reports without models, comparison, and one clear line for each bad input.
"""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from torch import nn

from agglom.data import write_index, write_shard
from agglom.errors import UserError
from agglom.features import Features, InputSpec
from agglom.probes import compare, read_report, run_probes, write_comparison, write_report
from agglom.probes.base import in_part
from agglom.probes.extract import Wanted, extract
from agglom.probes.features import Targets
from agglom.probes.fingerprint import behaviour_hash, weights_hash
from agglom.probes.gather import Gathered
from agglom.probes.pictures import load, pca_maps
from agglom.probes.shown import fetch
from agglom.probes.source import Source, fit
from agglom.probes.training import curves, read_metrics, thin

EVIL = "<script>alert(1)</script>|x"
CLASSES = ("red", "green", EVIL)


def sample(i, size=16, **changes):
    rng = np.random.default_rng(i)
    label = i % 3
    image = rng.integers(0, 60, (size, size, 3)).astype(np.uint8)
    image[2:10, 2:10, label] += 150
    seg = np.zeros((size, size), np.uint8)
    seg[2:10, 2:10] = label + 1
    return {"key": f"{i:05d}", "image": image, "cls": label, "seg": seg, "txt": f"a {EVIL} thing {i}"} | changes


def write(root, counts, change=lambda s: s, drop=()):
    splits, at = {}, 0
    for split, count in counts.items():
        rows = [{k: v for k, v in change(sample(at + i)).items() if k not in drop} for i in range(count)]
        splits[split] = [write_shard(root / f"{split}-000000.tar", rows)]
        at += count
    write_index(root, splits, classes=CLASSES, seg_classes=("background", *CLASSES), licence=EVIL)
    return root


class Tiny(nn.Module):
    def __init__(self, seed=0, summary=True, dim=8):
        super().__init__()
        torch.manual_seed(seed)
        self.input, self.has_summary, self.calls = InputSpec(size=(16, 16), stride=4), summary, 0
        self.net = nn.Conv2d(3, dim, 4, 4).requires_grad_(False)

    def forward(self, images):
        self.calls += len(images)
        spatial = self.net(images).relu()
        return Features(spatial.mean((2, 3)) if self.has_summary else None, spatial)


class Student(Tiny):
    def __init__(self, teacher):
        super().__init__(7)
        self.adaptors = {"clip": lambda images: teacher(images)}


class Tower:
    def encode_text(self, texts):
        rows = [torch.randn(8, generator=torch.Generator().manual_seed(len(t))) for t in texts]
        return nn.functional.normalize(torch.stack(rows), dim=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"), {"train": 60, "val": 30, "test": 30})


@pytest.fixture(scope="module")
def models():
    clip = Tiny(1)
    return {"student": Student(clip), "clip": clip, "sam": Tiny(2, summary=False), "random": Tiny(3)}


def run(models, data, out, **options):
    options = {
        "student": "student",
        "teachers": ["clip", "sam"],
        "random": "random",
        "text": {"clip": Tower()},
    } | options
    return run_probes(models, data, out=out, **options)


@pytest.fixture(scope="module")
def report(models, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "probes"
    run(models, data, out)
    (out.parent / "metrics.csv").write_text("epoch,step,train/loss\n0,0,2.0\n0,1,\n0,2,1.0\n")
    return out


def test_schema(report):
    found = json.loads((report / "report.json").read_text())
    assert found["schema_version"] == 1
    for name in ("student", "clip", "sam", "random"):
        for probe in ("knn", "linear", "segmentation"):
            assert all(isinstance(v, float) and 0 <= v <= 1 for v in found["models"][name][probe].values())
            low, high = found["ci"][name][probe][found["protocol"][probe]["metric"]]
            assert low <= found["models"][name][probe][found["protocol"][probe]["metric"]] + 1e-9 and low <= high
        assert {"role", "fingerprint", "input", "parameters"} <= set(found["provenance"]["models"][name])
    for probe, kept in found["retention"].items():
        best = max(found["models"][t][probe][kept["metric"]] for t in ("clip", "sam") if probe in found["models"][t])
        assert kept["best_teacher"] == best and kept["value"] == pytest.approx(kept["student"] / best)
    assert set(found["retention"]) == {"knn", "linear", "segmentation", "zeroshot"}
    assert found["retention"]["zeroshot"]["value"] == 1.0  # the fake adaptor is the teacher itself
    assert found["retention"]["zeroshot"]["ci"] == [1.0, 1.0]  # and resamples are paired
    assert {(s["probe"], s["model"]) for s in found["skipped"]} == {("zeroshot", "sam"), ("zeroshot", "random")}
    assert [found["data"]["splits"][r]["count"] for r in ("train", "val", "test")] == [60, 30, 30]
    assert found["data"]["hash"] and found["provenance"]["versions"]["torch"] and found["seconds"]["total"] > 0


def test_pages_need_no_model_no_network_and_escape(report):
    html = write_report(report.parent).read_text()  # the run directory will do
    text = (report / "report.md").read_text()
    assert text.startswith("# What the student kept\n") and "probes the student keeps" in text
    for section in ("retention", "scores", "training", "maps", "examples", "masks", "skipped", "protocol"):
        assert f'id="{section}"' in html
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.search(r'(src|href)="(?!data:|#)', html) and "url(" not in html
    assert all("alt=" in tag for tag in re.findall(r"<img[^>]*>", html))
    assert "prefers-color-scheme:dark" in html and "@media print" in html and 'lang="en"' in html
    assert "<script" not in text and "## Retention" in text and "**100.0**" in text
    assert write_report(report).read_text() == html


def shown(i):
    return sample(i)["image"]


def test_pictures_are_of_what_they_say(report, models):
    found, saved = json.loads((report / "report.json").read_text()), load(report)
    train = torch.stack([torch.from_numpy(shown(i)) for i in range(60)]).permute(0, 3, 1, 2).float() / 255
    for i, example in enumerate(found["examples"]):
        image = shown(int(example["key"]))
        assert (saved["images"]["test"][i] == image).all() and example["label"] == [CLASSES[int(example["key"]) % 3]]
        assert set(example["neighbours"]) == {"student", "clip", "sam"}
        for name, near in example["neighbours"].items():
            bank = models[name](train).spatial.mean((2, 3)).numpy()  # Tiny's summary; what stands for it where none is
            query = models[name](torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255).spatial.mean((2, 3))
            cosine = bank @ query[0].numpy() / np.linalg.norm(bank, axis=1) / query.norm().item()
            assert [int(n["key"]) for n in near] == np.argsort(-cosine)[:4].tolist()
            np.testing.assert_allclose([n["cosine"] for n in near], np.sort(cosine)[:-5:-1], atol=1e-4)
            for n in near:
                assert (saved["neighbours"]["train"][n["picture"]] == shown(int(n["key"]))).all()
                assert n["label"] == [CLASSES[int(n["key"]) % 3]]
    assert (saved["masks"]["truth"][0] == sample(int(found["examples"][0]["key"]))["seg"]).all()
    assert {kind for kind in saved if ":" in kind} == {"masks:segmentation"}


@pytest.mark.parametrize("rows,unreadable", [("all", 0), ("all", 1), ("4 of 5", 0), ("every 5th", 0)])
def test_a_few_samples_of_a_split(data, rows, unreadable):
    keys = [f"{n:05d}" for n in range(60) if in_part(n, rows)]
    got = Gathered(targets={"train": Targets(keys)})
    plan = {"train": {"split": "train", "rows": rows, "unreadable": unreadable}}
    found = SimpleNamespace(plan=plan, got=got, source=Source.open(data))
    wanted = [len(keys) - 1, 0, len(keys) // 2, 11]  # ends of the split, the first sample of a stretch, one inside
    for row, stored in zip(wanted, fetch(found, "train", wanted), strict=True):
        assert stored["key"] == keys[row]
        np.testing.assert_array_equal(np.asarray(stored["image"]).transpose(1, 2, 0), shown(int(keys[row])))


def test_markdown_is_what_github_renders(report):
    write_report(report)
    text = (report / "report.md").read_text()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    kinds = [token.type for token in tokens]
    assert "alert(1)" in text  # the licence says so
    assert kinds.count("table_open") == len(re.findall(r"^\| ---", text, re.M)) > 6
    inline = [child.type for token in tokens if token.children for child in token.children]
    assert "html_block" not in kinds and "html_inline" not in inline and "link_open" not in inline
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1  # cells of every row


def test_comparison_names_what_differs(report, tmp_path):
    for name, lr, limit, share in (("a", 0.1, {}, 0.8), ("b", 0.2, {"train": 5}, 0.9)):
        found = json.loads((report / "report.json").read_text())
        found["data"]["limits"], found["retention_mean"] = limit, share
        found["protocol"]["knn"]["models"]["student"]["temperature"] = 0.5 if name == "a" else 0.7
        (tmp_path / name / "probes").mkdir(parents=True)
        (tmp_path / name / "probes" / "report.json").write_text(json.dumps(found))
        recipe = f"model: {{lr: {lr}, ema: 1}}\ntrainer: {{default_root_dir: {name}}}\n"
        (tmp_path / name / "config.yaml").write_text(recipe)
    runs = [compare.Run.of(*read_report(tmp_path / name)) for name in "ab"]
    assert compare.recipes(runs) == [["model.lr", "0.1", "0.2"]]
    assert compare.protocols(runs) == [
        ["data.limits", "{}", "-"], ["data.limits.train", "-", "5"], ["probes.knn.temperature", "0.5", "0.7"]
    ]  # fmt: skip
    html = write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "c").read_text()
    text = (tmp_path / "c" / "comparison.md").read_text()
    for page in (html, text):
        assert "model.lr" in page and "different data" not in page and "default_root_dir" not in page
    assert '<th scope="row">a</th>' in html and "| a |" in text  # the folder in common is left out


def test_comparison(report, tmp_path):
    html = write_comparison([report, report.parent], tmp_path / "c").read_text()
    assert str(report.parent) in html and "different data" not in html
    assert "kNN" in (tmp_path / "c" / "comparison.md").read_text()


def test_cache_is_used_and_pruned(models, data, tmp_path):
    first = run(models, data, tmp_path, probes=["knn", "segmentation", "zeroshot"])
    seen = {n: m.calls for n, m in models.items()}
    second = run(models, data, tmp_path, probes=["knn", "segmentation", "zeroshot"])
    assert all(m.calls - seen[n] < 20 for n, m in models.items())  # fingerprint and pictures only
    assert first["models"] == second["models"] and first["ci"] == second["ci"]
    (tmp_path / "cache" / "old").mkdir()
    run({"student": models["student"]}, data, tmp_path, teachers=[], random=None, text={}, probes=["knn"])
    left = {p.name.split("-")[0] for p in (tmp_path / "cache").iterdir()}
    assert left == {"student", "student___clip", "targets"}


def test_cache_knows_weights_behaviour_and_damage(data, tmp_path):
    source = Source.open(data, fields=("cls",))
    model = Tiny(0)
    _, before, places = extract({"m": Wanted(model)}, source, "val", tmp_path)
    assert before["m"].spatial is None and before["m"].summary.shape == (30, 8)
    _, after, _ = extract({"m": Wanted(model, spatial=True)}, source, "val", tmp_path)  # maps are wanted now
    assert after["m"].spatial.dtype == np.float16 and after["m"].spatial.shape == (30, 8, 4, 4)
    np.testing.assert_array_equal(before["m"].summary, after["m"].summary)
    for place in places:
        (place / "meta.json").write_text("{")  # damaged: made anew
    _, again, _ = extract({"m": Wanted(model, spatial=True)}, source, "val", tmp_path)
    np.testing.assert_array_equal(again["m"].summary, before["m"].summary)
    assert not list(tmp_path.glob(".partial-*"))
    other = Tiny(0)
    assert weights_hash(other) == weights_hash(model)
    assert behaviour_hash(other, (16, 16)) == behaviour_hash(model, (16, 16))
    other.has_summary = False
    assert weights_hash(other) == weights_hash(model)
    assert behaviour_hash(other, (16, 16)) != behaviour_hash(model, (16, 16))
    with torch.no_grad():
        other.net.bias += 1
    assert weights_hash(other) != weights_hash(model)


def test_features_are_the_models_own(data, tmp_path):
    model = Tiny(4)
    targets, found, _ = extract(
        {"m": Wanted(model, spatial=True)}, Source.open(data, fields=("cls", "seg")), "test", tmp_path, batch=7
    )
    i = int(targets.keys[11])
    images = torch.from_numpy(sample(i)["image"]).permute(2, 0, 1)[None].float() / 255
    expected = model(images)
    torch.testing.assert_close(torch.from_numpy(found["m"].summary[11:12]), expected.summary, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.from_numpy(np.array(found["m"].spatial[11:12])), expected.spatial.half())
    assert targets.labels[11] == i % 3 and (targets.masks[11] == sample(i)["seg"]).all()


def test_limits_and_missing_splits(models, data, tmp_path):
    found = run(models, data, tmp_path / "a", limits={"train": 25, "test": 10}, probes=["knn"], show=2)
    assert [s["count"] for s in found["data"]["splits"].values()] == [25, 30, 10]
    two = write(tmp_path / "two", {"train": 50, "val": 20})
    splits = run(models, two, tmp_path / "b", probes=["knn"])["data"]["splits"]
    assert splits["test"] == {"split": "val", "rows": "all", "count": 20, "unreadable": 0}
    assert (splits["train"]["count"], splits["val"]["count"]) == (40, 10)


def test_fields_that_lack_are_listed(models, tmp_path):
    root = write(tmp_path / "d", {"train": 20, "val": 10, "test": 10}, drop=("seg",))
    found = run(models, root, tmp_path / "o")
    assert {s["reason"] for s in found["skipped"] if s["probe"] == "segmentation"} == {
        "the train split has no .seg.png"
    }
    bare = write(tmp_path / "e", {"train": 20, "val": 10, "test": 10}, drop=("seg", "cls"))
    with pytest.raises(UserError, match="no probe could run.*no .cls"):
        run(models, bare, tmp_path / "p")


def test_bad_input_is_one_line(models, data, tmp_path):
    for options, words in (
        ({"probes": ["kn"]}, "did you mean knn"),
        ({"student": "studnt"}, "did you mean student"),
        ({"teachers": ["clap"]}, "did you mean clip"),
        ({"limits": {"tests": 3}}, "did you mean test"),
        ({"limits": {"test": 0}}, "1 or more"),
    ):
        with pytest.raises(UserError, match=words) as err:
            run(models, data, tmp_path, **options)
        assert "\n" not in str(err.value)
    with pytest.raises(UserError, match="no report.json"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match="99"):
        read_report(tmp_path)
    nan = Tiny(0)
    with torch.no_grad():
        nan.net.bias[0] = float("nan")
        nan.net.weight[0] = float("nan")
    with pytest.raises(UserError, match="model x: .*not finite for sample"):
        extract({"x": Wanted(nan)}, Source.open(data), "val", tmp_path / "c")


def test_sizes_that_differ(tmp_path, models):
    def grow(s):
        return sample(int(s["key"]), size=16 + 8 * (int(s["key"]) % 2))

    root = write(tmp_path / "d", {"train": 20, "val": 10, "test": 10}, grow)
    with pytest.raises(UserError, match=r"sample 00001 is \(24, 24\).*size: 224"):
        run(models, root, tmp_path / "o")
    assert run(models, root, tmp_path / "o", size=16)["data"]["size"] == 16


def test_fit_keeps_image_and_mask_together():
    seg = np.zeros((20, 40), np.uint8)
    seg[:, 14:26] = 1
    image = torch.from_numpy(np.stack([seg * 200] * 3))
    out = fit({"image": image, "seg": torch.from_numpy(seg)}, 10)
    assert out["image"].shape == (3, 10, 10) and out["seg"].shape == (10, 10)
    assert ((out["image"][0] > 100) == (out["seg"] == 1)).all()


def test_colours_follow_the_reference():
    base = Tiny(0)

    class Turned(Tiny):  # the same features in another order and sign
        def forward(self, images):
            spatial = base(images).spatial
            return Features(None, -spatial.flip(1))

    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    maps = pca_maps({"a": base, "b": Turned()}, {"b": Turned()}, images, "a")
    assert set(maps) == {"a", "b", "a > b"} and maps["a"].shape == (3, 4, 4, 3)
    assert np.abs(maps["a"].astype(int) - maps["b"]).max() <= 2
    assert (maps["a > b"] == maps["b"]).all()


def test_curves_of_a_csv(tmp_path):
    (tmp_path / "m.csv").write_text(
        "step,epoch,train/loss,train/clip/summary_loss,val/clip/summary_loss,train/clip/weight,train/dino/weight,"
        "train/clip/kept,probe/clip/knn_top1,a/loss_step,a/loss_epoch,lr\n"
        "0,0,1,3,,.5,.5,1,,1,,5\n5,0,nan,,4,.7,.3,1,.2,2,,5\n9,0,,,,,,,,,7,\n"
    )
    columns = read_metrics(tmp_path / "m.csv")
    assert columns["train/loss"] == [(0.0, 1.0)] and columns["a/loss_step"] == [(0.0, 1.0), (5.0, 2.0)]
    assert "a/loss_epoch" not in columns and "epoch" not in columns and "step" not in columns
    charts = {chart.title: chart.lines for chart in curves(columns)}
    assert charts["clip"] == {"summary, training": [(0.0, 3.0)], "summary, validation": [(5.0, 4.0)]}
    assert charts["Weight in the loss"] == {"clip": [(0.0, 0.5), (5.0, 0.7)], "dino": [(0.0, 0.5), (5.0, 0.3)]}
    assert charts["Probes during training"] == {"knn_top1 through clip": [(5.0, 0.2)]}
    assert "Share of the images kept" not in charts  # always one
    assert charts["Learning rate"] == {"lr": [(0.0, 5.0), (5.0, 5.0)]}
    assert thin([(float(i), 1.0) for i in range(1000)], 100)[0] == (4.5, 1.0)
