"""One contract over every adaptor, for ViT-like and CNN-like students: shapes, tokens, order, gradients, folding.

The fake students have the layouts of the real ones: a ViT's maps are permuted views of its tokens, all taps of one
width and grid; a CNN's taps each have their own.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from agglom.adaptors import (
    AttentionAdaptor,
    ConvAdaptor,
    LadderAdaptor,
    LinearAdaptor,
    MLPAdaptor,
    OrthogonalAdaptor,
)
from agglom.features import Dims, StudentFeatures, align

BATCH, GRID = 2, (4, 6)
NAMES = ("one", "two", "three")


def vit(seed=0, tokens=2, dtype=torch.float32):
    """Width 16, three taps, grid 4 x 6."""
    generator = torch.Generator().manual_seed(seed)

    def block():
        x = torch.randn(BATCH, tokens + 24, 16, generator=generator).to(dtype)
        return x[:, :tokens], x[:, tokens:].transpose(1, 2).unflatten(2, GRID)

    return Dims(16, 16, tokens, 3), StudentFeatures(*block(), {name: block() for name in NAMES})


def cnn(seed=0, dtype=torch.float32):
    """Widths 6, 12, 16 on grids 16 x 24, 8 x 12, 4 x 6; pooled summaries."""
    generator = torch.Generator().manual_seed(seed)

    def block(width, scale):
        x = torch.randn(BATCH, width, GRID[0] * scale, GRID[1] * scale, generator=generator).to(dtype)
        return x.mean((2, 3)).unsqueeze(1), x

    taps = dict(zip(NAMES, (block(6, 4), block(12, 2), block(16, 1)), strict=True))
    return Dims(16, 16, 1, 3, ((6, 6), (12, 12), (16, 16))), StudentFeatures(*taps["three"], taps)


STUDENTS = {"vit": vit, "cnn": cnn}
ADAPTORS = {
    "linear": (LinearAdaptor, {}),
    "mlp v1": (MLPAdaptor, {}),
    "mlp v2": (MLPAdaptor, {"version": "v2", "blocks": 2, "pre_norm": True}),
    "mlp upsampling": (MLPAdaptor, {"upsample": 2}),
    "ladder": (LadderAdaptor, {}),
    "ladder raw": (LadderAdaptor, {"rungs": [0, -1], "raw_last": True, "recompute": True}),
    "orthogonal": (OrthogonalAdaptor, {}),
    "orthogonal cayley": (OrthogonalAdaptor, {"orthogonal_map": "cayley"}),
    "attention": (AttentionAdaptor, {"heads": 2}),
    "conv": (ConvAdaptor, {}),
    "conv upsampling": (ConvAdaptor, {"upsample": 2, "hidden": 8}),
}
TEACHERS = {"both": Dims(10, 12), "no summary": Dims(None, 12), "no spatial": Dims(10, None)}

UPSAMPLING = {"mlp upsampling": 2, "conv upsampling": 2}
# The orthogonal one warns, as it should, for teachers narrower than the student.
pytestmark = pytest.mark.filterwarnings("ignore:.*not preserved")

every_adaptor = pytest.mark.parametrize("name", ADAPTORS)
every_student = pytest.mark.parametrize("student", STUDENTS)


def fold(layer, matrix, offset):
    """W <- T W, b <- T b + mean, T repeated for the places of an upsampled cell (C, u * u)."""
    with torch.no_grad():
        weight = torch.einsum("cd,dn->cn", matrix, layer.weight.reshape(len(matrix), -1))
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        bias = matrix @ layer.bias.reshape(len(matrix), -1) + offset[:, None]
        layer.bias.copy_(bias.flatten())


def build(name, dims, teacher=TEACHERS["both"], token=0, seed=0):
    torch.manual_seed(seed)
    kind, options = ADAPTORS[name]
    return kind(dims, teacher, token=token, tap_names=NAMES, **options)


@every_adaptor
@every_student
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("grid", [None, (2, 3), (7, 9)])
def test_shapes(name, student, teacher, grid):
    dims, features = STUDENTS[student]()
    summary, spatial = build(name, dims, TEACHERS[teacher])(features, grid)
    assert summary is None if teacher == "no summary" else summary.shape == (BATCH, 10)
    native = tuple(side * UPSAMPLING.get(name, 1) for side in GRID)
    assert spatial is None if teacher == "no spatial" else spatial.shape == (BATCH, 12, *(grid or native))


@every_adaptor
@every_student
def test_head_runs_before_alignment(name, student):
    dims, features = STUDENTS[student]()
    adaptor = build(name, dims)
    coarse = adaptor(features, (2, 3)).spatial
    torch.testing.assert_close(coarse, align(adaptor(features).spatial, (2, 3)))


def test_the_other_order_would_differ():
    dims, features = vit()
    adaptor = build("mlp v1", dims)
    other = adaptor(features._replace(spatial=align(features.spatial, (2, 3)))).spatial
    assert (other - adaptor(features, (2, 3)).spatial).abs().max() > 1e-2


@every_adaptor
def test_summary_reads_its_own_token(name):
    dims, features = vit()
    summaries = []
    for token in (0, 1):
        adaptor = build(name, dims, TEACHERS["both"], token)
        before = adaptor(features).summary
        changed = [features.summary.clone(), {k: (s.clone(), m) for k, (s, m) in features.taps.items()}]
        for tensor in (changed[0], *(s for s, _ in changed[1].values())):
            tensor[:, 1 - token] += 1  # the other teacher's token
        after = adaptor(StudentFeatures(changed[0], features.spatial, changed[1])).summary
        torch.testing.assert_close(before, after, rtol=0, atol=0)
        summaries.append(before)
    assert not torch.allclose(*summaries)


@every_adaptor
@every_student
@pytest.mark.parametrize("teacher", TEACHERS)
def test_gradient_reaches_every_parameter_and_the_student(name, student, teacher):
    dims, features = STUDENTS[student]()
    leaves = [features.summary.clone().requires_grad_(), features.spatial.clone().requires_grad_()]
    taps = {k: (s.clone().requires_grad_(), m.clone().requires_grad_()) for k, (s, m) in features.taps.items()}
    adaptor = build(name, dims, TEACHERS[teacher])
    outputs = adaptor(StudentFeatures(*leaves, taps), (3, 5))
    leaves = [leaf for tap in adaptor.taps for leaf in taps[tap]] if name == "ladder raw" else leaves
    sum((torch.randn_like(x) * x).sum() for x in outputs if x is not None).backward()
    missing = [key for key, p in adaptor.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing
    assert any(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)


@every_adaptor
@every_student
def test_folding_an_affine_map_is_exact(name, student):
    dims, features = STUDENTS[student]()
    adaptor = build(name, dims).double()
    features = StudentFeatures(
        features.summary.double(),
        features.spatial.double(),
        {k: (s.double(), m.double()) for k, (s, m) in features.taps.items()},
    )
    plain = adaptor(features, (3, 5))
    generator = torch.Generator().manual_seed(1)
    folded = copy.deepcopy(adaptor)
    expected = []
    for kind, value in zip(("summary", "spatial"), plain, strict=True):
        matrix = torch.randn(value.shape[1], value.shape[1], generator=generator, dtype=torch.float64)
        offset = torch.randn(value.shape[1], generator=generator, dtype=torch.float64)
        fold(folded.last_linears()[kind], matrix, offset)
        moved = torch.einsum("cd,bd...->bc...", matrix, value)
        expected.append(moved + offset.view(-1, *[1] * (value.ndim - 2)))
    got = folded(features, (3, 5))
    torch.testing.assert_close(got.summary, expected[0])
    torch.testing.assert_close(got.spatial, expected[1])


@every_adaptor
@every_student
def test_finite_in_bf16_and_deterministic(name, student):
    dims, features = STUDENTS[student](dtype=torch.bfloat16)
    adaptor = build(name, dims).to(torch.bfloat16)
    outputs = adaptor(features, (3, 5))
    sum(x.float().square().sum() for x in outputs).backward()
    assert all(torch.isfinite(x).all() for x in outputs)
    assert all(torch.isfinite(p.grad).all() for p in adaptor.parameters())
    again = build(name, dims).to(torch.bfloat16)(features, (3, 5))
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


@every_adaptor
@every_student
def test_state_dict_rebuilds_it(name, student):
    dims, features = STUDENTS[student]()
    adaptor, other = build(name, dims), build(name, dims, seed=1)
    other.load_state_dict(adaptor.state_dict())
    for a, b in zip(adaptor(features), other(features), strict=True):
        assert F.mse_loss(a, b) == 0
