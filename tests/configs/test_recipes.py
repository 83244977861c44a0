"""Recipes: full-size ones agree with their libraries and run on the meta device, tiny ones learn and export."""

import csv
import inspect
import json
import re
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from agglom.checks import check_config, check_file, read_yaml
from agglom.cli import main
from agglom.distiller import Distiller
from agglom.heads import TeacherConfig
from agglom.mosaic import places
from agglom.overrides import stated
from agglom.plan import Part, Partition, Plan, Stage
from agglom.schema import find_class
from agglom.selfdistill import Objective
from agglom.shifts import ShiftOptions
from agglom.targets import PHIS
from agglom.targets.hadamard import plan as hadamard_plan

RECIPES = Path(str(files("agglom.configs"))).resolve() / "recipes"
ALL = sorted(RECIPES.glob("*.yaml"))
FULL = [path for path in ALL if not path.name.startswith("tiny_")]
TINY = [path for path in ALL if path.name.startswith("tiny_")]

# steps and images a step of each stage, as published (C-RADIOv4, DUNE, SILC and SigLIP 2: ours)
BATCHES = {
    "am_radio_h": [(300_000, 1024), (300_000, 1152)],
    "c_radio_v4_so400m": [(600_000, 1152)],
    "dmae_b": [(31_280, 4096)],
    "dune_b": [(250_000, 512), (125_000, 512)],
    "eupe_b": [(390_000, 8192), (100_000, 4096)],
    "phi_s_b": [(300_000, 1024)],
    "radio_v25_l": [(300_000, 1024), (300_000, 1024), (300_000, 1152)],
    "silc_b": [(100_000, 16_384)],
    "siglip2_tail": [(100_000, 64)],
    "theia_b": [(500_450, 128)],
    "unic_b": [(500_400, 512)],
}


def stem(path):
    return path.stem


def head(path):
    """The comment lines at the top, without their #."""
    lines = path.read_text().splitlines()
    return [line[1:] for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]


def overrides(path):
    """The options that the header gives for several GPUs."""
    return [word for line in head(path) for word in re.findall(r"--(?:trainer|data|model)\.[\w.]+ \S+", line)]


def build(entry, **given):
    """The object of a class_path and its init_args; a teacher without weights."""
    cls = find_class(entry["class_path"], object)
    options = {**(entry.get("init_args") or {}), **given}
    if "pretrained" in inspect.signature(cls).parameters:
        options["pretrained"] = False
    if "dtype" in options:
        options["dtype"] = "fp32"  # autocast does nothing on the meta device
    return cls(**options)


def factory(entry):
    cls = find_class(entry["class_path"], object)
    options = dict(entry.get("init_args") or {})
    options |= {name: build(options[name]) for name in ("encoder", "text") if name in options}
    return partial(cls, **options)


def stages_of(config):
    return [
        Stage(**{**stage, "partitions": [Partition(**part) for part in stage.get("partitions", ())]})
        for stage in config.get("stages", ())
    ]


def on_meta(config):
    """The recipe's training module: its own student, teachers, heads, losses and plan, none of them with memory."""
    model = dict(config["model"])
    kinds = ("adaptor", "normalizer", "summary_normalizer", "summary_loss", "spatial_loss")
    with torch.device("meta"):
        teachers = {
            name: TeacherConfig(**{**entry, "encoder": build(entry["encoder"])})
            for name, entry in model.pop("teachers").items()
        }
        options = {kind: factory(model.pop(kind)) for kind in kinds if kind in model}
        if "balance" in model:
            options["balance"] = build(model.pop("balance"))
        if "objectives" in model:
            options["objectives"] = {name: factory(entry) for name, entry in model.pop("objectives").items()}
        if "shift" in model:
            options["shift"] = ShiftOptions(**model.pop("shift"))
        return Distiller(
            student=build(model.pop("student")), teachers=teachers, stages=stages_of(config), **options, **model
        )


@pytest.mark.parametrize("path", ALL, ids=stem)
def test_header_says_where_it_is_from_and_what_differs(path):
    text = "\n".join(head(path))
    assert re.search(r"^ Source:  .*arXiv \d{4}\.\d{5}", text, re.M)
    for word in ("Differs", "Needs", "Command", "Cost"):
        assert re.search(rf"^ {word}: +\S", text, re.M), word
    assert re.search(r"^ Cost: .*(not measured here|2 CPU cores)", text, re.M)
    assert ("not measured" in text) == (path in FULL)


@pytest.mark.slow
@pytest.mark.parametrize("path", ALL, ids=stem)
def test_check_asks_for_nothing_but_shards(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [line.split(":")[0] for line in check_file(path)] == ["data.data"]


@pytest.mark.slow
@pytest.mark.parametrize("path", FULL, ids=stem)
def test_the_command_for_several_gpus_is_sound(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [word for option in overrides(path) for word in option.split(" ", 1)]
    config, lines = stated(["--config", str(path), *args])
    trainer = config["trainer"]
    ranks = trainer["devices"] * trainer.get("num_nodes", 1)
    assert not lines and ranks > 1
    assert [line.split(":")[0] for line in check_config(config)] == ["data.data"]
    assert batches(config, ranks) == BATCHES[path.stem]


def batches(config, ranks=1):
    """(steps, images a step) of each stage."""
    plan = Plan(stages_of(config), size=config["data"]["size"], batch_size=config["data"]["batch_size"])
    slots = ranks * config["trainer"].get("accumulate_grad_batches", 1)
    out = []
    for index, start in enumerate(plan.starts):
        steps = plan.stages[index].steps or config["trainer"]["max_steps"] - start
        out.append((steps, sum(plan.part(start, slot).batch_size for slot in range(slots))))
    return out


@pytest.mark.parametrize("path", FULL, ids=stem)
def test_stages_are_as_published(path):
    config = read_yaml(path)[0]
    assert batches(config) == BATCHES[path.stem]
    assert config["trainer"]["max_steps"] == sum(steps for steps, _ in BATCHES[path.stem])


@pytest.mark.slow
@pytest.mark.parametrize("path", FULL, ids=stem)
def test_teachers_are_what_their_libraries_say(path):
    import open_clip
    import timm

    for entry in read_yaml(path)[0]["model"]["teachers"].values():
        named = entry["encoder"]["init_args"]
        with torch.device("meta"):
            teacher = build(entry["encoder"])
        spec, asked = teacher.input, named.get("input_size")
        patch = int(re.search(r"(?:patch|-)(\d\d)(?:\D|$)", named["name"])[1])
        if entry["encoder"]["class_path"].endswith("OpenClipTeacher"):
            assert named["tag"] in open_clip.list_pretrained_tags_by_model(named["name"])
            own = open_clip.get_model_config(named["name"])
            weights = open_clip.get_pretrained_cfg(named["name"], named["tag"])
            vision = own["vision_cfg"]
            width, native, summary = vision.get("width"), vision["image_size"], own["embed_dim"]
            if width is None:  # a tower of timm's
                with torch.device("meta"):
                    width = timm.create_model(vision["timm_model_name"]).num_features
            assert (spec.mean, spec.std) == (tuple(weights["mean"]), tuple(weights["std"]))
        else:
            assert named["name"] in timm.list_pretrained()
            own = timm.get_pretrained_cfg(named["name"])
            with torch.device("meta"):
                width = timm.create_model(named["name"]).num_features
            native, summary = own.input_size[-1], width
            if named.get("summary") == "none" or "SamTeacher" in entry["encoder"]["class_path"]:
                summary = None
            assert (spec.mean, spec.std, spec.interpolation) == (own.mean, own.std, own.interpolation)
        assert (teacher.summary_dim, teacher.spatial_dim, spec.stride) == (summary, width, patch)
        side = None if asked == "any" else asked or native
        assert spec.size == (side and (side, side))


def run_once_a_shape(encoder):
    """Outputs without content depend on the input's shape alone."""
    forward, seen = encoder.forward, {}

    def cached(images):
        if images.shape not in seen:
            seen[images.shape] = forward(images)
        return seen[images.shape]

    encoder.forward = cached


@pytest.mark.slow
@pytest.mark.parametrize("path", FULL, ids=stem)
def test_every_stage_runs_on_the_meta_device(path):
    config = read_yaml(path)[0]
    model, margin = on_meta(config), config["data"].get("margin", 0)
    model.heads.eval()  # statistics are asked for numbers, which this device doesn't have; their own tests update them
    for encoder in model.encoders.values():
        run_once_a_shape(encoder)
    passed = set()
    validation = Part(0, 0, config["data"]["size"], config["data"]["size"], 2)
    parts = [
        Part(stage, index, resolution, part.size or resolution, 2)
        for stage, parts in enumerate(model.plan.parts)
        for index, part in enumerate(parts)
        for resolution in part.resolutions or [part.size or config["data"]["size"]]
    ]
    for part in (validation, *parts):
        training = part is not validation
        model.student.train(training)
        names = model.plan.teachers(part.stage, part.partition, model.names) if training else model.names
        side = part.size + 2 * margin * training
        images = torch.empty(2, 3, side, side, device="meta")
        frames = model.frames(images, part if training else None, ("step",) * training)
        targets = model.targets(frames, names)
        student = model.student(frames.student, model.taps)

        pixels = (part.resolution, part.resolution)
        assert frames.student.shape[-2:] == pixels
        grid = model.student.input.grid(pixels)
        assert student.summary.shape == (2, model.student.dims.tokens, model.student.dims.summary)
        assert student.spatial.shape == (2, model.student.dims.spatial, *grid)
        assert list(targets) == list(names)
        for name in names:
            spec, target = model.encoders[name].input, targets[name]
            shape = spec.grid(pixels) if spec.size else grid  # a free size: the student's cells
            if model.mosaics[name] and places(pixels, spec) != (1, 1):
                shape = (part.resolution // spec.stride,) * 2
            if "spatial" in model.heads[name].weights:
                assert target.spatial.shape == (2, model.encoders[name].spatial_dim, *shape)
            if "summary" in model.heads[name].weights:
                assert target.summary.shape == (2, model.encoders[name].summary_dim)
        losses = model.losses(student, targets, {name: frames.offset(name) for name in names})
        for name in names:
            shapes = {kind: loss.shape for kind, loss in losses[name].items()}
            assert shapes == dict.fromkeys(model.heads[name].weights, (2,))
        if (
            names and training and (part.stage, part.partition) not in passed
        ):  # the gradient's way is the same at all resolutions
            passed.add((part.stage, part.partition))
            sum(model.heads[name].combine(losses[name]).sum() for name in names).backward()
    if model.names:  # objectives aren't run here; their tests show where their gradient goes
        learning = [(name, x) for name, x in model.trained.named_parameters() if x.requires_grad]
        unused = {name for name, x in learning if x.grad is None and not name.startswith("objectives.")}
        norm = {"student.backbone.norm.weight", "student.backbone.norm.bias"}
        assert unused == (norm if path.stem == "unic_b" else set())
    for name in model.names:
        for normalizer in model.heads[name].normalizers.values():
            assert not isinstance(normalizer, PHIS) or hadamard_plan(normalizer.dim)


def test_widths_of_unic_are_the_published_ones():
    model = on_meta(read_yaml(RECIPES / "unic_b.yaml")[0])
    for name in model.names:
        for ladder in (model.heads[name].adaptor.summary, model.heads[name].adaptor.spatial):
            assert [rung.out_features for rung in ladder.first] == [768] * 11 + [3072]
            assert ladder.last.out_features == 768


def cheap(path, scenes, run):
    """Options that make a tiny recipe cheaper still, without changing what it does."""
    config = read_yaml(path)[0]
    stages = config.get("stages", [])
    for part in [part for stage in stages for part in (stage, *stage.get("partitions", ()))]:
        if "batch_size" in part:
            part["batch_size"] //= 8
    micros = config["trainer"].get("accumulate_grad_batches", 1)
    options = {
        "data.data": scenes,
        "data.batch_size": 4,
        "data.num_workers": 0,
        "data.val_samples": 32,
        "trainer.max_steps": 200,
        "trainer.val_check_interval": 40 * micros,
        "trainer.default_root_dir": run,
    }
    if stages:
        options["stages"] = json.dumps(stages)
    else:  # teachers run once an image
        options |= {"data.view.scale": "[1, 1]", "data.view.ratio": "[1, 1]", "data.view.flip": 0}
        options["model.remember_teachers"] = "true"
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.mark.slow
@pytest.mark.parametrize("path", TINY, ids=stem)
def test_a_tiny_recipe_learns_from_every_teacher_and_exports(path, scenes, tmp_path, monkeypatch):
    import timm

    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main(["fit", "--config", str(path), *cheap(path, scenes, tmp_path / "run")])
    finally:
        torch.set_num_threads(threads)
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    config = read_yaml(path)[0]
    for name in config["model"]["teachers"]:
        values = [float(row[f"val/{name}/loss"]) for row in rows if row.get(f"val/{name}/loss")]
        assert len(values) == 5 and values[-1] < 0.99 * values[0], (name, values)
    for name, entry in config["model"].get("objectives", {}).items():
        values = [float(row[f"train/{name}/loss"]) for row in rows if row.get(f"train/{name}/loss")]
        late = "start" in entry.get("init_args", {})
        assert len(values) == (2 if late else 10) or config.get("stages"), (name, values)
        assert all(value == value and value < 100 for value in values)
        if not config["model"]["teachers"] and find_class(entry["class_path"], Objective).anchors:
            assert values[-1] < 0.9 * values[0], (name, values)
    student = timm.create_model(f"local-dir:{tmp_path}/run/export", pretrained=True)
    assert student(torch.zeros(1, 3, 64, 64)).shape == (1, 192)
