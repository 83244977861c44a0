"""The lowest declared versions, together, under a quick part of the tests: `make minimum`.

In an environment of its own, in front of the running one: whatever pyproject.toml declares with >= is installed there
at exactly that version; everything else (torch and torchvision, which are gigabytes, and what the others need, as far
as it will do) is the running environment's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELD = ("torch", "torchvision")
HIDDEN = "__editable__"  # agglom comes from the checkout
TESTS = (
    "students", "teachers", "targets/test_standardize.py", "probes/test_meaning.py", "probes/test_coco_ap.py",
    "probes/test_report.py", "data/test_shards.py", "data/test_views.py", "data/test_datamodule.py", "data/test_csv.py",
    "test_checks.py", "test_schema.py", "test_cli.py", "test_distiller.py", "test_completion.py", "test_export.py",
    "test_timm_folder.py", "test_zero_shot.py", "probes/test_embed.py",
)  # fmt: skip


def lowest(project: str) -> list[str]:
    """`name==version` of each dependency that has a lower bound."""
    block = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert block is not None
    found = re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)"', block[1])
    return [f"{name}=={version}" for name, version in found if name not in HELD]


def main(folder: Path) -> None:
    """Make the environment in `folder`, print what it has, run the tests."""
    pins = lowest((ROOT / "pyproject.toml").read_text())
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    behind = folder / "running"
    behind.mkdir(exist_ok=True)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(HIDDEN) and not (behind / entry.name).is_symlink():
            (behind / entry.name).symlink_to(entry)
    Path(site, "zz_running.pth").write_text(f"{behind.resolve()}\n")  # looked at after what is installed here
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--prefer-binary", *pins], check=True)
    told = "import importlib.metadata as m, sys; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
    subprocess.run([python, "-c", told, *HELD, *(pin.split("==")[0] for pin in pins)], check=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    files = [str(ROOT / "tests" / name) for name in TESTS]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files, *sys.argv[2:]]
    sys.exit(subprocess.run(command, cwd=ROOT, env=env).returncode)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".venv-minimum"))
