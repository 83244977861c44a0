"""The documentation: it builds strictly, its code blocks run or pass the check, its links and figures hold.

docs/extending.md has tests of its own (tests/extending), links and tables of all pages are in tests/test_readme.py.
"""

import copy
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from agglom import commands, data_commands
from agglom.checks import check_config, numbers, read_yaml
from agglom.cli import COMMANDS, DATA, _named, command_parser, main
from agglom.errors import UserError
from agglom.overrides import stated

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def load(path):
    """A module by its file: neither tests nor docs are packages."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


docs_blocks = load(Path(__file__).parent / "docs_blocks.py")
hooks = load(DOCS / "hooks.py")
PAGES = sorted(DOCS.glob("*.md"))
EVERYWHERE = [ROOT / "README.md", *PAGES]


@pytest.fixture(scope="module")
def place(tmp_path_factory, scenes):
    """A folder as a reader of the pages would have it: scenes, photos and a (tiny) finished run of the demo."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "data").mkdir()
    for name in ("scenes", "photos"):
        (folder / "data" / name).symlink_to(scenes)
    here = os.getcwd()
    os.chdir(folder)
    try:
        short = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--model.warmup_steps", "1"]
        small = ["--data.batch_size", "4", "--data.val_samples", "4", "--trainer.accelerator", "cpu"]
        main(["fit", "--config", "configs/demo.yaml", *short, *small])
        main(["probe", "--run", "runs/demo", "--probes", "knn", "--train", "32", "--val", "32", "--test", "32"])
    finally:
        os.chdir(here)
    return folder


def shell_lines():
    """(page, line) of every agglom command in a shell block, joined where it goes on."""
    for page in EVERYWHERE:
        for block in docs_blocks.blocks(page, "bash"):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
                    words = words[1:]
                if words and words[0] == "agglom":
                    yield pytest.param(words[1:], id=f"{page.stem}: {' '.join(words[1:4])}")


@pytest.mark.parametrize("words", shell_lines())
def test_commands_parse(words, tmp_path, monkeypatch):
    """Every command of every page is understood by the parser that would run it."""
    name, *args = words
    assert name in COMMANDS or name.startswith("--")
    monkeypatch.chdir(ROOT)
    if name in ("check", "mmseg", "finetune") or name.startswith("--"):
        for path in args:
            assert not path.startswith("configs/") or (ROOT / path).is_file(), path
        return
    if name == "fit":
        if "my_run.yaml" in args:
            return  # tests/extending runs it
        config, problems = stated(args)
        problems = problems or check_config(config)
        absent = ("data.data", "data.cache", "trainer.default_root_dir", "ckpt_path")
        assert not [line for line in problems if not line.startswith(absent)], problems
        return
    function = getattr(data_commands, args.pop(0)) if name == "data" else getattr(commands, name)
    key = function.__name__.removeprefix("data_")
    assert name != "data" or key in DATA
    command_parser(function, f"agglom {name}").parse_args(_named(key, args))


RUN = [["info", "runs/demo"], ["report", "runs/demo"], ["data", "verify", "data/scenes"], ["info"]]
LIGHT = ("export", "embed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [line for line in shell_lines() if line.values[0] in RUN or line.values[0][0] in LIGHT]
)
def test_light_commands_run(words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    if words[0] == "embed" and "backbone" in words:  # tests come in any order, in several processes
        main(["export", "--ckpt", "runs/demo", "--out", "backbone"])
    for word, package in (("--onnx", "onnxruntime"), ("photos.parquet", "pyarrow")):
        if word in words:
            pytest.importorskip(package)
    main([word for word in words])
    assert capsys.readouterr().out.strip()


PYTHON = [page for page in EVERYWHERE if docs_blocks.blocks(page, "python") and page.stem != "extending"]


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.stem)
def test_python_runs(page, place, monkeypatch):
    """The blocks of a page, one after the other, in one namespace."""
    monkeypatch.chdir(place)
    names = {"__name__": page.stem, "images": torch.rand(2, 3, 64, 64)}
    if page.stem == "export":  # what its commands leave
        main(["export", "--ckpt", "runs/demo", "--out", "backbone"])
        main(["embed", "--model", "backbone", "--data", "data/scenes", "--out", "train.npz"])
    for block in docs_blocks.blocks(page, "python"):
        exec(compile(block.text, f"{page.name}:{block.text[:40]!r}", "exec"), names)
    if page.stem == "python":
        assert {"clip", "dino", "sam"} == set(names["exported"].adaptors)
        assert names["per_image"].shape == (4,) and names["trainer"].global_step == 4
        assert json.loads(Path("probed/report.json").read_text())["models"]["student"]["knn"]
    if page.stem == "export":
        assert [x.shape[1] for x in names["maps"](names["images"])] == [32, 32, 64, 128, 256]
        assert names["classifier"](names["images"]).shape == (2, 10) and names["logits"].shape == (2, 2)
        assert names["sam"].shape[-2:] == (64, 64) and names["vectors"].shape == (96, 256)
        assert set(names["detector"].eval()(list(names["images"]))[0]) == {"boxes", "labels", "scores"}


def merged(base, part):
    """`part` over `base`, mapping by mapping; what has a class_path replaces the other as a whole."""
    if not isinstance(base, dict) or not isinstance(part, dict) or "class_path" in part:
        return part
    return {**base, **{key: merged(base.get(key), value) for key, value in part.items()}}


def yaml_blocks():
    for page in EVERYWHERE:
        if page.stem != "extending":
            for number, block in enumerate(docs_blocks.blocks(page, "yaml")):
                yield pytest.param(block, id=f"{page.stem}-{number}")


@pytest.mark.parametrize("block", yaml_blocks())
def test_yaml_passes_the_check(block):
    """Parts of a configuration, put into the demo's, give no problem but that there is no such data."""
    config, part = read_yaml(ROOT / "configs" / "demo.yaml")[0], numbers(yaml.safe_load(block.text))
    config["data"]["data"] = "nowhere"
    if "stages" in part:
        config["model"]["student"]["init_args"] = {
            "name": "vit_tiny_patch16_224", "kwargs": {"img_size": 64, "depth": 4, "dynamic_img_size": True},
        }  # fmt: skip
        config["model"]["remember_teachers"] = False
        config["trainer"]["accumulate_grad_batches"] = 2
    config = merged(config, copy.deepcopy(part))
    problems = [line for line in check_config(config) if not line.startswith(("data.data", "data.cache"))]
    if any(line.startswith("data.sources") for line in problems):
        problems = [line for line in problems if not line.startswith("data.sources")]
    assert not problems


def test_every_block_has_a_test():
    """Blocks are of a language that a test reads; blocks without one are output or folders."""
    for page in EVERYWHERE:
        for block in docs_blocks.blocks(page):
            assert block.language in ("bash", "python", "yaml", ""), (page.name, block.text)
            if not block.language:
                command = r"^(\w+=\S+ )*(agglom [a-z]+|python|pip|make) "
                assert not re.search(command, block.text, re.MULTILINE), (page.name, block.text)
                continue
            if block.language == "bash":
                lines = [line for line in block.text.splitlines() if line and not line.startswith(("#", " "))]
                words = {re.sub(r"^([A-Z_]+=\S+ )*", "", line).split()[0] for line in lines}
                known = {"agglom", "make", "pip", "python", "torchrun", "srun", "sbatch", "source"}
                assert words <= known, (page.name, words)


def test_scripts_have_the_options_that_pages_give_them():
    seen = []
    for page in EVERYWHERE:
        for block in docs_blocks.blocks(page, "bash"):
            for line in block.text.replace("\\\n", " ").splitlines():
                if found := re.search(r"\bpython ((?:benchmarks|docs)/\w+\.py)(.*)", line):
                    text = (ROOT / found[1]).read_text()
                    options = re.findall(r"(--[\w-]+)", found[2].split("#")[0])
                    seen += options
                    names = [name for name in options if not re.search(rf"\b{name[2:].replace('-', '[-_]')}\b", text)]
                    assert not names, (page.name, line)
    assert "--seeds" in seen


def test_finetunes_options_are_its_own():
    from agglom.completion import tree

    (branches,) = (action.choices for action in tree()._actions if isinstance(action.choices, dict))
    lines = [line.values[0] for line in shell_lines() if line.values[0][0] == "finetune"]
    for words in lines:
        assert {word for word in words if word.startswith("--")} <= set(branches["finetune"]._option_string_actions)
    assert len(lines) > 3


def test_files_that_pages_name_exist():
    for page in PAGES:
        for path in re.findall(r"`((?:tests|benchmarks|docs|configs)/[\w/.-]+\.(?:py|yaml))`", page.read_text()):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"


def test_questions_are_answered_from_threads():
    text = (DOCS / "faq.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(sections) >= 10
    for section in sections:
        assert re.search(r"https://github\.com/[\w-]+/[\w-]+/(issues|pull)/\d+", section), section[:60]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_gallery_says_what_the_header_says(path):
    page = hooks.on_page_markdown((DOCS / "recipes.md").read_text())
    section = re.search(rf"^### {path.stem}$(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL).group(1)
    header = path.read_text().split("\nseed_everything")[0]
    words = [
        word for word in re.sub(r"^# ?(\w+: )?", "", header, flags=re.MULTILINE).split() if not word.startswith("arXiv")
    ]
    said = section.replace("[", "").replace("]", "").split("??? note")[0].split()
    missing = [word for word in words if word not in said and word.strip(".,;:()") not in " ".join(said)]
    assert not missing
    assert f"agglom fit --config configs/recipes/{path.name}" in section
    assert yaml.safe_load(path.read_text())["model"]["student"]["class_path"] in section


@pytest.mark.slow
def test_figure_is_what_the_script_draws():
    figures = load(DOCS / "figures.py")
    assert (DOCS / "data_flow.svg").read_text() == figures.draw(figures.measured())


@pytest.mark.slow
def test_the_report_is_photographed(place, tmp_path):
    figures, page = load(DOCS / "figures.py"), place / "runs" / "demo" / "probes" / "report.html"
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))):
        pytest.skip("no Chromium")
    figures.photograph(page, tmp_path / "report.png")
    taken, kept = Image.open(tmp_path / "report.png").convert("RGB"), Image.open(DOCS / "report.png").convert("RGB")
    assert taken.size == kept.size
    heading = (0, 0, 1040, 70)  # what is the same in every report
    off = np.abs(np.asarray(taken.crop(heading), int) - np.asarray(kept.crop(heading), int))
    assert np.asarray(taken.crop(heading)).min() < 80 and (off > 64).mean() < 0.02


class Links(HTMLParser):
    """Ids, internal targets, and what a page loads from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.targets, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.targets.append(found["href"])
        source = found.get("src") or (found.get("href") if tag == "link" and found.get("rel") != "canonical" else None)
        if source:
            self.loaded.append(source)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    out = tmp_path_factory.mktemp("site")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {path.relative_to(out).as_posix(): Links(path.read_text()) for path in out.rglob("*.html")}


@pytest.mark.slow
def test_site_has_every_page(site):
    assert {f"{page.stem}.html" for page in PAGES} <= set(site)


@pytest.mark.slow
def test_links_inside_the_site_lead_somewhere(site):
    broken = []
    for name, page in site.items():
        if name == "404.html":  # its links are absolute
            continue
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path))) if parts.path else name
            path = {".": "index.html"}.get(path, path)
            if path.endswith(".html") and path not in site:
                broken.append((name, target))
            elif parts.fragment and path in site and unquote(parts.fragment) not in site[path].ids:
                broken.append((name, target))
    assert not broken


@pytest.mark.slow
def test_site_loads_nothing_from_elsewhere(site):
    foreign = {source for page in site.values() for source in page.loaded if urlsplit(source).netloc}
    assert not foreign


@pytest.mark.slow
def test_reference_has_every_public_name(site):
    """What the rooms hand out is on a page of the reference, under the name that one imports."""
    import agglom.adaptors
    import agglom.objectives
    import agglom.probes
    import agglom.selfdistill
    import agglom.targets
    import agglom.teachers

    ids = set().union(*(page.ids for name, page in site.items() if name.startswith("api/")))
    inner = {
        "agglom.probes": {"PROBES", "TEMPLATES", "classifier", "clean", "grid", "read_templates", "retention_table",
                          "splits_of", "weights_hash"},
        "agglom.teachers": {"fingerprint", "compare", "on_meta"},
    }  # fmt: skip
    for room in (
        agglom.adaptors,
        agglom.objectives,
        agglom.targets,
        agglom.selfdistill,
        agglom.teachers,
        agglom.probes,
    ):
        for name in set(room.__all__) - inner.get(room.__name__, set()):
            assert f"{room.__name__}.{name}" in ids, f"{room.__name__}.{name}"


def test_a_wrong_block_would_be_found():
    config = read_yaml(ROOT / "configs" / "demo.yaml")[0]
    assert check_config(merged(config, {"model": {"skip_nonfinit": 3}}))
    with pytest.raises((UserError, SystemExit, Exception)):
        command_parser(commands.export, "agglom export").parse_args(["--ckpt", "x", "--out", "y", "--onx"])


def test_each_page_is_once_in_the_contents():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\nplugins:")[0]
    pages = re.findall(r"[\w/]+\.(?:md|ipynb)", nav)
    assert sorted(pages) == sorted(set(pages))
    assert {name for name in pages if name.endswith(".md")} >= {path.name for path in DOCS.glob("*.md")}
