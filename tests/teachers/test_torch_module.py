"""TorchTeacher: how outputs of every kind are sorted, discovered widths and stride, import paths, TorchScript."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from agglom.errors import UserError
from agglom.features import Features
from agglom.teachers import TorchTeacher, from_ref


class Net(nn.Module):
    """Returns what `shape` says of a pooled vector (B, 5) and a stride-8 map (B, 6, h, w)."""

    def __init__(self, shape: str = "pair") -> None:
        super().__init__()
        self.shape, self.conv, self.head = shape, nn.Conv2d(3, 6, 8, stride=8), nn.Linear(6, 5)

    def forward(self, x):
        spatial = self.conv(x)
        summary, tokens = self.head(spatial.mean((2, 3))), spatial.flatten(2).transpose(1, 2)
        return {
            "vector": summary,
            "map": spatial,
            "pair": (summary, spatial),
            "swapped": [spatial, summary],
            "features": Features(summary, spatial),
            "no summary": Features(None, spatial),
            "dict": {"pooled": summary, "maps": spatial},
            "loaded": {"summary": summary, "logits": summary + 1, "spatial": spatial, "early": self.conv(x) + 1},
            "ambiguous": {"a": summary, "b": summary + 1},
            "nhwc": spatial.permute(0, 2, 3, 1),
            "tokens": torch.cat([summary.new_zeros(len(x), 1, 6), tokens], dim=1),
            "nothing": "text",
        }[self.shape]


def make(shape: str = "pair") -> Net:
    return Net(shape)


def number() -> nn.Module:
    return 3


def build(shape: str, **options) -> TorchTeacher:
    torch.manual_seed(0)
    return TorchTeacher(module=Net(shape), mean=(0, 0, 0), std=(1, 1, 1), **options)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def package(monkeypatch):
    """An importable module with a class, a factory and something else."""
    module = types.ModuleType("somebodys_models")
    module.Net, module.make, module.number, module.silent = Net, make, number, lambda: Net()
    monkeypatch.setitem(sys.modules, "somebodys_models", module)


@pytest.mark.parametrize(
    ("shape", "options", "dims"),
    [
        ("vector", {}, (5, None)),
        ("map", {}, (None, 6)),
        ("pair", {}, (5, 6)),
        ("swapped", {}, (5, 6)),
        ("features", {}, (5, 6)),
        ("no summary", {}, (None, 6)),
        ("dict", {}, (5, 6)),
        ("loaded", {}, (5, 6)),
        ("nhwc", {"layout": "NHWC"}, (None, 6)),
        ("tokens", {"layout": "NLC", "prefix_tokens": 1}, (None, 6)),
    ],
)
def test_outputs_are_sorted(shape, options, dims, images):
    teacher, net = build(shape, input_size=32, **options), build("pair").network
    out = teacher(images)
    assert (teacher.summary_dim, teacher.spatial_dim) == dims
    with torch.no_grad():
        summary, spatial = net(images)
    if dims[0]:
        torch.testing.assert_close(out.summary, summary)
    if dims[1]:
        torch.testing.assert_close(out.spatial, spatial)
        assert teacher.input.stride == 8


def test_keys_choose(images):
    by_name, by_index = build("loaded", summary="logits", spatial="early"), build("swapped", summary=1, spatial=0)
    torch.testing.assert_close(by_name(images).summary, build("loaded")(images).summary + 1)
    torch.testing.assert_close(by_name(images).spatial, build("loaded")(images).spatial + 1)
    torch.testing.assert_close(by_index(images), build("pair")(images))


def test_size(images):
    free, fixed = build("pair"), build("pair", input_size=(16, 40))
    assert free.input.size is None and free(images).spatial.shape[-2:] == (4, 4)
    assert fixed(images).spatial.shape[-2:] == (2, 5)


def test_import_path(package, images):
    for path in ("somebodys_models:make", "somebodys_models:Net", "somebodys_models.Net"):
        teacher = TorchTeacher(module=path, kwargs={"shape": "map"})
        assert teacher.source == path and teacher(images).summary is None
    assert from_ref("torch:somebodys_models:make").dims.summary == 5


def test_two_lines_of_config(package, images):
    """Through jsonargparse, as the command line builds it."""
    from jsonargparse import ArgumentParser

    from agglom.teachers import Teacher

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--teacher", type=Teacher)
    config = {
        "class_path": "agglom.teachers.TorchTeacher",
        "init_args": {"module": "somebodys_models:make", "input_size": 32},
    }
    teacher = parser.instantiate_classes(parser.parse_object({"teacher": config})).teacher
    assert teacher(images).spatial.shape == (2, 6, 4, 4)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_file(tmp_path, images):
    torch.manual_seed(0)
    network = nn.Conv2d(3, 6, 8, stride=8).eval()
    path = str(tmp_path / "net.pt")
    torch.jit.trace(network, images).save(path)
    teacher = TorchTeacher(module=path, input_size=32, mean=(0, 0, 0), std=(1, 1, 1), licence="MIT")
    with torch.no_grad():
        torch.testing.assert_close(teacher(images).spatial, network(images))
    assert (teacher.source, teacher.licence) == (path, "MIT")
    with pytest.raises(UserError, match="not possible for TorchScript; set dtype: fp32"):
        TorchTeacher(module=path, dtype="bf16")


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ("ambiguous", {}, r"could be the summary: \['a', 'b'\]; set summary: KEY"),
        ("dict", {"summary": "pooed"}, "summary 'pooed' is no tensor of 2 dimensions; valid: .*pooled"),
        ("nothing", {}, r"returns str; a summary is \(B, D\), a map NCHW of 4"),
        ("tokens", {"layout": "NLC"}, "785 tokens are no square map; set prefix_tokens"),
        ("pair", {"input_size": 33}, r"\(33, 33\) pixels give a \(4, 4\) map, no whole stride"),
        ("pair", {"input_size": 4}, "can't run at .* set input_size"),
    ],
)
def test_outputs_that_cannot_be_sorted(shape, options, message):
    with pytest.raises(UserError, match=message):
        build(shape, **options)


@pytest.mark.parametrize(
    ("module", "kwargs", "message"),
    [
        ("nowhere.models:make", {}, "no such file or import .*nowhere.*valid: package.module:factory"),
        ("somebodys_models:mak", {}, "no such file or import .*mak"),
        ("somebodys_models:number", {}, "gives a int; it must give a torch.nn.Module"),
        ("somebodys_models:make", {"depth": 3}, "failed: .*depth"),
        ("somebodys_models:silent", {}, "no function that says it returns one; annotate it -> nn.Module"),
        ("somebodys_models:torch", {}, "no such file or import"),
        ("weights.pt", {}, "no such file or import"),
        ("os:system", {"command": "touch evil"}, "not to be named by a configuration"),
        ("torch.hub:load", {"repo_or_dir": "x", "model": "y"}, "not to be named by a configuration"),
        ("numpy:array", {"object": 1}, "no class of modules"),
    ],
)
def test_modules_that_cannot_be_had(package, module, kwargs, message):
    with pytest.raises(UserError, match=message) as caught:
        TorchTeacher(module=module, kwargs=kwargs)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_torchscript(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "state.pt")
    with pytest.raises(UserError, match="not a TorchScript file"):
        TorchTeacher(module=str(tmp_path / "state.pt"))
