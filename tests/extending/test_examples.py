"""docs/extending.md: its files, as they stand there, are checked, trained, exported, loaded and probed."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import agglom
from agglom.checks import check_file, read_yaml
from agglom.cli import main

spec = importlib.util.spec_from_file_location("docs_blocks", Path(__file__).parent.parent / "docs_blocks.py")
docs_blocks = importlib.util.module_from_spec(spec)
sys.modules["docs_blocks"] = docs_blocks
spec.loader.exec_module(docs_blocks)

PAGE = docs_blocks.DOCS / "extending.md"
FILES = {block.title: block.text for block in docs_blocks.blocks(PAGE, "python")}
PARTS = [yaml.safe_load(block.text)["model"] for block in docs_blocks.blocks(PAGE, "yaml")]


@pytest.fixture(scope="module")
def mine(tmp_path_factory, scenes):
    """A folder with the page's files, and a configuration of all of its parts."""
    folder = tmp_path_factory.mktemp("extending")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    config = read_yaml("configs/demo.yaml")[0]
    config["model"]["teachers"] = {}
    for part in copy.deepcopy(PARTS):
        config["model"]["teachers"] |= part.pop("teachers", {})
        config["model"] |= part
    config["model"]["teachers"]["resnet"]["encoder"]["init_args"]["weights"] = None  # no hub here
    config["model"]["warmup_steps"] = 1
    config["data"] |= {"data": str(scenes), "batch_size": 4, "val_samples": 4}
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "default_root_dir": "run", "accelerator": "cpu"}
    (folder / "my_run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def inside(mine, monkeypatch):
    """The working directory is that folder, and Python looks for modules there."""
    monkeypatch.chdir(mine)
    monkeypatch.syspath_prepend(str(mine))
    return mine


@pytest.fixture(scope="module")
def trained(mine, one_thread):
    """The same folder after the page's commands, each a process of its own."""
    env = {**one_thread, "PYTHONPATH": f".:{docs_blocks.ROOT}"}

    def run(*command):
        done = subprocess.run([sys.executable, *command], cwd=mine, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    run("save_encoder.py")
    assert "my_run.yaml: ok" in run("-m", "agglom.cli", "check", "my_run.yaml")
    run("-m", "agglom.cli", "fit", "--config", "my_run.yaml")
    run("-m", "agglom.cli", "probe", "--run", "run", "--probes", "knn,my_probe.NearestMean", "--test", "32")
    return mine


@pytest.mark.parametrize("name", FILES)
def test_short(name):
    assert len(FILES[name].splitlines()) <= 40
    assert not [word for word in FILES[name].split() if word.startswith("._") or "agglom._" in word]


def test_the_page_has_all_parts():
    assert set(FILES) == {"my_teacher.py", "save_encoder.py", "my_student.py", "my_adaptor.py", "my_probe.py"}
    named = json.dumps(PARTS)
    for name in ("my_teacher.TorchvisionTeacher", "TorchTeacher", "encoder.pt", "my_student.", "my_adaptor."):
        assert name in named


LACKING = """
import sys, agglom
try:
    agglom.load(sys.argv[1] + "/run")
except agglom.errors.UserError as err:
    print(err)
sys.path.append(sys.argv[1])
import my_student
try:
    agglom.load(sys.argv[1] + "/run")
except agglom.errors.UserError as err:
    print(err)
"""


@pytest.mark.slow
def test_whoever_lacks_the_modules_is_told(trained, one_thread):
    """The export and its card name them; a command on the run's own folder imports them."""
    data = yaml.safe_load((trained / "my_run.yaml").read_text())["data"]["data"]
    embed = ["-m", "agglom.cli", "embed", "--model", "run", "--data", data, "--out", "x.npz", "--limit", "4"]

    def run(*command, folder):
        env = {**one_thread, "PYTHONPATH": f"{folder}:{docs_blocks.ROOT}"}
        return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)

    done = run("-c", LACKING, str(trained), folder=trained.parent)
    first, second = done.stdout.strip().splitlines()
    assert first.endswith("timm knows no model 'tiny_net'; import my_student before it is loaded; commands do so by "
                          "themselves for a run directory")  # fmt: skip
    assert "class 'GatedAdaptor'; valid" in second and second.endswith("import my_adaptor first")
    done = run(*embed, folder=trained)
    assert done.returncode == 0 and "4 images; key, summary (128), mean (128), label" in done.stdout, done.stderr
    card = (trained / "run" / "export" / "README.md").read_text()
    assert "import my_student  # registers this network with timm\nimport timm" in card
    assert "import my_adaptor\nimport my_student\nimport agglom" in card


@pytest.mark.slow
def test_run_holds_them(trained, inside):
    import my_adaptor  # noqa: F401  agglom.load imports nothing by itself
    import my_student  # noqa: F401
    import my_teacher

    manifest = json.loads((trained / "run" / "teachers.json").read_text())["teachers"]
    assert {entry["source"] for entry in manifest.values()} == {"torchvision:resnet18:None", "encoder.pt"}
    model = agglom.load(trained / "run")
    images = torch.rand(2, 3, 64, 64)
    wide = my_teacher.TorchvisionTeacher()(images)
    ours = model.adaptors["resnet"](images)
    assert type(model.heads["resnet"]).__name__ == "GatedAdaptor"
    assert ours.summary.shape == wide.summary.shape == (2, 512) and ours.spatial.shape == (2, 512, 8, 8)
    assert model.adaptors["mine"](images).spatial.shape == (2, 32, 8, 8)
    assert type(model.student.backbone).__name__ == "TinyNet"


@pytest.mark.slow
def test_probe_is_in_the_report(trained):
    report = json.loads((trained / "run" / "probes" / "report.json").read_text())
    for name in ("student", "resnet", "mine", "random"):
        low, high = report["ci"][name]["nearest_mean"]["top1"]
        assert 0 <= low <= report["models"][name]["nearest_mean"]["top1"] <= high <= 1
    assert report["retention"]["nearest_mean"]
    assert "nearest mean" in (trained / "run" / "probes" / "report.md").read_text().lower()


def test_the_probe_finds_what_is_there(inside):
    """Clusters along axes are found; constant features are answered with one class."""
    import my_probe
    import numpy as np

    from agglom.probes import FeatureSet, Subject, Targets

    labels = np.arange(40) % 4
    clear = np.eye(4, dtype=np.float32)[labels]
    targets = {role: Targets([str(i) for i in range(40)], labels) for role in ("train", "test")}
    for features, wanted in ((clear, 1.0), (np.ones_like(clear), 0.25)):
        found = {role: FeatureSet(summary=features) for role in targets}
        result = my_probe.NearestMean().evaluate(Subject("x", None, found, targets))
        assert result.metrics["top1"] == wanted


def test_what_is_wrong_is_said_before(mine, inside, capsys):
    config = yaml.safe_load((mine / "my_run.yaml").read_text())
    config["model"]["adaptor"]["init_args"] = {"hiden": 4}
    (mine / "bad.yaml").write_text(yaml.safe_dump(config))
    torch.jit.script(torch.nn.Identity()).save("encoder.pt") if not Path("encoder.pt").exists() else None
    assert any("hiden: unknown key" in line and "hidden" in line for line in check_file(mine / "bad.yaml"))
    for probe, reason in (("my_probe.Nearest", "no such class"), ("my_probe.torch.Tensor", "no such class")):
        with pytest.raises(SystemExit):
            main(["probe", "--model", "tiny:clip", "--data", config["data"]["data"], "--out", "x", "--probes", probe])
        assert reason in capsys.readouterr().err


def test_a_student_that_timm_does_not_know_is_refused(mine, inside):
    """It would train, and fail where its export is written."""
    (mine / "bare.py").write_text(
        "from torch import nn\n"
        "from agglom.features import Dims, InputSpec\n"
        "from agglom.students import Student\n\n\n"
        "class Bare(Student):\n"
        "    input, dims, tap_names = InputSpec(stride=8), Dims(16, 16), ()\n"
    )
    config = yaml.safe_load((mine / "my_run.yaml").read_text())
    config["model"]["student"] = {"class_path": "bare.Bare"}
    (mine / "bare.yaml").write_text(yaml.safe_dump(config))
    lines = check_file(mine / "bare.yaml")
    assert any("Bare is no TimmStudent" in line and "register your network with timm" in line for line in lines)
