"""Cropped positions: windows of the grid by hand and by statistics, training only, copies, plain exports, refusals."""

import copy
import math

import pytest
import timm
import torch
from timm.models import save_for_hf

from agglom.errors import UserError
from agglom.features import prepare
from agglom.students import TimmStudent, positions
from agglom.students.positions import CroppedViT, crop_grid, draw_crops

WHOLE = torch.tensor([0.0, 0.0, 1.0, 1.0])
KINDS = {
    "class": {},
    "class and registers": {"summary_tokens": 2, "registers": 1},
    "no class position": {"registers": 2, "kwargs": {"no_embed_class": True}},
    "registers only": {"registers": 2, "kwargs": {"class_token": False, "global_pool": "avg"}},
    "hybrid": {
        "name": "vit_tiny_r_s16_p8_224",
        "kwargs": {"img_size": 32, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2},
    },
}


def pixels(size=(32, 32), count=2):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def build(kind, tiny_student):
    options = {"cropped_positions": True, **KINDS[kind]}
    if "name" not in options:
        return tiny_student(**options)
    torch.manual_seed(0)
    return TimmStudent(**options)


def positioned(student, count=2, size=(4, 4), seed=0):
    """What the backbone makes of patches of zeros: prefix tokens (B, P, D), positions (B, H * W, D)."""
    torch.manual_seed(seed)
    tokens = student.backbone._pos_embed(torch.zeros(count, *size, 32))
    return tokens.tensor_split([student.backbone.num_prefix_tokens], 1)


@pytest.fixture
def cropped(tiny_student):
    """A function: options -> a student in training mode with positions large enough to be seen."""

    def build(**options):
        student = tiny_student(**{"cropped_positions": True, **options})
        with torch.no_grad():
            student.backbone.pos_embed.mul_(25)
        return student.train()

    return build


@pytest.fixture
def whole(monkeypatch):
    """All windows are the whole grid and none is dropped."""
    monkeypatch.setattr(positions, "draw_crops", lambda count, device: WHOLE.expand(count, 4))
    monkeypatch.setattr(positions, "DROP_RATE", 0.0)


@pytest.fixture
def undropped(monkeypatch):
    monkeypatch.setattr(positions, "DROP_RATE", 0.0)


def test_windows_of_a_grid_of_coordinates():
    """Bilinear samples of a linear grid are its values at the places themselves."""
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(9.0), indexing="ij")
    crops = torch.tensor([[0.25, 0.5, 0.5, 0.25], [0, 0, 1, 1], [0.5, 0, 0.5, 1]])
    got = crop_grid(torch.stack([rows, columns], 2), crops, (3, 2)).unflatten(1, (3, 2))
    first = [[(1, 4), (1, 6)], [(2, 4), (2, 6)], [(3, 4), (3, 6)]]
    second = [[(0, 0), (0, 8)], [(2, 0), (2, 8)], [(4, 0), (4, 8)]]
    third = [[(2, 0), (2, 8)], [(3, 0), (3, 8)], [(4, 0), (4, 8)]]
    torch.testing.assert_close(got, torch.tensor([first, second, third]).float())


def test_the_whole_grid_at_its_own_size_is_the_grid():
    grid = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(crop_grid(grid, WHOLE.expand(3, 4), (4, 6)), grid.flatten(0, 1).expand(3, -1, -1))


@pytest.mark.parametrize("seed", range(3))
def test_windows_stay_within_the_grid(seed):
    torch.manual_seed(seed)
    top, left, height, width = draw_crops(20_000).unbind(1)
    smallest = math.sqrt(0.1) * 3 / 4
    for start, extent in ((top, height), (left, width)):
        assert start.min() >= 0 and (start + extent).max() <= 1 + 1e-6
        assert smallest <= extent.min() < 1.02 * smallest and extent.max() == 1


def test_scale_aspect_and_offset_are_uniform():
    torch.manual_seed(0)
    top, left, height, width = draw_crops(100_000).double().unbind(1)
    # The clamp leaves crops with scale < 3/4 as they are, and no other reaches sqrt(height * width) < 3/4.
    scale, log_aspect = (height * width).sqrt(), 0.5 * (width / height).log()
    free = scale < 0.75
    low, high = math.sqrt(0.1), math.log(4 / 3)
    assert free.double().mean().item() == pytest.approx((0.75 - low) / (1 - low), abs=0.01)
    check_uniform(scale[free], low, 0.75)
    check_uniform(log_aspect[free], -high, high)
    check_uniform((top / (1 - height))[free], 0, 1)
    check_uniform((left / (1 - width))[free], 0, 1)
    drawn = torch.stack([scale, log_aspect, top / (1 - height), left / (1 - width)])[:, free]
    torch.testing.assert_close(torch.corrcoef(drawn), torch.eye(4).double(), atol=0.02, rtol=0)
    # Of the others, those whose width s * a would exceed 1: a numerical integral over both draws.
    s, a = torch.meshgrid(torch.linspace(low, 1, 2001), torch.linspace(-high, high, 2001), indexing="ij")
    for extent, sign in ((width, 1), (height, -1)):
        expected = (s * (sign * a).exp() > 1).double().mean().item()
        assert (extent == 1).double().mean().item() == pytest.approx(expected, abs=0.01)


def check_uniform(values, low, high):
    """The largest distance of the distribution functions; 0.01 is 4 standard deviations for 40,000 values."""
    ordered = (values.sort().values - low) / (high - low)
    assert (ordered - torch.linspace(0, 1, len(ordered))).abs().max() < 0.01


@torch.no_grad()
def test_one_sample_in_ten_has_no_positions(cropped):
    student = cropped(registers=1)
    _, spatial = positioned(student, count=10_000)
    dropped = (spatial == 0).flatten(1).all(1)
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=0.012)  # 4 standard deviations
    assert ((spatial == 0).flatten(1).any(1) == dropped).all()  # all of it or nothing


@torch.no_grad()
def test_samples_of_a_batch_and_batches_see_different_windows(cropped, undropped):
    student = cropped()
    first, again, other = (positioned(student, count=8, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)  # torch's own generator is all there is
    both = torch.cat([first, other]).flatten(1)
    assert torch.pdist(both).min() > 0.5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_whole_window_is_timms_own_path(kind, tiny_student, whole):
    student = build(kind, tiny_student)
    evaluated = student.eval()(pixels(), ("blocks.0",))
    trained = student.train()(pixels(), ("blocks.0",))
    torch.testing.assert_close(trained.summary, evaluated.summary)
    torch.testing.assert_close(trained.spatial, evaluated.spatial)
    torch.testing.assert_close(trained.taps["blocks.0"], evaluated.taps["blocks.0"])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_both_ways_through_the_backbone_crop(kind, tiny_student, undropped):
    student = build(kind, tiny_student)
    student.backbone.pos_embed.mul_(25)

    def features(*taps, size=(48, 64)):
        torch.manual_seed(3)
        return student(pixels(size), taps)

    student.eval()
    evaluated = features()
    student.train()
    plain, tapped = features(), features("blocks.1")
    assert plain.spatial.shape == evaluated.spatial.shape == (2, plain.spatial.shape[1], *student.input.grid((48, 64)))
    torch.testing.assert_close(plain.spatial, tapped.spatial)
    torch.testing.assert_close(plain.summary, tapped.summary)
    assert not torch.allclose(plain.spatial, evaluated.spatial, atol=0.1)


@pytest.mark.parametrize("kind", ["class", "class and registers", "no class position", "registers only"])
@torch.no_grad()
def test_prefix_tokens_keep_their_positions(kind, cropped):
    student = cropped(**KINDS[kind])
    backbone = student.backbone
    tokens = torch.cat([t for t in (backbone.cls_token, backbone.reg_token) if t is not None], 1)
    if not backbone.no_embed_class:
        tokens = tokens + backbone.pos_embed[:, : backbone.num_prefix_tokens]
    for _ in range(2):
        prefix, _ = positioned(student.train(not student.training), count=64)
        torch.testing.assert_close(prefix, tokens.expand(64, -1, -1))


@torch.no_grad()
def test_evaluation_is_timms_and_at_the_grids_own_size_the_grid_itself(tiny_student):
    plain = tiny_student(kwargs={"dynamic_img_size": True}).eval()
    student = tiny_student(cropped_positions=True).eval()
    assert list(student.state_dict()) == list(plain.state_dict())
    assert student.input == plain.input and student.input.size is None
    for size in ((32, 32), (24, 64)):
        assert torch.equal(student(pixels(size)).spatial, plain(pixels(size)).spatial)
    assert torch.equal(positioned(student)[1], student.backbone.pos_embed[:, 1:].expand(2, -1, -1))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    student(pixels())
    assert torch.equal(before, torch.random.get_rng_state())


def test_off_by_default(tiny_student):
    student = tiny_student(kwargs={"dynamic_img_size": True}).train()
    assert type(student.backbone) is timm.models.VisionTransformer
    assert torch.equal(positioned(student)[1][0], student.backbone.pos_embed[0, 1:])


def test_gradient_reaches_the_grid_and_the_prefix(cropped):
    student = cropped(registers=1)
    student(pixels((40, 24), count=16)).spatial.square().mean().backward()
    grad = student.backbone.pos_embed.grad
    assert grad.isfinite().all() and (grad.abs().sum(2) > 0).all()


def test_a_copy_has_its_own_positions(cropped, undropped):
    student = cropped()
    before = positioned(student)[1]
    average = copy.deepcopy(student)
    with torch.no_grad():
        average.backbone.pos_embed.add_(1)
    torch.testing.assert_close(positioned(average)[1], before + 1)
    torch.testing.assert_close(positioned(student)[1], before)
    positioned(average)[1].sum().backward()
    assert average.backbone.pos_embed.grad is not None and student.backbone.pos_embed.grad is None


@torch.no_grad()
def test_the_export_is_a_plain_vit(cropped, tmp_path):
    student = cropped(registers=1, kwargs={"img_size": (32, 48)})
    save_for_hf(student.backbone, str(tmp_path), safe_serialization=True)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(plain) is timm.models.VisionTransformer and plain.dynamic_img_size
    for size in ((32, 48), (56, 40)):
        expected = student.eval()(pixels(size))
        got = plain.forward_features(prepare(pixels(size), student.input))
        torch.testing.assert_close(got[:, 2:].mT.unflatten(2, expected.spatial.shape[-2:]), expected.spatial)


@torch.no_grad()
def test_a_grid_that_is_not_square(cropped, whole):
    student = cropped(kwargs={"img_size": (32, 48)})
    torch.testing.assert_close(positioned(student, size=(4, 6))[1][0], student.backbone.pos_embed[0, 1:])


def test_on_the_meta_device():
    with torch.device("meta"):
        student = TimmStudent(name="vit_tiny_patch16_224", cropped_positions=True, kwargs={"depth": 1})
    assert isinstance(student.backbone, CroppedViT) and student.backbone.pos_embed.is_meta


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "resnet10t"}, ["resnet10t (ResNet)"]),
        ({"name": "mixer_s32_224"}, ["mixer_s32_224 (MlpMixer)"]),
        ({"name": "vit_small_patch16_rope_224", "kwargs": {"depth": 1}}, ["vit_small_patch16_rope_224 (Eva)"]),
        ({"name": "deit_tiny_distilled_patch16_224", "kwargs": {"depth": 1}}, ["(VisionTransformerDistilled)"]),
        ({"name": "vit_tiny_patch16_224", "kwargs": {"depth": 1, "pos_embed": "none"}}, ["(VisionTransformer)"]),
        (
            {"name": "vit_tiny_patch16_224", "kwargs": {"depth": 1, "dynamic_img_size": False}},
            ["kwargs.dynamic_img_size: false", "remove kwargs.dynamic_img_size"],
        ),
    ],
)
def test_refusals_in_one_line(options, words):
    with pytest.raises(UserError) as err:
        TimmStudent(cropped_positions=True, **options)
    message = str(err.value)
    assert message.startswith("student.cropped_positions: true") and "valid:" in message and "\n" not in message
    assert all(word in message for word in words)
