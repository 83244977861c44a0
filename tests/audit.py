"""`make audit`: does an advisory database know anything of the installed packages?

    python tests/audit.py PIP_AUDIT [LOCK]

Writes what is installed, with exact versions, into LOCK and asks pip-audit about just that. Ends
with 0 where all packages were looked up and nothing is known, 1 where something is, 2 where it could not be found out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PINNED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+")


def locked(freeze: str) -> tuple[list[str], list[str]]:
    """Lines of `pip freeze` -> those of a lock, and those that name no release: folders, and addresses, which may hold
    somebody's token. Local labels (`+cpu`) go, for advisories know releases alone."""
    lines = [line.strip() for line in freeze.splitlines() if line.strip() and not line.startswith("#")]
    kept = [line.partition("+")[0] for line in lines if PINNED.fullmatch(line)]
    return kept, [re.split(r"[ @=]", line)[0] for line in lines if not PINNED.fullmatch(line)]


def verdict(report: str | None, expected: int, said: str) -> tuple[int, list[str]]:
    """Exit code and what to print.

    Args:
        report: pip-audit's JSON, None where it wrote none.
        expected: packages of the lock.
        said: its standard error, for the last line of it.
    """
    last = (said.strip().splitlines() or ["no reason given"])[-1]
    try:
        packages = json.loads(report or "")["dependencies"]
    except (ValueError, KeyError, TypeError):
        return 2, [f"nothing was audited: the advisory database can't be reached or pip-audit failed ({last[:300]})"]
    known = [
        f"{package['name']} {package['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'none'}"
        for package in packages
        for flaw in package.get("vulns", ())
    ]
    unknown = [package["name"] for package in packages if "vulns" not in package]
    lines = [*known, f"{len(packages) - len(unknown)} of {expected} packages audited, {len(known)} advisories"]
    if len(packages) - len(unknown) < expected:
        lines.append(f"not audited: {', '.join(unknown) or 'some that pip-audit left out'}")
        return 1 if known else 2, lines
    return int(bool(known)), lines


def main(audit: str, lock: Path) -> int:
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    kept, left = locked(subprocess.run(freeze, check=True, capture_output=True, text=True).stdout)
    lock.write_text("\n".join(kept) + "\n")
    print(f"{lock}: {len(kept)} packages" + (f", without {', '.join(left)}" if left else ""))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "audit.json"
        command = [audit, "--requirement", str(lock), "--no-deps", "--disable-pip", "--progress-spinner", "off"]
        command += ["--vulnerability-service", "osv", "--format", "json", "--output", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        code, lines = verdict(out.read_text() if out.is_file() else None, len(kept), done.stderr)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "requirements.lock")))
