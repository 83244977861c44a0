"""What a release says of itself: one version, the changelog's form, the citation, `--version`."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

import agglom
from agglom.cli import main

ROOT = Path(__file__).parent.parent


def test_version_is_written_once():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project and 'version = { attr = "agglom.__version__" }' in project
    assert not re.search(r'^version = "', project, re.MULTILINE)


def test_changelog_keeps_its_form():
    """https://keepachangelog.com: the newest version first, changes under the six kinds, dates in ISO form."""
    text = (ROOT / "CHANGELOG.md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles[0] == "[Unreleased]"
    for title in titles[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", title), title
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    found = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert found and set(found) <= kinds


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == agglom.__version__ and citation["license"] == "Apache-2.0"
    assert citation["cff-version"] == "1.2.0" and all(set(author) == {"name"} for author in citation["authors"])
    known = {"cff-version", "message", "title", "abstract", "type", "authors", "license", "version", "keywords"}
    assert set(citation) <= known and citation["type"] == "software"  # the format allows no other keys than it names
    assert all(isinstance(word, str) for word in citation["keywords"])


def test_version_of_all(capsys):
    main(["--version"])
    said = capsys.readouterr().out.split()
    wanted = {"agglom": agglom.__version__, **{name: version(name) for name in ("torch", "timm", "lightning")}}
    assert dict(zip(said[::2], said[1::2], strict=True)) == wanted


def test_version_needs_nothing_heavy():
    code = (
        "import sys; from agglom.cli import main; main(['--version']);"
        "heavy = {'torch', 'timm', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
