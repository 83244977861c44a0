"""The source itself: nothing in it unpickles, evaluates, extracts or asks a shell."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT)
    for room in ("agglom", "teachers", "students", "adaptors", "probes", "configs", "benchmarks")
    for path in (ROOT / room).rglob("*.py")
    if not any(part.is_symlink() for part in path.parents)
)


def name(node):
    """`a.b.c` of an attribute or name."""
    if isinstance(node, ast.Attribute):
        return f"{name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def says(call, keyword, value):
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


def dangers(tree):
    """(line, what) of every call that could run what a file says."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for module in modules:
                if module.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
                    yield node.lineno, f"imports {module}"
        if not isinstance(node, ast.Call):
            continue
        called = name(node.func)
        last = called.rpartition(".")[2]
        if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            yield node.lineno, called
        if called == "torch.load" and not says(node, "weights_only", True):
            yield node.lineno, "torch.load without weights_only=True"
        if last == "load_state_dict" and called.startswith("timm") and not says(node, "weights_only", True):
            yield node.lineno, f"{called} without weights_only=True"
        if called in ("np.load", "numpy.load") and not says(node, "allow_pickle", False):
            yield node.lineno, "np.load without allow_pickle=False"
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"):
            yield node.lineno, called
        if last in ("extractall", "extract", "unpack_archive") and called != "extract":
            yield node.lineno, called
        for keyword in node.keywords:
            on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value in (False, None))
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and on and called != "shtab.complete":
                yield node.lineno, f"{keyword.arg}="
            if (
                keyword.arg == "weights_only"
                and last != "save_checkpoint"
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is True)
            ):
                yield node.lineno, "weights_only= other than True"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_dangerous_call(path):
    assert list(dangers(ast.parse((ROOT / path).read_text()))) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=trusted)",
        "np.load(p)",
        "np.load(p, allow_pickle=True)",
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "tar.extractall('.')",
        "shutil.unpack_archive(p)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "trainer.fit(m, weights_only=False)",
        "timm.models.load_state_dict(p)",
    ],
)
def test_the_search_finds(line):
    assert list(dangers(ast.parse(line)))


def test_what_is_read():
    assert len(FILES) > 150 and Path("agglom/callbacks/checkpoint_files.py") in FILES
