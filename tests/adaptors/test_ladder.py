"""LadderAdaptor against a plain sum of perceptrons over hooked blocks of real tiny timm models; UNIC's sizes."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from agglom.adaptors import LadderAdaptor
from agglom.adaptors.rungs import _pieces, sum_of_rungs
from agglom.errors import UserError
from agglom.features import Dims, StudentFeatures

TEACHER = Dims(10, 12)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def naive(head, inputs, grid=None):
    """One perceptron per block, each run on its own, its output resized (where it has a grid), then added up."""
    total, left = 0, 0
    for layer, x in zip(head.first, inputs, strict=True):
        second = head.last.weight[:, left : left + layer.out_features]
        left += layer.out_features
        y = F.linear(F.gelu(layer(x if x.ndim == 2 else x.permute(0, 2, 3, 1))), second)
        if x.ndim == 4:
            y = y.permute(0, 3, 1, 2)
            shrinks = y.shape[-1] > grid[1]
            y = F.interpolate(y, grid, mode="bilinear", antialias=shrinks) if y.shape[-2:] != grid else y
        total = total + y
    return total + head.last.bias.view(-1, *[1] * (total.ndim - 2))


def hooked(model, modules, images):
    seen = []
    handles = [m.register_forward_hook(lambda *a: seen.append(a[-1])) for m in modules]
    output = model.forward_features(images)
    for handle in handles:
        handle.remove()
    return output, seen


@pytest.mark.parametrize("raw_last", [False, True])
@pytest.mark.parametrize("rungs", [None, [0, 2], [-1]])
def test_equals_a_naive_sum_over_hooks_on_a_vit(rungs, raw_last):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=2,
        reg_tokens=1,
    ).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.normal_(norm.weight)  # so that before and after the final norm differ by more than a scale
    output, blocks = hooked(model, model.blocks, torch.randn(2, 3, 32, 32))
    blocks = [b.detach().requires_grad_() for b in blocks]
    output = output.detach().requires_grad_()

    def split(x):
        return x[:, :2], x[:, 2:].transpose(1, 2).unflatten(2, (4, 4))

    names = [f"blocks.{i}" for i in range(3)]
    adaptor = LadderAdaptor(Dims(24, 24, 2, 3), TEACHER, 1, names, rungs=rungs, raw_last=raw_last)
    nn.init.normal_(adaptor.summary.last.bias), nn.init.normal_(adaptor.spatial.last.bias)
    assert adaptor.last_linears()["spatial"].in_features == adaptor.spatial.first[-1].out_features + 24 * (
        len(adaptor.spatial.first) - 1
    )
    taps = {name: split(blocks[names.index(name)]) for name in adaptor.taps}
    got = adaptor(StudentFeatures(*split(output), taps))

    chosen = [range(3)[r] for r in rungs or range(3)]
    read = [output if i == 2 and not raw_last else blocks[i] for i in chosen]
    summary = naive(adaptor.summary, [x[:, 1] for x in read])
    spatial = naive(adaptor.spatial, [split(x)[1] for x in read], (4, 4))
    torch.testing.assert_close(got.summary, summary)
    torch.testing.assert_close(got.spatial, spatial)
    assert set(adaptor.taps) == {names[i] for i in chosen if raw_last or i != 2}

    leaves = [*read, *adaptor.parameters()]
    weight, weight_2 = torch.randn_like(summary), torch.randn_like(spatial)
    grads = torch.autograd.grad((got.summary * weight).sum() + (got.spatial * weight_2).sum(), leaves)
    expected = torch.autograd.grad((summary * weight).sum() + (spatial * weight_2).sum(), leaves)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_equals_a_naive_sum_over_hooks_on_a_cnn():
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=0, depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)).eval()
    output, stages = hooked(model, model.stages, torch.randn(2, 3, 64, 64))
    dims = Dims(20, 20, 1, 4, ((8, 8), (12, 12), (16, 16), (20, 20)))
    names = [f"stages.{i}" for i in range(4)]
    adaptor = LadderAdaptor(dims, TEACHER, 0, names, ratio=2.0)
    taps = {name: (x.mean((2, 3))[:, None], x) for name, x in zip(names, stages, strict=True)}
    pooled = output.mean((2, 3))
    got = adaptor(StudentFeatures(pooled[:, None], output, taps))
    read = [*stages[:-1], output]
    torch.testing.assert_close(got.spatial, naive(adaptor.spatial, read, (2, 2)))
    torch.testing.assert_close(got.summary, naive(adaptor.summary, [x.mean((2, 3)) for x in read]))
    assert [layer.out_features for layer in adaptor.spatial.first] == [16, 24, 32, 80]


def unic_count(width, teachers, depth=12):
    """multiteacher's formula; one bias a rung there, one a head here."""
    total = 0
    for d_t in teachers:
        inner = width * (width + d_t) + width + d_t
        total += 2 * ((depth - 1) * inner + 4 * width * (width + d_t) + 4 * width + d_t)
    return total - sum(2 * (depth - 1) * d_t for d_t in teachers)


@pytest.mark.parametrize(
    ("width", "teachers", "ratios", "millions"),
    [(768, [768] * 4, (1, 4), 141.7), (192, [192] * 2, (4, 16), 17.75)],  # UNIC's 768 and 3072 at either width
)
def test_sizes_of_unic(width, teachers, ratios, millions):
    names = [f"blocks.{i}" for i in range(12)]
    with torch.device("meta"):
        ladders = [
            LadderAdaptor(Dims(width, width, 1, 12), Dims(d, d), 0, names, ratio=ratios[0], last_ratio=ratios[1])
            for d in teachers
        ]
    total = sum(map(count, ladders))
    assert total / 1e6 == pytest.approx(millions, rel=1e-3)
    assert [layer.out_features for layer in ladders[0].summary.first] == [768] * 11 + [3072]
    if ratios == (1, 4):
        assert total == unic_count(width, teachers)


@pytest.mark.parametrize("piece", [None, 1, 5, 7, 100])
def test_pieces_cover_every_unit_once(piece):
    hidden, seen = [4, 3, 9], []
    for columns, parts in _pieces(hidden, piece):
        places = [c for _, _, place in parts for c in range(place.start, place.stop)]
        assert places == list(range(columns.stop - columns.start))
        assert piece is None or len(places) <= piece
        seen += [(r, u) for r, units, _ in parts for u in range(units.start, units.stop)]
    assert seen == [(r, u) for r, n in enumerate(hidden) for u in range(n)]


def test_pieces_keep_rungs_whole_where_they_fit():
    widths = [columns.stop - columns.start for columns, _ in _pieces([768] * 11 + [3072], 1600)]
    assert widths == [1536] * 5 + [768] + [1536] * 2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("piece", [None, 3])
def test_gradients_by_finite_differences(recompute, piece, monkeypatch):
    monkeypatch.setattr("agglom.adaptors.rungs._pieces", lambda hidden, _: _pieces(hidden, piece))
    torch.manual_seed(0)
    sizes = [(3, 4), (2, 5)]
    xs = [torch.randn(3, d, dtype=torch.double, requires_grad=True) for d, _ in sizes]
    ws = [torch.randn(h, d, dtype=torch.double, requires_grad=True) for d, h in sizes]
    bs = [torch.randn(h, dtype=torch.double, requires_grad=True) for _, h in sizes]
    last = torch.randn(2, 9, dtype=torch.double, requires_grad=True)
    bias = torch.randn(2, dtype=torch.double, requires_grad=True)

    def call(last, bias, *rest):
        return sum_of_rungs(rest[:2], rest[2:4], rest[4:], last, bias, recompute=recompute)

    assert torch.autograd.gradcheck(call, (last, bias, *xs, *ws, *bs))


@pytest.mark.parametrize("recompute", [False, True])
def test_hidden_units_are_kept_once_or_not_at_all(recompute):
    x, names = torch.randn(2, 1 + 16, 8), ["a", "b", "c"]
    adaptor = LadderAdaptor(Dims(8, 8, 1, 3), Dims(None, 6), 0, names, recompute=recompute)
    spatial = x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    taps = {name: (x[:, :1], spatial) for name in names}
    weights = {p.data_ptr() for p in adaptor.parameters()} | {spatial.data_ptr()}
    kept = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr()} and t.data_ptr() not in weights:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adaptor(StudentFeatures(x[:, :1], spatial, taps))
    units, copies = 32 * (8 + 8 + 32), 3 * 32 * 8  # hidden units; the rungs' inputs, as rows of a matrix
    assert sum(kept) == copies + (0 if recompute else units)


def test_no_gradient_is_made_for_a_frozen_student():
    names = ["a", "b"]
    adaptor = LadderAdaptor(Dims(8, 8, 1, 2), Dims(6, 6), 0, names)
    summary, spatial = torch.randn(2, 1, 8), torch.randn(2, 8, 3, 3)
    out = adaptor(StudentFeatures(summary, spatial, {n: (summary, spatial) for n in names}))
    (out.summary.sum() + out.spatial.sum()).backward()
    assert summary.grad is None and all(p.grad is not None for p in adaptor.parameters())


def test_autocast_and_compile_agree_with_eager():
    torch.manual_seed(0)
    names = ["a", "b"]
    adaptor = LadderAdaptor(Dims(8, 8, 1, 2), Dims(6, 6), 0, names)
    summary, spatial = torch.randn(2, 1, 8), torch.randn(2, 8, 3, 3)
    features = StudentFeatures(summary, spatial, {n: (summary, spatial) for n in names})
    plain = adaptor(features)
    with torch.autocast("cpu", torch.bfloat16):
        half = adaptor(features)
    assert half.spatial.dtype == torch.bfloat16
    torch.testing.assert_close(half.spatial.float(), plain.spatial, rtol=0.05, atol=0.01)
    half.spatial.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in adaptor.spatial.parameters())
    compiled = torch.compile(adaptor, backend="eager", fullgraph=True)(features)
    torch.testing.assert_close(compiled.spatial, plain.spatial)


def test_a_student_without_taps_is_one_rung():
    adaptor = LadderAdaptor(Dims(8, 8), Dims(6, None))
    assert adaptor.taps == () and [layer.out_features for layer in adaptor.summary.first] == [32]


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        ([0, 3], "rungs: 3; the student has 3 blocks, valid: -3 to 2"),
        ([0, -3], "name each block once"),
        ([], "at least one"),
    ],
)
def test_bad_rungs_are_named(rungs, message):
    with pytest.raises(UserError, match=message):
        LadderAdaptor(Dims(8, 8, 1, 3), TEACHER, 0, ["a", "b", "c"], rungs=rungs)
