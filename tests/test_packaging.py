"""What is installed: the package list equals the tree, symlinks, guards of the rooms, every module imports."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import agglom

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
ROOMS = ("teachers", "students", "adaptors", "probes", "configs")


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_package_list_equals_the_tree():
    found = set()
    for top in ("agglom", *ROOMS):
        for folder, _, files in os.walk(ROOT / top):  # symlinks to the rooms are not followed
            if "__init__.py" in files:
                name = Path(folder).relative_to(ROOT).as_posix().replace("/", ".")
                found.add(name if top == "agglom" else f"agglom.{name}")
    listed = project()["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == found
    places = project()["tool"]["setuptools"]["package-dir"]
    assert places == {"agglom": "agglom", **{f"agglom.{room}": room for room in ROOMS}}


def test_every_yaml_and_weight_is_packaged():
    data = project()["tool"]["setuptools"]["package-data"]
    assert {"**/*.yaml", "mmseg/*.py"} <= set(data["agglom.configs"])
    assert "*.safetensors" in data["agglom.teachers.tiny"]
    assert "py.typed" in data["agglom"] and (ROOT / "agglom" / "py.typed").is_file()


@pytest.mark.parametrize("room", ROOMS)
def test_symlinks_are_relative_and_committed(room):
    link = ROOT / "agglom" / room
    assert link.is_symlink() and os.readlink(link) == f"../{room}"
    assert link.resolve() == ROOT / room
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "--stage", f"agglom/{room}"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert listed.stdout.startswith("120000 ")  # the mode of a symlink


@pytest.mark.parametrize("room", ROOMS)
def test_bare_rooms_refuse_with_a_hint(room):
    done = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"ImportError: import agglom.{room}, not {room}")


def test_every_module_imports():
    names = [module.name for module in pkgutil.walk_packages(agglom.__path__, "agglom.")]
    assert len(names) > 60 and {f"agglom.{room}" for room in ROOMS} <= set(names)
    for name in names:
        importlib.import_module(name)
