"""The report in headless Chromium: no console errors, no request, axe-core finds nothing serious, it fits and prints.

In light and dark, on a phone and on a desk. Without a Chromium all of it is skipped; without axe-core that check is.
"""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from agglom.probes import write_comparison, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]
SECTIONS = (
    "retention", "glance", "scores", "adaptors", "mode-switching", "training", "maps", "neighbours", "examples",
    "masks", "boxes", "skipped", "protocol",
)  # fmt: skip


class Browser:
    """Chromium over its DevTools pipe: JSON messages that end with a NUL byte."""

    def __init__(self, folder: Path) -> None:
        read, theirs_out = os.pipe()
        theirs_in, self._write = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
        pipe = f"--remote-debugging-pipe 3<&{theirs_in} 4>&{theirs_out}"  # these two numbers are Chromium's own
        line = f'exec "{CHROMIUM}" {flags} "--user-data-dir={folder}" about:blank {pipe}'
        self._process = subprocess.Popen(
            ["bash", "-c", line], pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in), os.close(theirs_out)
        self._read = os.fdopen(read, "rb", buffering=0)
        self._rest, self._numbers, self._session = b"", itertools.count(1), ""
        self.events: list[dict] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params) -> dict:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            got = self._read.read(1 << 20)
            assert got, "Chromium is gone"
            self._rest += got
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def show(self, page: Path, *, width: int, dark: bool = False, height: int = 900) -> None:
        """Load a file in a window of this width, in this colour scheme."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self("Emulation.setEmulatedMedia", media="", features=scheme)
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.events.clear()
        self("Page.navigate", url=page.resolve().as_uri())
        until = time.monotonic() + 60
        while self.run("document.readyState + location.href") != f"complete{page.resolve().as_uri()}":
            assert time.monotonic() < until
            time.sleep(0.05)

    def run(self, script: str):
        """The value of a script, awaited."""
        found = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, place: Path, *, whole: bool = True) -> None:
        """A PNG of the page, or of what the window shows."""
        data = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        place.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """Console messages, errors, and requests for anything but the page and what it holds."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(json.dumps(params)[:300])
            if event["method"] == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("data:", "file:")):
                    found.append(url)
        return found

    def close(self) -> None:
        self._session = ""
        os.write(self._write, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        self._process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report with everything in it, and a comparison."""
    root = tmp_path_factory.mktemp("run")
    for name in ("a", "b"):
        write_run(root / name, np.random.default_rng(len(name)))
    return write_report(root / "a"), write_comparison([root / "a", root / "b"], root / "c")


def write_run(run: Path, rng: np.random.Generator) -> None:
    """A made-up report.json with pictures, metrics and a recipe: every section has something to show."""
    from agglom.probes import pictures

    (run / "probes").mkdir(parents=True)
    teachers, bounded = ["clip", "dino"], ("knn", "linear", "segmentation", "detection")
    models = ["student", *teachers, "random"]
    through = {f"student > {t}": {"model": "student", "adaptor": t} for t in teachers}
    metric = dict.fromkeys(bounded, "top1") | {"segmentation": "miou", "detection": "ap", "zeroshot": "top1"}

    def numbers(*names):
        return {name: float(rng.uniform(0.2, 0.9)) for name in names}

    scores = {n: {p: numbers(metric[p]) for p in bounded} for n in models}
    for name in models:
        scores[name]["geometry"] = numbers("rankme", "shift_error")
    scores |= {n: {"knn": numbers("top1"), "fidelity": numbers("summary_cosine", "spatial_mse")} for n in through}
    for name in ("student", "clip"):
        scores[name]["zeroshot"] = numbers("top1", "top5")
    spread = {
        n: {p: {m: [v - 0.05, v + 0.05] for m, v in by.items()} for p, by in of.items()} for n, of in scores.items()
    }
    shares = {t: float(rng.uniform(0.7, 1.2)) for t in teachers}
    protocol = {
        p: {"metric": m, "bounded": p != "geometry", "fields": [], "models": {
            n: {"features": "summary", "chosen": {"k": 10}, "grid": {"k": [10, 20]}, "chance": 0.1}
            for n in scores if p in scores[n]
        }}
        for p, m in {**metric, "geometry": "rankme", "fidelity": "summary_cosine"}.items()
    }  # fmt: skip
    near = [{"picture": i, "key": f"t{i}", "label": ["bag"], "cosine": 0.9} for i in range(4)]
    box = [1.0, 2.0, 9.0, 12.0]
    example = {
        "key": "00001", "caption": "a red bag <b>", "label": ["bag"],
        "zeroshot": {"student": [["bag", 0.4], ["coat", 0.2]]}, "retrieval": {"student": [["a bag", 0.3]]},
        "neighbours": {n: near for n in ("student", *teachers)},
        "boxes": {"detection": {"student": {"size": [12, 16], "truth": [[box, 1, 0]], "found": [[box, 1, 0.7]]}}},
    }  # fmt: skip
    report = {
        "schema_version": 1, "student": "student", "teachers": teachers, "random": "random", "models": scores,
        "ci": spread, "through": through, "retention_mean": 0.93,
        "series": {n: {"fidelity": {"mode_switching": [[32, 0.5], [64, 0.3], [96, 0.6]]}} for n in through},
        "retention": {
            p: {"value": 0.93, "ci": [0.9, 0.96], "metric": metric[p], "student": 0.5, "best_teacher": 0.54,
                "best_teacher_name": "clip", "teachers": shares, "teachers_ci": {t: [0.8, 1.1] for t in teachers}}
            for p in bounded
        },
        "skipped": [{"probe": "zeroshot", "model": "dino", "reason": "it has no text tower"}],
        "protocol": protocol, "examples": [example, {**example, "caption": None, "label": None}],
        "data": {"path": "data", "hash": "ab12", "source": "made up", "licence": "MIT", "size": None, "limits": {},
                 "splits": {r: {"split": r, "rows": "all", "count": 9, "unreadable": 0} for r in ("train", "test")},
                 "classes": ["coat", "bag"], "seg_classes": ["background", "bag"]},
        "provenance": {
            "models": {
                n: {"role": n if n in ("student", "random") else "teacher", "parameters": 9, "fingerprint": "00ff",
                    "input": {"size": [16, 16], "stride": 4, "mean": [0.5] * 3, "std": [0.2] * 3}}
                for n in models
            },
            "seed": 0, "bootstrap": {"resamples": 1000, "level": 0.95, "over": "test images"},
            "versions": {"torch": "2"}, "device": {"cpu_threads": 1},
        },
        "seconds": {"extraction": 1.0, "probes": {"knn": {"student": 0.1}}, "total": 2.0},
    }  # fmt: skip
    (run / "probes" / "report.json").write_text(json.dumps(report))
    images = rng.integers(0, 255, (2, 16, 16, 3)).astype(np.uint8)
    masks = rng.integers(0, 2, (2, 16, 16)).astype(np.uint8)
    pictures.save(
        run / "probes",
        {"images/test": images, "photos/0": images[0, :12], "photos/1": images[1, :12], "masks/truth": masks}
        | {f"pca/{n}": images for n in (*models, *through)} | {f"masks:segmentation/{n}": masks for n in models}
        | {"neighbours/train": np.concatenate([images, images])},
    )  # fmt: skip
    rows = [f"{s},{2 / (1 + s)},{1 / (1 + s)},{0.5},{0.1 * s}" for s in range(30)]
    (run / "metrics.csv").write_text("\n".join(["step,train/loss,train/clip/loss,val/clip/loss,lr", *rows]))
    (run / "config.yaml").write_text(f"model: {{lr: {rng.uniform():.3f}}}\n")


VIEWS = [(width, dark) for width in (360, 1280) for dark in (False, True)]


@pytest.mark.parametrize("width,dark", VIEWS)
def test_every_section_shows_without_a_complaint(browser, pages, width, dark):
    for page in pages:
        browser.show(page, width=width, dark=dark)
        assert browser.complaints() == []
        assert browser.run("document.documentElement.scrollWidth") <= width  # tables scroll inside
        broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        assert browser.run(broken) == 0
        backdrop = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (backdrop == "rgb(255, 255, 255)") != dark
    browser.show(pages[0], width=width, dark=dark)
    heights = browser.run(
        "Object.fromEntries([...document.querySelectorAll('section')].map("
        "s => [s.querySelector('h2').id, s.getBoundingClientRect().height]))"
    )
    assert tuple(heights) == SECTIONS and all(height > 60 for height in heights.values())
    links = browser.run("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
    assert tuple(links) == SECTIONS


@pytest.mark.parametrize("width,dark", VIEWS)
def test_axe_finds_nothing_serious(browser, pages, width, dark):
    package = importlib.util.find_spec("axe_playwright_python")
    if package is None or not package.origin:
        pytest.skip("no axe-core: pip install --no-deps axe-playwright-python, which carries it")
    axe = Path(package.origin).with_name("axe.min.js").read_text()
    for page in pages:
        browser.show(page, width=width, dark=dark)
        browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        browser.run(axe + ";0")
        found = browser.run("axe.run().then(r => ({bad: r.violations, good: r.passes.map(p => p.id)}))")
        assert "color-contrast" in found["good"]  # it did look
        bad = [(v["id"], v["nodes"][0]["html"][:200]) for v in found["bad"] if v["impact"] in ("serious", "critical")]
        assert bad == []


def test_boxes_lie_where_they_should(browser, pages):
    """The box of the made-up report goes from (1, 2) to (9, 12) on an image 16 pixels wide and 12 high."""
    browser.show(pages[0], width=800)
    image, box = browser.run(
        "['.boxes .frame img', '.boxes .frame rect'].map(s => document.querySelector(s).getBoundingClientRect())"
        ".map(r => [r.left, r.top, r.width, r.height])"
    )
    left, top, width, height = image
    expected = [left + width / 16, top + 2 * height / 12, width * 8 / 16, height * 10 / 12]
    np.testing.assert_allclose(box, expected, atol=3)


def test_it_prints(browser, pages):
    browser.show(pages[0], width=1280, dark=True)
    pdf = base64.b64decode(browser("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") >= 2
    browser("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
