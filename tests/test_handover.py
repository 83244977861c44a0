"""A short training's export where only timm is installed, and where the built wheel is: its answers are equal.

The environments are fresh, with links to some of the installed packages: what an import finds is what is there.
"""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement

import agglom
from agglom.cli import main
from agglom.runs import build_distiller, read_config

ROOT = Path(__file__).resolve().parent.parent
ONLY_TIMM = """
import importlib.util, sys, timm, torch
for name in ("agglom", "lightning", "open_clip", "jsonargparse", "webdataset"):
    assert importlib.util.find_spec(name) is None, name
folder = sys.argv[1]
images = torch.load("images.pt", weights_only=True)
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
exec(open("through.py").read())
with torch.no_grad():
    features = model.forward_features((images - mean) / std)
torch.save({"features": features, "clip": through("clip", images), "size": config["input_size"]}, "answers.pt")
"""
WITH_AGGLOM = """
import sys, agglom, torch
assert agglom.__file__.startswith(sys.prefix), agglom.__file__
images = torch.load("images.pt", weights_only=True)
model = agglom.load(sys.argv[1])
with torch.no_grad():
    summary, spatial = model(images)
    words = model.zero_shot(images, ["a red dress", "a blue bag"])
    clip = tuple(model.adaptors["clip"](images))
torch.save({"summary": summary, "spatial": spatial, "clip": clip, "words": words}, "answers.pt")
"""


def closure(requirements):
    """The installed distributions that these requirements need."""
    found, todo = {}, [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        name = requirement.name.lower().replace("_", "-")
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found[name] = distribution(name)
            todo += [Requirement(text) for text in found[name].requires or ()]
    return found.values()


def environment(root, requirements):
    """A fresh virtual environment with these requirements and what they need -> its python, its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
    (site,) = root.glob("lib/python*/site-packages")
    for package in closure(requirements):
        for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(package.locate_file(top))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
    return root / "bin" / "python", site


def build_wheel(out):
    """The wheel of the checkout as it is, built in a copy."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout
    packed = subprocess.run(["tar", "-c", "--null", "-T", "-"], cwd=ROOT, input=names, check=True, capture_output=True)
    (out / "source").mkdir()
    subprocess.run(["tar", "-x", "-C", str(out / "source")], input=packed.stdout, check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel", "--no-deps"]
    where = ["--no-build-isolation", "--wheel-dir", str(out), str(out / "source")]
    subprocess.run([*pip, *where], check=True)
    return next(out.glob("agglom-*.whl"))


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    """A short training on two teachers, and the answers of its student in the training module."""
    root = tmp_path_factory.mktemp("handover")
    vit = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    student = {"name": "vit_tiny_patch16_224", "kwargs": vit, "registers": 1}
    tiny = "agglom.teachers.TinyTeacher"
    config = {
        "model": {
            "student": {"class_path": "agglom.students.TimmStudent", "init_args": student},
            "teachers": {n: {"encoder": {"class_path": tiny, "init_args": {"name": n}}} for n in ("clip", "sam")},
            "warmup_steps": 1,
            "ema_decay": None,
        },
        "data": {"data": str(scenes), "batch_size": 8, "size": 48, "val_split": None, "num_workers": 0},
        "trainer": {
            "max_steps": 4,
            "default_root_dir": str(root / "run"),
            "accelerator": "cpu",
            "precision": "32-true",
        },
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(root / "run.yaml")])
    module = build_distiller(read_config(root / "run" / "config.yaml"))
    state = torch.load(root / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    module.load_state_dict(state["state_dict"])
    module.eval()
    images = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    torch.save(images, root / "images.pt")
    head = module.heads["clip"]
    with torch.no_grad():
        features = module.student(images, module.taps)
        raw = head.adaptor(features)
        clip = tuple(
            head.normalizers[kind].denormalize(getattr(raw, kind).movedim(1, -1)).movedim(-1, 1)
            for kind in ("summary", "spatial")
        )
    return root, features, clip


def answers(python, script, root, folder="run/export"):
    """What the script leaves, run by this python in the folder of the run."""
    subprocess.run([str(python), "-I", "-c", script, str(root / folder)], cwd=root, check=True, timeout=300)
    return torch.load(root / "answers.pt", weights_only=True)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_only_timm(run, tmp_path):
    """Features of the training's student, and its adaptor by the code that the card prints."""
    root, features, clip = run
    card = (root / "run" / "export" / "README.md").read_text()
    (source,) = (text for text in re.findall(r"```python\n(.*?)```", card, re.S) if "def through" in text)
    (root / "through.py").write_text(source.replace("PATH_OF_THIS_FOLDER", str(root / "run" / "export")))
    got = answers(environment(tmp_path / "venv", ["timm"])[0], ONLY_TIMM, root)
    assert tuple(got["size"]) == (3, 48, 48)
    tokens = got["features"]
    close(tokens[:, :1], features.summary)
    close(tokens[:, 2:].transpose(1, 2).unflatten(2, (6, 6)), features.spatial)
    close(got["clip"][0], clip[0])
    close(got["clip"][1], clip[1])


@pytest.mark.slow
def test_the_wheel(run, tmp_path):
    """The wheel and its declared dependencies, from outside of the checkout; zero-shot brings its text tower along."""
    pytest.importorskip("setuptools")
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout")
    root, features, clip = run
    wheel = build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(about).decode().split("\n\n")[0].splitlines()
        python, site = environment(
            tmp_path / "venv", [line.split(": ", 1)[1] for line in lines if line.startswith("Requires-Dist: ")]
        )
        archive.extractall(site)
    got = answers(python, WITH_AGGLOM, root)
    close(got["summary"], features.summary.flatten(1))
    close(got["spatial"], features.spatial)
    close(got["clip"][0], clip[0])
    close(got["clip"][1], clip[1])
    with torch.no_grad():
        here = agglom.load(root / "run").zero_shot(torch.load(root / "images.pt"), ["a red dress", "a blue bag"])
    close(got["words"], here)
