"""Files that are there whole or not at all."""

import os
import signal
import subprocess
import sys

import pytest

from agglom.whole import whole


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with whole(path) as scratch:
        scratch.write_text("old")
        assert not path.exists() and scratch.parent == path.parent and scratch.name.startswith(".file.txt.")
    with whole(path) as scratch:
        scratch.write_text("half")
        assert path.read_text() == "old"
    assert path.read_text() == "half" and os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), whole(path) as scratch:
        scratch.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole(tmp_path / "file.txt"):
        pass
    assert not os.listdir(tmp_path)


def test_killed_in_the_middle_the_next_run_clears_it_away(tmp_path):
    path = tmp_path / "file.txt"
    code = (
        "import os, signal, sys; from pathlib import Path; from agglom.whole import whole\n"
        "with whole(Path(sys.argv[1]), owner='rank0') as scratch:\n"
        "    scratch.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".file.txt.rank0.tmp"]
    with whole(path, owner="rank0") as scratch:
        scratch.write_text("whole")
    assert os.listdir(tmp_path) == ["file.txt"] and path.read_text() == "whole"
