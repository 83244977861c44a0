"""A finished run with its export, and how a command refuses."""

import logging
import shutil
import signal
import sys
from pathlib import Path

import pytest

from agglom.cli import main

sys.path.insert(0, str(Path(__file__).parent))

from small_run import config, write  # noqa: E402

LIMIT_S = 60


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, where a payload would leave its mark."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "marked").exists()


@pytest.fixture(scope="session")
def trained(scenes, tmp_path_factory):
    """A run of two steps with its export."""
    root = tmp_path_factory.mktemp("trained") / "run"
    main(["fit", "--config", str(write(root.parent / "c.yaml", config(scenes, root)))])
    return root


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def refused(capfd, monkeypatch):
    """A function: arguments -> the one line that `agglom ARGS` refuses with, in this process and in time."""

    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handler may hold an earlier test's stream

    def late(signum, frame):
        raise TimeoutError("hangs")

    def call(*args, lines=1):
        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(LIMIT_S)
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as stop:
                main([str(arg) for arg in args])
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        out, err = capfd.readouterr()
        said = [line for line in err.splitlines() if line.startswith(f"agglom {args[0]}: ")]
        assert stop.value.code == 2 and "Traceback" not in out + err
        assert len(said) == lines, err
        return said[-1] if args[0] != "check" else out.strip()

    return call
