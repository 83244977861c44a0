"""Which addresses are opened: schemes, commands only where they are enabled, and what an index may call a shard."""

import json

import pytest
from broken import FIELDS, change, folder, key, path
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.cache.layout import CacheIndex
from agglom.cli import main
from agglom.data import eval_stream, read_index
from agglom.data.addresses import ALLOW_PIPE, SCHEMES, join, open_read, refuse_address, refuse_listed
from agglom.data.verify import verify
from agglom.errors import UserError

OTHERS = [
    "ftp://host/x",
    "ssh://host/x",
    "sftp://host/x",
    "local:///etc/passwd",
    "FILE:///etc/passwd",
    "github://a:b@c/x",
    "data://x",
    "memory://x",
    "simplecache::https://host/x",
    "zip://x.tar::https://host/a.zip",
    "reference://x",
    "://x",
    "s3 ://x",
]


@pytest.mark.parametrize("address", OTHERS)
def test_other_schemes_are_refused_with_the_valid_ones(address):
    for read in (open_read, read_index):
        with pytest.raises(UserError) as err:
            read(address)
        assert all(f"{scheme}://" in str(err.value) for scheme in SCHEMES) and "\n" not in str(err.value)


@pytest.mark.parametrize("command", ["data verify", "probe", "check", "fit"])
def test_commands_run_nothing_unless_they_are_enabled(tmp_path, monkeypatch, capfd, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ALLOW_PIPE, raising=False)
    pipe = "pipe:touch marked; cat {}"
    (tmp_path / "c.yaml").write_text(f"model: {{student: null, teachers: {{}}}}\ndata: {{data: '{pipe}'}}\n")
    args = {
        "data verify": ["data", "verify", pipe],
        "probe": ["probe", "--model", "tiny:clip", "--data", pipe, "--out", "out"],
        "check": ["check", "c.yaml"],
        "fit": ["fit", "--config", "c.yaml"],
    }[command]
    with pytest.raises(SystemExit) as stop:
        main(args)
    out, err = capfd.readouterr()
    lines = [line for line in (out + err).splitlines() if "marked" in line]
    assert stop.value.code == 2 and f"set {ALLOW_PIPE}=1" in lines[0] and "Traceback" not in err
    assert not (tmp_path / "marked").exists()


@pytest.mark.parametrize("value", ["0", "true", "yes", ""])
def test_only_one_enables_commands(monkeypatch, value):
    monkeypatch.setenv(ALLOW_PIPE, value)
    with pytest.raises(UserError, match=ALLOW_PIPE):
        refuse_address("pipe:cat {}")
    monkeypatch.setenv(ALLOW_PIPE, "1")
    refuse_address("pipe:cat {}")


SMUGGLED = [
    "pipe:touch marked",
    "/etc/passwd",
    "../outside.tar",
    "a/../../outside.tar",
    "..",
    "file:///etc/passwd",
    "local:///etc/passwd",
    "memory://x.tar",
    "simplecache::s3://a/b.tar",
    "ftp://host/x.tar",
    "a\nb",
    "a\0b",
    "",
]


@pytest.mark.parametrize("file", SMUGGLED)
def test_an_index_names_nothing_elsewhere(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    root = folder(tmp_path / "data", shards=1)
    (tmp_path / "outside.tar").write_bytes(path(root, 0).read_bytes())
    body = json.loads((root / "index.json").read_text())
    body["splits"]["train"]["shards"][0]["file"] = file
    (root / "index.json").write_text(json.dumps(body))
    for check in (True, False):
        with pytest.raises(UserError) as err:
            read_index(root, check_files=check)
        assert str(err.value).startswith(str(root / "index.json")) and str(err.value).isprintable()
    with pytest.raises(UserError):
        verify(root, workers=1)
    assert not (tmp_path / "marked").exists()


@pytest.mark.parametrize(
    "file", ["x; touch marked; .tar", "$(touch marked).tar", "`touch marked`.tar", "a b.tar", "x'.tar"]
)
def test_a_name_is_no_command_under_a_pipe(tmp_path, monkeypatch, other_addresses, file):
    monkeypatch.chdir(tmp_path)
    root = folder(tmp_path / "data", shards=1)
    path(root, 0).rename(root / file)
    body = json.loads((root / "index.json").read_text())
    body["splits"]["train"]["shards"][0]["file"] = file
    (root / "index.json").write_text(json.dumps(body))
    assert len(list(eval_stream(root, "train", fields=FIELDS))) == 5  # a fine name for a file
    for template in ("pipe:cat {}/{{}}", 'pipe:cat "{}/{{}}"'):
        with pytest.raises(UserError, match="valid in a command"):
            read_index(template.format(root))
    assert not (tmp_path / "marked").exists()


def test_an_index_may_name_folders_and_addresses(tmp_path):
    for file in ("a/b/c.tar", "a..b.tar", "https://host/x.tar", "s3://b/d.tar", "..a.tar"):
        refuse_listed(file, "")
    assert join("https://host/d/", "a.tar") == "https://host/d/a.tar"
    assert join("/d", "https://host/x.tar") == "https://host/x.tar"
    assert join("file:///d", "a.tar") == "/d/a.tar"


def test_an_index_of_many_bytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("agglom.data.index.MAX_BYTES", 1000)
    root = folder(tmp_path, shards=1)
    (root / "index.json").write_text((root / "index.json").read_text() + " " * 1000)
    with pytest.raises(UserError, match="more than 1000 bytes"):
        read_index(root)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text(alphabet="ab./:\\ ~$;'\"{}pie\n\0" + "\u202e", max_size=12) | st.sampled_from(SMUGGLED))
def test_whatever_an_index_may_name_stays_inside(tmp_path_factory, file):
    root = str(tmp_path_factory.getbasetemp())
    try:
        refuse_listed(file, root)
    except ValueError as err:
        assert "valid" in str(err) and "\n" not in str(err)
        return
    import os

    where = join(root, file)
    assert "://" in where or os.path.normpath(where).startswith(root)
    features = CacheIndex(root, 1, {}, 1, "fp32", 1, 0, (1, 1), {}, {}).path(file)
    assert str(features.parent) == root and "/" not in features.name


def test_a_cleaned_folder_names_its_own(tmp_path):
    """Links where a shard is whole, on this disk or on another one."""
    root = folder(tmp_path / "data", shards=3)
    change(root, 1, "txt", b"\xff")
    verify(root, workers=1, clean=tmp_path / "clean")
    assert [shard.file for shard in read_index(tmp_path / "clean").shards("train")] == [
        f"train-{n:06d}.tar" for n in range(3)
    ]
    assert len(list(eval_stream(tmp_path / "clean", "train", fields=FIELDS))) == 14


def test_links_on_another_disk(tmp_path, monkeypatch):
    def another(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", another)
    root = folder(tmp_path / "data", shards=2)
    verify(root, workers=1, clean=tmp_path / "clean")
    assert (tmp_path / "clean" / path(root, 0).name).is_symlink()
    assert key(1) in {sample["key"] for sample in eval_stream(tmp_path / "clean", "train", fields=FIELDS)}
