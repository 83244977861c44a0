"""The frozen contract, over every teacher class with a small random network.

Shapes; frozen whatever is called on a parent; absent from a parent's parameters and checkpoint; bytes unchanged by
training; own resize and normalisation; bf16 with fp32 norms; independent of the caller's autocast, of the batch and of
a parent's dtype; copies; no gradient to the images.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any, Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglom.features import Features
from agglom.teachers import OpenClipTeacher, SamTeacher, Teacher, TimmTeacher, TorchTeacher, fingerprint
from agglom.teachers.precision import PRODUCTS, is_norm

VIT: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SAM: dict[str, Any] = {**VIT, "neck_chans": 16, "window_size": 3, "img_size": 64, "global_attn_indexes": (1,)}
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4, "img_size": 64}
random_timm = partial(TimmTeacher, pretrained=False)
random_clip = partial(OpenClipTeacher, pretrained=False)


class Pair(nn.Module):
    """A user's network: a pooled vector and a map, with a norm inside."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, stride=8)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spatial = self.norm(self.stem(x))
        return self.head(spatial.mean((2, 3))), spatial


def tiny(**options: Any) -> Teacher:
    from agglom.teachers import TinyTeacher

    return TinyTeacher(pretrained=False, **options)


CASES: dict[str, Callable[..., Teacher]] = {
    "vit": partial(random_timm, name="vit_tiny_patch16_224", kwargs=VIT, input_size=32),
    "vit_any": partial(random_timm, name="vit_tiny_patch16_224", kwargs=VIT, input_size="any"),
    "dinov2": partial(random_timm, name="vit_small_patch14_reg4_dinov2", kwargs=VIT, input_size=(28, 42)),
    "dinov3": partial(random_timm, name="vit_small_patch16_dinov3", kwargs=VIT, input_size=48),
    "siglip": partial(random_timm, name="vit_base_patch16_siglip_224", kwargs=VIT, input_size=32),
    "cnn": partial(random_timm, name="test_resnet", input_size="any"),
    "swin": partial(random_timm, name="swin_tiny_patch4_window7_224", kwargs=SWIN),
    "sam": partial(SamTeacher, pretrained=False, kwargs=SAM, input_size=(64, 80)),
    "open_clip": partial(random_clip, name="agglom-vit"),
    "open_clip_siglip": partial(random_clip, name="agglom-siglip", input_size=64),
    "open_clip_resnet": partial(random_clip, name="agglom-rn"),
    "torch": lambda **kw: TorchTeacher(module=Pair(), input_size=32, **kw),
    "tiny_clip": lambda **kw: tiny(name="clip", **kw),
    "tiny_dino": lambda **kw: tiny(name="dino", **kw),
    "tiny_sam": lambda **kw: tiny(name="sam", **kw),
    "torchscript": lambda **kw: TorchTeacher(module=torch.jit.script(Pair()), input_size=32, **kw),
}


STAGES = {"cnn", "swin", "open_clip_resnet"}  # several grids
SILENT = {"torch", "torchscript"}  # can't tell their blocks


def build(case: str, **options: Any) -> Teacher:
    torch.manual_seed(0)
    teacher = CASES[case](**options)
    generator = torch.Generator().manual_seed(1)
    for _, tensor in teacher.tensors():  # fresh layer scales and position tables are 0: give every tensor a say
        if tensor.is_floating_point() and tensor.std(correction=0) == 0 and (tensor == 0).all():
            tensor.normal_(0, 0.02, generator=generator)
    return teacher


@pytest.fixture(params=list(CASES))
def case(request, small_open_clip) -> str:
    return request.param


@pytest.fixture
def teacher(case) -> Teacher:
    return build(case)


def images(batch: int = 2, size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(2))


def same(a: Features, b: Features, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            torch.testing.assert_close(x, y, **tolerance)


def parent_of(teacher: Teacher) -> nn.Module:
    return nn.ModuleDict({"teacher": teacher, "student": nn.Linear(4, 4)})


def test_shapes_are_the_declared_ones(teacher):
    out = teacher(images())
    assert (out.summary is None) == (teacher.summary_dim is None)
    if out.summary is not None:
        assert out.summary.shape == (2, teacher.summary_dim)
    assert out.spatial.shape == (2, teacher.spatial_dim, *teacher.input.grid((64, 64)))
    assert all(x is None or (x.dtype == torch.float32 and x.isfinite().all()) for x in out)
    assert teacher.dims.summary == teacher.summary_dim and teacher.dims.spatial == teacher.spatial_dim


def test_stays_frozen_whatever_a_parent_is_told(teacher):
    parent, before = parent_of(teacher), fingerprint(teacher)
    parent.train()
    parent.requires_grad_(True)
    parent.apply(lambda module: [nn.init.ones_(p) for p in module.parameters(recurse=False)])
    teacher.train(True).requires_grad_(True)
    assert not teacher.training
    assert all(not module.training for network in teacher.networks.values() for module in network.modules())
    assert all(not tensor.requires_grad for _, tensor in teacher.tensors())
    assert sum(1 for _ in teacher.tensors()) > 3
    assert fingerprint(teacher) == before


def test_a_parent_neither_trains_nor_saves_it(teacher):
    parent = parent_of(teacher)
    names = ["student.weight", "student.bias"]
    assert [name for name, _ in parent.named_parameters()] == names
    assert not list(parent.buffers())
    assert list(parent.state_dict()) == names
    parent.load_state_dict({"student.weight": torch.zeros(4, 4), "student.bias": torch.zeros(4)}, strict=True)
    assert not teacher.state_dict()


def test_bytes_survive_the_training_of_a_parent(teacher):
    before, target = fingerprint(teacher), teacher(images()).spatial
    parent = nn.Module()
    parent.teacher, parent.student = teacher, nn.Conv2d(3, teacher.spatial_dim, 1)
    parent.train()
    optimiser = torch.optim.AdamW(parent.parameters(), lr=1.0, weight_decay=0.5)
    for _ in range(2):
        spatial = parent.teacher(images()).spatial
        loss = F.mse_loss(F.adaptive_avg_pool2d(parent.student(images()), spatial.shape[-2:]), spatial)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert fingerprint(teacher) == before
    torch.testing.assert_close(teacher(images()).spatial, target, rtol=0, atol=0)


def test_resizes_and_normalises_itself(teacher):
    """Against `encode` on pixels resized and normalised by hand."""
    given, spec = images(size=(80, 80) if teacher.input.size else (64, 64)), teacher.input
    pixels = given
    if spec.size is not None:
        pixels = F.interpolate(given, spec.size, mode=spec.interpolation, antialias=True).clamp(0, 1)
    pixels = torch.stack([(pixels[:, c] - spec.mean[c]) / spec.std[c] for c in range(3)], dim=1)
    with torch.no_grad():
        expected = teacher.encode(pixels)
    same(teacher(given), Features(*expected), rtol=1e-5, atol=1e-5)


def test_no_gradient_reaches_the_images(teacher):
    given = images().requires_grad_(True)
    out = teacher(given)
    assert all(x is None or (not x.requires_grad and not x.is_inference()) for x in out)
    weight = torch.ones(1, requires_grad=True)
    (out.spatial * weight).sum().backward()  # a target may be saved for backward
    assert given.grad is None and weight.grad is not None


def test_same_input_same_answer_in_any_batch(teacher):
    given = images(3)
    whole = teacher(given)
    same(teacher(given), whole)
    alone = teacher(given[1:2])
    same(alone, Features(*(None if x is None else x[1:2] for x in whole)), rtol=1e-4, atol=1e-5)
    assert whole.spatial[0].ne(whole.spatial[1]).any()


def test_ignores_the_precision_of_its_surroundings(teacher):
    plain = teacher(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(teacher(images()), plain)
    same(teacher(images().double()), teacher(images().double().float()))
    parent_of(teacher).to(torch.bfloat16)
    same(teacher(images()), plain)


def test_moves_with_a_parent(teacher):
    if any(isinstance(network, torch.jit.ScriptModule) for network in teacher.networks.values()):
        pytest.skip("TorchScript has no meta tensors; .to(device) goes the same way")
    parent_of(teacher).to("meta")
    assert teacher.device.type == "meta"
    assert all(tensor.device.type == "meta" for _, tensor in teacher.tensors())


def test_copies_are_equal_and_independent(teacher):
    before = fingerprint(teacher)
    twin = copy.deepcopy(parent_of(teacher))["teacher"]
    same(twin(images()), teacher(images()))
    for _, tensor in twin.tensors():
        tensor.zero_()
    assert fingerprint(teacher) == before != fingerprint(twin)


def test_bf16_keeps_norms_in_fp32(case):
    if case == "torchscript":
        pytest.skip("TorchScript fixes its own dtypes; see test_torch_module")
    exact, teacher = build(case)(images()), build(case, dtype="bf16")
    seen: list[torch.dtype] = []
    network: Any = teacher.networks.get("network") or teacher.model.visual
    network = getattr(network, "vision", network)  # the text tower of tiny:clip stays in fp32
    for module in network.modules():
        if is_norm(module):
            assert all(tensor.dtype != torch.bfloat16 for tensor in module.state_dict().values())
            if any(True for _ in module.parameters()):
                module.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        elif isinstance(module, PRODUCTS):
            assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())
    out = teacher(images())
    assert seen and set(seen) == {torch.float32}
    for low, full in zip(out, exact, strict=True):
        if full is not None:
            assert low.dtype == torch.float32
            assert 0 < (low - full).norm() / full.norm() < 0.05
    with torch.autocast("cpu", enabled=False):
        same(teacher(images()), out)


def test_dry_run_matches_a_real_one(teacher):
    size = teacher.input.size or (64, 64)
    real = teacher(images(size=size))
    for dry, x in zip(teacher.dry_run(size), real, strict=True):
        assert (dry is None) == (x is None)
        assert dry is None or dry.shape[1:] == x.shape[1:]


def test_blocks_beside_the_same_answer(teacher, case):
    """`answer` says what calling it says; the last block of those that tell is the map itself."""
    x = images()
    answer = teacher.answer(x, blocks=2)
    same(answer.features, teacher(x), atol=1e-5, rtol=1e-5)
    assert answer.adaptors == {}
    if case in SILENT:
        assert answer.blocks == []
        return
    assert len(answer.blocks) == 2
    for block in answer.blocks:
        assert block.summary.shape == (len(x), block.spatial.shape[1]) and not block.spatial.requires_grad
    if case == "sam":  # a neck comes after its blocks
        assert answer.blocks[-1].spatial.shape[1] == VIT["embed_dim"]
    elif case not in STAGES:
        torch.testing.assert_close(answer.blocks[-1].spatial, answer.features.spatial, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(answer.blocks[0].spatial, answer.blocks[1].spatial)
    else:  # each on a grid of its own
        assert answer.blocks[0].spatial.shape[-1] > answer.blocks[1].spatial.shape[-1]
    with pytest.raises(ValueError, match="a teacher has none"):
        teacher.answer(x, adaptors=("clip",))


def test_integers_are_refused(teacher):
    with pytest.raises(ValueError, match="divide by 255"):
        teacher(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_tensors_on_the_teacher_itself_are_refused(teacher):
    with pytest.raises(TypeError, match="freeze"):
        teacher.register_buffer("mean", torch.zeros(3))
    with pytest.raises(TypeError, match="freeze"):
        teacher.scale = nn.Parameter(torch.ones(1))


def test_a_late_module_is_frozen_too():
    """Even a subclass that forgets `freeze` can't have a trainable network."""

    class Careless(Teacher):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
            self.add_module("other", nn.Linear(2, 2))

    teacher = Careless()
    assert list(teacher.networks) == ["net", "other"] and not list(teacher.parameters())
    assert not teacher.net.training and not any(tensor.requires_grad for _, tensor in teacher.tensors())
    assert math.prod(teacher.tensors().__next__()[1].shape) == 16
