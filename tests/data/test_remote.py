"""Remote reads against a server on this machine that fails, hangs, breaks off or lies: retried, timed out, counted."""

import itertools
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from broken import COUNT, FIELDS, folder, path

from agglom.data import eval_stream, read_index, train_stream
from agglom.data import remote as module
from agglom.data.addresses import open_read
from agglom.data.remote import RemoteFile
from agglom.data.verify import verify
from agglom.errors import UserError


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.plans` says, for each request of a file, what goes wrong with it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.lstrip("/")
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.server.asked.append((name, start))
        plan = self.server.plans.get(name, [])
        what = plan.pop(0) if plan else "well"
        if isinstance(what, int):
            self.send_response(what)
            self.send_header("Content-Length", "0")
            if what in (301, 302):
                self.send_header("Location", self.server.elsewhere)
            self.end_headers()
            return
        if what == "hang":
            self.server.stop.wait(30)
            return
        data = self.server.files.get(name)
        if data is None:
            self.send_error(404)
            return
        if what == "other":
            data = data + b"more"
        ranged = start > 0 and not self.server.rangeless
        body = data[start:] if ranged else data
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if isinstance(what, float):  # so much of the rest arrives
            body = body[: int(len(body) * what)]
            self.wfile.write(body)
            self.close_connection = True
            return
        if what == "stall":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.stop.wait(30)
            return
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Its address, with pauses and time limits of a hundredth."""
    monkeypatch.setattr(module, "WAITS_S", (0.01, 0.02, 0.04))
    monkeypatch.setattr(module, "TIMEOUT_S", 0.3)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.files, http.plans, http.asked, http.rangeless, http.stop = {}, {}, [], False, threading.Event()
    http.elsewhere = "file:///etc/passwd"
    http.address = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    http.stop.set()
    http.shutdown()
    http.server_close()


DATA = bytes(range(256)) * 2000


def read(server, plan, data=DATA):
    server.files["x"], server.plans["x"] = data, plan
    with open_read(f"{server.address}/x") as stream:
        return stream.read()


@pytest.mark.parametrize("rangeless", [False, True])
@pytest.mark.parametrize(
    "plan",
    [[], [503], [500, 502, 503], [429], ["hang"], [0.5], [0.3, 0.3, 0.3], ["stall"], [0.0], [0.5, 503, "hang"]],
    ids=str,
)
def test_what_passes_is_read_as_it_is(server, rangeless, plan):
    server.rangeless = rangeless
    assert read(server, list(plan)) == DATA
    assert len(server.asked) == len(plan) + 1


def test_a_break_goes_on_where_it_was(server):
    assert read(server, [0.5]) == DATA
    assert server.asked == [("x", 0), ("x", len(DATA) // 2)]


def test_four_tries_and_no_more(server, caplog):
    with caplog.at_level(logging.WARNING, "agglom.data"), pytest.raises(OSError, match="no more after 4 tries.*503"):
        read(server, [503] * 10)
    assert len(server.asked) == 4
    assert [message.rpartition("trying again in ")[2] for message in caplog.messages] == ["0.01 s", "0.02 s", "0.04 s"]


def test_the_stated_numbers():
    """The documentation's."""
    assert (module.WAITS_S, module.TIMEOUT_S, module.PROGRESS) == ((1.0, 2.0, 4.0), 30.0, 1 << 20)


def test_a_server_that_hangs_ends_in_time(server):
    started = time.monotonic()
    with pytest.raises(OSError, match="no more after 4 tries"):
        read(server, ["hang"] * 10)
    assert time.monotonic() - started < 10


def test_nobody_there(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="no more after 4 tries"):
        RemoteFile(f"{server.address}/x")


def test_progress_earns_new_tries(server):
    data = DATA * 40  # 20 MB, a fifth of the rest at a time
    assert read(server, [0.2] * 8, data) == data
    with pytest.raises(OSError, match="no more"):
        read(server, [0.2] * 10)  # of half a megabyte


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, FileNotFoundError), (410, FileNotFoundError), (403, PermissionError), (401, PermissionError)],
)
def test_what_trying_again_does_not_change(server, status, kind):
    with pytest.raises(kind):
        read(server, [status] * 4)
    assert len(server.asked) == 1


def test_another_file_meanwhile_is_never_joined_to_the_first(server):
    with pytest.raises(ValueError, match="another file"):
        read(server, [0.5, "other"])


@pytest.mark.parametrize("elsewhere", ["file:///etc/passwd", "ftp://host/x", "data:,x"])
def test_no_redirect_leaves_http(server, elsewhere):
    server.elsewhere = elsewhere
    with pytest.raises(OSError):
        read(server, [302] * 4)


def test_a_redirect_is_followed(server):
    server.files["y"], server.elsewhere = DATA, f"{server.address}/y"
    assert read(server, [302]) == DATA


# ------------------------------------------------------------------------------------------------ shards


@pytest.fixture
def shards(server, tmp_path):
    root = folder(tmp_path, shards=3)
    server.files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    server.names = [path(root, n).name for n in range(3)]
    return server


def test_a_stream_through_troubles_is_the_stream_without(shards):
    want = {sample["key"] for sample in eval_stream(shards.address, "train", fields=FIELDS)}
    shards.plans = {"index.json": [503], **{name: [0.6, "hang", 0.1] for name in shards.names}}
    stream = eval_stream(shards.address, "train", fields=FIELDS, max_bad_fraction=0)
    assert {sample["key"] for sample in stream} == want and stream.bad == 0 and len(want) == 3 * COUNT


@pytest.mark.parametrize(
    ("plan", "kind", "lost"),
    [
        ([503] * 99, "unreadable shard", (COUNT,)),
        (["hang"] * 99, "unreadable shard", (COUNT,)),
        ([404] * 99, "missing shard", (COUNT,)),
        ([0.5, *[503] * 99], "unreadable shard", (2, 3, 4)),  # some samples came whole
    ],
    ids=["errors", "silence", "missing", "half of it"],
)
def test_a_shard_that_stays_away_is_counted(shards, plan, kind, lost):
    shards.plans[shards.names[1]] = list(plan)
    stream = eval_stream(shards.address, "train", fields=FIELDS, max_bad_fraction=0.9)
    taken = [sample["key"] for sample in stream]
    assert stream.bad_kinds == {kind: stream.bad} and stream.bad in lost and len(taken) == 3 * COUNT - stream.bad
    shards.plans[shards.names[1]] = list(plan)
    endless = train_stream(shards.address, "train", fields=FIELDS, max_bad_fraction=0.9, shuffle=1)
    list(itertools.islice(endless, 3 * COUNT))
    assert endless.bad_kinds == {kind: endless.bad} and endless.bad >= min(lost)


def test_verify_says_it(shards):
    shards.plans[shards.names[1]] = [404]
    assert [(f.shard, f.kind) for f in verify(shards.address, workers=1).findings] == [
        (shards.names[1], "missing shard")
    ]


def test_an_index_that_stays_away_is_one_line(shards):
    shards.plans["index.json"] = [503] * 99
    with pytest.raises(UserError, match="index.json: can't be read .*no more after 4 tries"):
        read_index(shards.address)
    shards.plans["index.json"] = [404]
    with pytest.raises(UserError, match="not a shard folder"):
        read_index(shards.address)
