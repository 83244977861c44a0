"""Where commands compute: what `--device` means here, and on a machine with accelerators (a made-up one)."""

import pytest
import torch

from agglom.cli import main
from agglom.devices import choose
from agglom.errors import UserError
from agglom.probing import embed_model, probe_models


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def test_without_an_accelerator(no_gpu):
    assert choose() == choose("cpu") == torch.device("cpu")
    for asked in ("cuda", "cuda:1", "gpu", "cpu:3", "meta", ""):
        with pytest.raises(UserError, match=f"^device: {asked}; valid here: auto, cpu; take one$"):
            choose(asked)


def test_ranks_share_the_accelerators_out(four_gpus, monkeypatch):
    assert choose() == torch.device("cuda", 0) and choose("cpu") == torch.device("cpu")
    assert choose("cuda") == torch.device("cuda") and choose("cuda:3") == torch.device("cuda", 3)
    monkeypatch.setenv("WORLD_SIZE", "8")
    for rank, place in ((1, 1), (3, 3), (4, 0), (6, 2)):
        monkeypatch.setenv("RANK", str(rank))
        assert choose() == torch.device("cuda", place)
    for asked in ("cuda:4", "xpu", "cuda:x"):
        with pytest.raises(UserError, match=f"device: {asked}; valid here: auto, cpu, cuda:0 to cuda:3"):
            choose(asked)


def test_models_go_where_they_are_told(scenes, tmp_path, monkeypatch):
    """Probes follow a model's own device, so that is all there is to do."""
    moved = []
    monkeypatch.setattr("agglom.probing.choose", lambda asked: torch.device("cpu") if asked == "auto" else asked)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, place: moved.append((type(self).__name__, place)) or self)
    embed_model("tiny:clip", str(scenes), str(tmp_path / "x.npz"), split="val", limit=4)
    limits = {"train": 16, "val": 8, "test": 8}
    page = probe_models(
        ["tiny:clip", "tiny:sam"], data=str(scenes), out=tmp_path, probes=["knn"], limits=limits
    )  # fmt: skip
    assert moved == [("TinyTeacher", torch.device("cpu"))] * 3
    assert '"models": [\n    "cpu"\n   ]' in page.with_name("report.json").read_text()


CONFIG = """
model:
  student: {{class_path: agglom.students.TimmStudent, init_args: {{name: resnet10t}}}}
  teachers: {{clip: {{encoder: {{class_path: agglom.teachers.TinyTeacher, init_args: {{name: clip}}}}}}}}
  warmup_steps: 0
data: {{data: {data}, batch_size: 4, size: 64}}
trainer: {{max_steps: 1}}
"""


@pytest.mark.parametrize("command", ["probe", "embed", "cache"])
def test_a_device_that_is_not_there_is_one_line(command, no_gpu, scenes, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(CONFIG.format(data=scenes))
    of_a_model = ["--model", "tiny:clip", "--data", str(scenes)]
    options = ["--config", str(tmp_path / "c.yaml")] if command == "cache" else of_a_model
    with pytest.raises(SystemExit) as stop:
        main([command, *options, "--out", str(tmp_path / "out.npz"), "--device", "cuda"])
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("agglom")]
    assert stop.value.code == 2 and line == f"agglom {command}: device: cuda; valid here: auto, cpu; take one"
