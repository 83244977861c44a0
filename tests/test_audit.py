"""`make audit` says that it doesn't know where it doesn't, and its lock holds releases alone."""

import importlib.util
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("audit.py")
spec = importlib.util.spec_from_file_location("audit", SCRIPT)
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)


def test_a_lock_holds_releases_and_no_secrets():
    freeze = (
        "# comment\nnumpy==2.0.1\ntorch==2.14.0+cpu\nmine @ file:///home/me/mine\n"
        "private @ git+https://me:token@host/private\n-e .\nodd===1\n"
    )
    kept, left = audit.locked(freeze)
    assert kept == ["numpy==2.0.1", "torch==2.14.0"] and left == ["mine", "private", "-e", "odd"]
    assert "token" not in "".join(left)


FLAW = {"id": "PYSEC-1", "fix_versions": ["2.0"], "description": "x"}


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        (None, 2, "nothing was audited: the advisory database can't be reached"),
        ("no JSON", 2, "nothing was audited"),
        ([], 2, "not audited"),
        ([{"name": "a", "version": "1", "vulns": []}], 0, "1 of 1 packages audited, 0 advisories"),
        ([{"name": "a", "version": "1", "vulns": [FLAW]}], 1, "a 1: PYSEC-1, fixed in 2.0"),
        ([{"name": "a", "skip_reason": "not found"}], 2, "not audited: a"),
    ],
)
def test_verdicts(packages, code, words):
    report = packages if packages is None or isinstance(packages, str) else json.dumps({"dependencies": packages})
    found, lines = audit.verdict(report, 1, "Traceback\nConnectionError: no route")
    assert found == code and words in "\n".join(lines)


def test_a_database_that_is_away(tmp_path):
    """A pip-audit that fails as it does without a network."""
    fake = tmp_path / "pip-audit"
    fake.write_text("#!/bin/sh\necho 'ERROR: Could not connect' >&2\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    command = [sys.executable, str(SCRIPT), str(fake), str(tmp_path / "requirements.lock")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "nothing was audited" in done.stdout and "Could not connect" in done.stdout
    assert "numpy==" in (tmp_path / "requirements.lock").read_text()
