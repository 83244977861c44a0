"""Pushing an export to a stand-in of the Hugging Face hub, with the real client: what arrives, and refusals."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch

import agglom
from agglom.callbacks import export_module
from agglom.card import model_card
from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.hub import push
from agglom.teachers import manifest

TOKEN = "hf_" + "s3cret" * 5
PUSH = "import sys; from pathlib import Path; from agglom.hub import push; print(push(Path(sys.argv[1]), sys.argv[2]))"


class Hub(BaseHTTPRequestHandler):
    """The calls that an upload makes: make a repository, ask how to send, large files, a commit, the card's check."""

    def log_message(self, *args):
        pass

    def reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        self.server.calls.append(("GET", self.path))
        self.reply({"error": "not there"}, 404)

    def do_PUT(self):
        data = self.body()
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self.reply({})

    def do_POST(self):
        path, raw, server = self.path, self.body(), self.server
        server.calls.append(("POST", path))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            server.made = json.loads(raw)
            self.reply({"url": f"{server.address}/me/{server.made['name'].split('/')[-1]}"})
        elif path == "/api/validate-yaml":
            server.card = json.loads(raw)["content"]
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(raw)["files"]
            ]
            self.reply({"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{server.address}/lfs/{o['oid']}"}}}
                for o in json.loads(raw)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            for line in raw.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    server.files[value["path"]] = server.large[value["oid"]]
            self.reply(
                {"success": True, "commitOid": "1" * 40, "commitUrl": f"{server.address}/me/vit/commit/{'1' * 40}"}
            )
        else:
            self.reply({"error": path}, 404)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.calls, server.files, server.large, server.card, server.made = [], {}, {}, None, None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tiny_student, tiny_teachers, tmp_path):
    torch.manual_seed(0)
    module = Distiller(tiny_student(), tiny_teachers("clip", "sam")).eval()
    return export_module(module, tmp_path / "export", manifest(dict(module.encoders.items())), 32, 7)


def send(folder, name, endpoint, token, one_thread, tmp_path):
    """Push in a process of its own, since the client reads its environment once."""
    away = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path / "home")}
    env = {**one_thread, **away, "HF_ENDPOINT": endpoint}
    env.pop("HF_HUB_OFFLINE", None)
    env.pop("HF_TOKEN", None)
    if token:
        env["HF_TOKEN"] = token
    command = (
        "import sys\nfrom agglom.cli import _complain\nfrom agglom.errors import UserError\n"
        f"try:\n    exec({PUSH!r})\nexcept UserError as err:\n    _complain('export', str(err))"
    )
    return subprocess.run(
        [sys.executable, "-c", command, str(folder), name], env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_what_arrives_is_the_folder(hub, folder, one_thread, tmp_path):
    done = send(folder, "me/vit", hub.address, TOKEN, one_thread, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/me/vit/commit/{'1' * 40}"
    assert hub.made["name"] == "vit" and hub.made["organization"] == "me"
    sent = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.files == sent and "model.safetensors" in sent and len(hub.large) == 2
    assert hub.card == sent["README.md"].decode(), "the client has the hub check the card"
    assert 'timm.create_model("hf-hub:me/vit", pretrained=True)' in hub.card
    assert TOKEN not in done.stdout + done.stderr and not any(TOKEN.encode() in data for data in hub.files.values())
    back = tmp_path / "back"
    back.mkdir()
    for name, data in hub.files.items():
        (back / name).write_bytes(data)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        pixels = (images - 0.5) / 0.5
        features = timm.create_model(f"local-dir:{back}", pretrained=True).eval().forward_features(pixels)
        torch.testing.assert_close(agglom.load(folder)(images).summary, features[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("me/vit", "hf_" + "wrong" * 6, r"the hub refuses the token \(401\)"),
        ("me/vit", None, "no token; valid: one that may write; run `hf auth login`"),
        ("me/vit/x", TOKEN, "valid: USER/NAME"),
    ],
)
def test_refusals_are_one_line(name, token, said, hub, folder, one_thread, tmp_path):
    before = (folder / "README.md").read_bytes()
    done = send(folder, name, hub.address, token, one_thread, tmp_path)
    assert done.returncode == 2 and re.search(said, done.stderr), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("agglom export: push_to_hub: me/vit")
    assert token is None or token not in done.stdout + done.stderr
    assert not hub.files and (folder / "README.md").read_bytes() == before


@pytest.mark.slow
def test_no_hub_is_one_line(folder, one_thread, tmp_path):
    done = send(folder, "me/vit", "http://127.0.0.1:9", TOKEN, one_thread, tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "http://127.0.0.1:9 can't be used" in done.stderr and TOKEN not in done.stderr


def test_errors_lose_what_looks_like_a_token(folder, monkeypatch):
    class Api:
        endpoint = "https://hub"

        def __init__(self, **options):
            pass

        def create_repo(self, *args, **options):
            raise OSError(f"header Authorization: Bearer {TOKEN} and odd-token")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "odd-token")
    with pytest.raises(UserError) as err:
        push(folder, "me/vit")
    assert "s3cret" not in str(err.value) and "odd-token" not in str(err.value) and "Bearer hf_***" in str(err.value)
    assert "snapshot_download" not in model_card(agglom.load(folder).about, {})
