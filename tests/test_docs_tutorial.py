"""docs/tutorial.ipynb: what the script writes, run as it stands, without errors and without words of a machine."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def tutorial():
    spec = importlib.util.spec_from_file_location("tutorial", DOCS / "tutorial.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(DOCS / "tutorial.ipynb", as_version=4)


def printed(book):
    return "\n".join(
        out["text"] for cell in book.cells for out in cell.get("outputs", ()) if out.output_type == "stream"
    )


def test_it_is_what_the_script_writes(tutorial, committed):
    nbformat.validate(committed)
    written = tutorial.notebook()
    assert [(c.cell_type, c.source) for c in committed.cells] == [(c.cell_type, c.source) for c in written.cells]


def test_outputs_are_there_and_of_no_machine(committed):
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count == number for number, cell in enumerate(code, 1))
    outputs = [out for cell in code for out in cell.outputs]
    assert {out.output_type for out in outputs} == {"stream", "display_data"}
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 2
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/|Traceback|Warning", printed(committed))
    losses = [float(x) for x in re.findall(r"'clip': ([\d.]+)", printed(committed))]
    assert len(losses) == 4 and losses[-1] < losses[0]  # it has learnt


@pytest.mark.slow
def test_it_runs(tutorial, tmp_path, scenes, monkeypatch):
    """Every cell, in a kernel of its own, over made-up garments."""
    monkeypatch.setenv("FASHION_MNIST", str(scenes.parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(DOCS.parent), *sys.path]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = tutorial.run(tutorial.notebook(), tmp_path)  # raises where a cell fails
    assert "kept" in printed(book) and (tmp_path / "export" / "model.safetensors").is_file()
