"""Only classes made for their place are built, and nothing else that a configuration names is called."""

import copy
import subprocess
import sys

import pytest
from small_run import config, write

from agglom.cli import main
from agglom.errors import UserError
from agglom.parsing import denied
from agglom.runs import build_distiller, build_teachers

POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": "touch marked", "shell": True}}
SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch marked"}}
# classes of other kinds that anybody has installed, and what is no class at all
OTHERS = {
    "os.system": SYSTEM,
    "subprocess.Popen": POPEN,
    "builtins.exec": {"class_path": "builtins.exec", "init_args": {"source": "open('marked', 'w')"}},
    "pathlib.Path": {"class_path": "pathlib.Path"},
    "torch.load": {"class_path": "torch.load", "init_args": {"f": "x"}},
    "torch.nn.Linear": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}},
    "a module": {"class_path": "agglom.teachers"},
    "no path": {"class_path": "..os.system"},
    "nothing": {"class_path": ""},
}
PLACES = [
    "model.student",
    "model.teachers.sam.encoder",
    "model.teachers.sam.adaptor",
    "model.teachers.sam.normalizer",
    "model.teachers.sam.spatial_loss",
    "model.adaptor",
    "model.normalizer",
    "model.summary_normalizer",
    "model.spatial_loss",
    "model.summary_loss",
    "model.balance",
    "model.objectives.evil",
    "model.student.init_args.kwargs.evil",
    "trainer.logger",
    "trainer.strategy",
    "trainer.profiler",
    "trainer.plugins",
    "trainer.callbacks",
    "trainer.accelerator",
]


def put(config, path, value):
    *parents, last = path.split(".")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = [value] if path in ("trainer.callbacks", "trainer.plugins") else value
    return config


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "torch.nn.Linear"])
def test_refused_everywhere(here, scenes, refused, place, name):
    spoilt = config(scenes, here / "run")
    put(spoilt, place, copy.deepcopy(OTHERS[name]))
    write(here / "c.yaml", spoilt)
    assert place in refused("check", "c.yaml") or place == "model.student.init_args.kwargs.evil"
    assert place.rpartition(".")[0] in refused("fit", "--config", "c.yaml")
    assert not (here / "run").exists()


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("place", ["model.student", "model.teachers.sam.encoder", "model.adaptor", "model.balance"])
def test_refused_by_its_path_alone(here, scenes, refused, place, name):
    spoilt = config(scenes, here / "run")
    put(spoilt, place, OTHERS[name]["class_path"])
    write(here / "c.yaml", spoilt)
    assert f"{place}" in refused("check", "c.yaml")
    refused("fit", "--config", "c.yaml")


@pytest.mark.parametrize("options", [["--model.adaptor", "os.system"], ["--trainer.callbacks+", "subprocess.Popen"]])
def test_refused_on_the_command_line(here, scenes, refused, options):
    write(here / "c.yaml", config(scenes, here / "run"))
    assert options[0].strip("-+") in refused("fit", "--config", "c.yaml", *options)


def test_a_function_for_a_callback_is_refused(here, scenes, refused):
    """Lightning's LambdaCallback calls what it is given; a configuration can't give it what starts programs."""
    spoilt = config(scenes, here / "run")
    spoilt["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_start": "os.system"}}
    ]
    write(here / "c.yaml", spoilt)
    refused("fit", "--config", "c.yaml")


@pytest.mark.parametrize("place", ["model.student", "model.teachers.sam.encoder", "model.adaptor", "model.balance"])
@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "torch.nn.Linear"])
def test_the_configuration_of_a_run_is_no_way_around(here, run, refused, place, name):
    import yaml

    spoilt = yaml.safe_load((run / "config.yaml").read_text())
    put(spoilt, place, OTHERS[name])
    write(run / "config.yaml", spoilt)
    assert place in refused("export", "--ckpt", run, "--out", here / "out")
    if place == "model.teachers.sam.encoder":
        assert place in refused("probe", "--run", run, "--probes", "knn")


def test_a_runs_denied_modules_are_not_even_imported(here, scenes, run, refused):
    """Commands import a run's own student and adaptor; `this` would print when it is imported."""
    import yaml

    spoilt = yaml.safe_load((run / "config.yaml").read_text())
    spoilt["model"]["student"]["class_path"] = "this.Student"
    write(run / "config.yaml", spoilt)
    assert "model.student.class_path: this.Student" in refused("probe", "--run", run, "--probes", "knn")
    embed = ("embed", "--data", scenes, "--out", here / "x.npz", "--model")
    assert "model.student.class_path: this.Student" in refused(*embed, run)
    assert "this" not in sys.modules


@pytest.mark.parametrize("name", OTHERS)
def test_builders_refuse_by_themselves(here, scenes, name):
    for place in ("model.student", "model.adaptor"):
        spoilt = put(whole := config(scenes, here), place, OTHERS[name]) and whole
        with pytest.raises(UserError, match=place):
            build_distiller(spoilt)
    put(whole := config(scenes, here), "model.teachers.sam.encoder", OTHERS[name])
    with pytest.raises(UserError, match=r"model\.teachers\.sam\.encoder"):
        build_teachers(whole)


@pytest.mark.parametrize(
    "module",
    [
        "os:system",
        "subprocess:Popen",
        "torch.hub:load",
        "torch:load",
        "webdataset.gopen:gopen",
        "numpy:array",
        "timm:x",
    ],
)
def test_a_network_by_import_path_is_one(here, scenes, refused, module):
    spoilt = config(scenes, here / "run")
    init_args = {"module": module, "kwargs": {"command": "touch marked"}}
    encoder = {"class_path": "agglom.teachers.TorchTeacher", "init_args": init_args}
    spoilt["model"]["teachers"]["sam"]["encoder"] = encoder
    write(here / "c.yaml", spoilt)
    assert "model.teachers.sam.encoder" in refused("check", "c.yaml")
    refused("fit", "--config", "c.yaml")
    refused("info", f"torch:{module}")


def test_denied_modules_are_not_even_imported(here):
    """`antigravity` opens a browser when it is imported."""
    code = (
        "import sys\n"
        "from agglom.schema import find_class\n"
        "assert find_class('antigravity.fly', object) is None and find_class('this.s', object) is None\n"
        "assert not {'antigravity', 'this'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=here)


def test_what_is_denied():
    assert all(map(denied, ["os", "os.path.join", "subprocess.Popen", "torch.load", "torch.hub.load", "yaml.load"]))
    assert not any(map(denied, ["torch.nn.Linear", "torchvision.models.resnet50", "my.os.system", "osmium.x"]))


def test_a_class_of_somebodys_own_is_built(here, scenes, monkeypatch):
    (here / "somebodys.py").write_text(
        "from agglom.teachers import TinyTeacher\nclass Mine(TinyTeacher):\n    '''A teacher.'''\n"
    )
    monkeypatch.syspath_prepend(str(here))
    own = config(scenes, here / "run")
    own["model"]["teachers"]["sam"]["encoder"]["class_path"] = "somebodys.Mine"
    write(here / "c.yaml", own)
    main(["check", "c.yaml"])
