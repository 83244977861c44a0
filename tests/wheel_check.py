"""Builds wheel and source distribution and uses them from outside the checkout: `make wheel`.

The wheel goes into a folder of its own, found before anything else; dependencies come from the running environment,
whose editable install of the checkout is switched off.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

INSIDE = """
import importlib, pkgutil, sys
from pathlib import Path
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "").lower()
                    and "editable" not in getattr(finder, "__name__", "").lower()]
root = Path(sys.argv[1])
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != root]
import agglom
here = Path(agglom.__file__).resolve()
assert Path(sys.argv[2]).resolve() in here.parents, here
names = [module.name for module in pkgutil.walk_packages(agglom.__path__, "agglom.")]
for name in names:
    module = importlib.import_module(name)
    assert Path(sys.argv[2]).resolve() in Path(module.__file__).resolve().parents, module.__file__
for tiny in ("clip", "dino", "sam"):
    agglom.teachers.TinyTeacher(tiny)
print(len(names))
"""


def run(*command: str, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"wheel_check: {' '.join(command[:4])} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="agglom-wheel-") as name:
        temporary = Path(name)
        source, wheels, target = (temporary / part for part in ("source", "wheels", "site"))
        # From what is committed, in a copy: no left-over of the checkout gets in, none is left behind.
        source.mkdir()
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
        isolation = ["--no-build-isolation"] if find_spec("setuptools") else []
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
        run(*pip, "wheel", "--no-deps", *isolation, "--wheel-dir", str(wheels), str(source))
        (wheel,) = wheels.glob("*.whl")
        files = set(zipfile.ZipFile(wheel).namelist())
        sdist = _sdist(source, temporary, pip, isolation, files)
        wanted = [f"agglom/{p.relative_to(source).as_posix()}" for p in (source / "configs").rglob("*.*")]
        wanted += [f"agglom/teachers/tiny/{name}.safetensors" for name in ("clip", "dino", "sam")] + ["agglom/py.typed"]
        missing = [path for path in wanted if path not in files]
        if missing:
            sys.exit(f"wheel_check: the wheel lacks {missing}")
        run(*pip, "install", "--no-deps", "--target", str(target), str(wheel))
        env = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
        modules = run(sys.executable, "-c", INSIDE, str(ROOT), str(target), cwd=temporary, env=env).strip()
        seconds = min(_help(target, temporary, env) for _ in range(3))
        if seconds >= 1:
            sys.exit(f"wheel_check: agglom --help takes {seconds:.2f} s; valid: below 1 s")
        sizes = ", ".join(f"{path.name}, {path.stat().st_size / 1e6:.1f} MB" for path in (wheel, sdist))
        print(f"ok: {sizes}; {modules} modules, --help in {seconds:.2f} s")


def _sdist(source: Path, temporary: Path, pip: tuple[str, ...], isolation: list[str], files: set[str]) -> Path:
    """The source distribution, once the wheel that is built from it alone has the very files of the other."""
    out, again = temporary / "sdist", temporary / "again"
    how = ["--no-isolation"] if isolation else []
    run(sys.executable, "-m", "build", "--sdist", *how, "--outdir", str(out), str(source))
    (sdist,) = out.glob("*.tar.gz")
    run(*pip, "wheel", "--no-deps", *isolation, "--wheel-dir", str(again), str(sdist))
    (wheel,) = again.glob("*.whl")
    if differ := files ^ set(zipfile.ZipFile(wheel).namelist()):
        sys.exit(f"wheel_check: the wheel from the source distribution differs in {sorted(differ)[:8]}")
    return sdist


def _help(target: Path, cwd: Path, env: dict[str, str]) -> float:
    """Seconds of the installed command's --help."""
    started = time.perf_counter()
    text = run(sys.executable, str(target / "bin" / "agglom"), "--help", cwd=cwd, env=env)
    if "usage: agglom" not in text:
        sys.exit(f"wheel_check: agglom --help says {text[:200]!r}")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
