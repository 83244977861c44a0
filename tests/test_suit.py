"""Networks suited to a device: layouts and attention change, results don't; teachers on a stream of their own."""

from types import SimpleNamespace

import pytest
import torch

from agglom import aside
from agglom.memory import peak_resident
from agglom.students import TimmStudent
from agglom.suit import is_cnn, suit
from agglom.teachers import TimmTeacher

VIT = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}


def teacher(dtype):
    return TimmTeacher(name="vit_tiny_patch16_224", pretrained=False, kwargs=dict(VIT), dtype=dtype)


def test_cnns_get_channels_last_and_say_the_same():
    student = TimmStudent(name="resnet10t", kwargs={"channels": [8, 16, 16, 16], "stem_width": 8}).eval()
    images = torch.rand(2, 3, 64, 64)
    before = student(images)
    suit(student, student, [], torch.device("cuda"))
    weights = [p for p in student.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    torch.testing.assert_close(student(images).spatial, before.spatial, rtol=1e-4, atol=1e-5)


def test_vits_keep_their_layout():
    student = TimmStudent(name="vit_tiny_patch16_224", kwargs=dict(VIT))
    suit(student, student, [], torch.device("cuda"))
    assert not is_cnn(student.backbone) and student.backbone.patch_embed.proj.weight.is_contiguous()
    assert student.backbone.blocks[0].attn.fused_attn


def test_on_a_cpu_attention_is_fused_only_in_fp32_without_gradient():
    student, exact, rough = TimmStudent(name="vit_tiny_patch16_224", kwargs=dict(VIT)), teacher("fp32"), teacher("bf16")
    suit(student, student, [exact, rough], torch.device("cpu"))
    fused = [network.blocks[0].attn.fused_attn for network in (student.backbone, exact.network, rough.network)]
    assert fused == [False, True, False]


def test_the_streams_wait_for_each_other(monkeypatch):
    """No device with streams here: the order of the calls is what is checked."""
    said = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

        def __enter__(self):
            said.append("begin")

        def __exit__(self, *_):
            said.append("end")

    main = Stream("main")
    fake = SimpleNamespace(Stream=lambda device: Stream(), accelerator=SimpleNamespace(current_stream=lambda _: main))
    monkeypatch.setattr(aside, "torch", fake)
    device, both = SimpleNamespace(type="cuda"), aside.Aside()
    for _ in range(2):
        with both.beside(device):
            said.append("teachers")
        said.append("student")
        both.join(device)
    step = ["side waits for main", "begin", "teachers", "end", "student", "main waits for side"]
    assert said == 2 * step
    said.clear()
    plain = aside.Aside()
    with plain.beside(SimpleNamespace(type="cpu")):
        said.append("teachers")
    plain.join(SimpleNamespace(type="cpu"))
    assert said == ["teachers"]


def test_the_peak_of_memory_stays_when_memory_goes():
    before = peak_resident()
    held = torch.ones(16 * 2**20 + before // 4)  # more than all that this process has held
    assert (high := peak_resident()) >= 4 * held.numel() > before
    del held
    assert peak_resident() == pytest.approx(high, rel=1e-3)  # the system counts in its own time
