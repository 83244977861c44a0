"""What strangers named, in a real report: nothing of it becomes an element, a link, a table cell or a script."""

import io
import json
import shutil
import tarfile
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from agglom.cli import main

pytestmark = pytest.mark.slow

EVIL = [
    "<script>open('marked')</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "a | b |\n|---|---|",
    "[x](javascript:alert(1)) ![y](https://evil.example/p.png) # `z`",
    "</td></table><h1>&lt;owned",
]


class Page(HTMLParser):
    """Elements, attributes and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.addresses = set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value for name, value in attrs if name in ("src", "href", "data", "action")]


KEY = "<b onclick=x>"  # what keys of samples begin with


def rename(shard):
    """Keys and captions that say what they like."""
    with tarfile.open(shard) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(shard, "w") as tar:
        for n, (name, data) in enumerate(files):
            data = f"{' '.join(EVIL)} {n}".encode() if name.endswith(".txt") else data
            info = tarfile.TarInfo(KEY + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(scenes, tmp_path_factory):
    """Scenes whose index, captions and keys say what they like."""
    root = Path(shutil.copytree(scenes, tmp_path_factory.mktemp("evil") / "<b>data|"))
    for shard in root.glob("*.tar"):
        rename(shard)
    body = json.loads((root / "index.json").read_text())
    for key in ("classes", "seg_classes"):
        body[key] = [f"{EVIL[n % len(EVIL)]} {n}" for n in range(len(body[key]))]
    body["licence"], body["source"], body["language"] = EVIL[0], EVIL[1], EVIL[2]
    (root / "index.json").write_text(json.dumps(body))
    return root


@pytest.fixture(scope="module")
def reports(trained, shards, tmp_path_factory):
    """Two runs with names of the kind, probed on such data, and compared."""
    found = []
    for name in EVIL[:2]:
        run = tmp_path_factory.mktemp("runs") / name.replace("/", "")
        shutil.copytree(trained, run)
        args = ["probe", "--run", str(run), "--data", str(shards), "--size", "32"]
        main([*args, "--probes", "knn,segmentation,retrieval"])
        found.append(run / "probes")
    main(["report", *map(str, found)])
    return found


@pytest.mark.parametrize("name", ["report.html", "comparison.html"])
def test_pages_hold_text_alone(reports, name):
    text = (reports[0] / name).read_text()
    page = Page(text)
    assert not {"script", "iframe", "object", "embed", "form", "base", "link"} & page.tags
    assert not [attribute for attribute in page.attributes if attribute.startswith("on")]
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert text.count("<h1") == 1 and "default-src 'none'" in text and "script-src" not in text
    assert "&lt;script&gt;" in text  # and it is there to be read
    if name == "report.html":  # so are captions and keys
        assert escape(" ".join(EVIL[:2])) in text  # a caption's, for no other has two of them
        assert f"Test image {escape(KEY)}0000" in text


@pytest.mark.parametrize("name", ["report.md", "comparison.md"])
def test_markdown_holds_text_alone(reports, name):
    """Rendered with HTML allowed, as some viewers do."""
    markdown_it = pytest.importorskip("markdown_it")
    text = (reports[0] / name).read_text()
    render = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = [token for block in render.parse(text) for token in (block, *(block.children or ()))]
    assert not [token for token in tokens if token.type.startswith("html_")]
    links = [token.attrs for token in tokens if token.type in ("link_open", "image")]
    assert not [attrs for attrs in links if "evil" in str(attrs) or "javascript" in str(attrs)]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows and "script" in text.lower()


def test_the_search_finds():
    page = Page('<p onclick="x"><a href="https://evil.example">a</a><script>1</script>')
    assert page.tags == {"p", "a", "script"} and "onclick" in page.attributes and page.addresses
