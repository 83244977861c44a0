"""Shifted crops: an exact crop costs nothing, the statistics of the draws, frames, margins; only the overlap counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.features import StudentFeatures, align
from agglom.heads import meet
from agglom.objectives import MSE, Cosine, CosineSmoothL1
from agglom.shifts import ShiftOptions, crop, draw, move


def shifted(scene, corners, size):
    """Windows of a scene of cells, by plain slicing."""
    return torch.stack([x[:, r : r + size, c : c + size] for x, (r, c) in zip(scene, corners.tolist(), strict=True)])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(3, 6))
def test_an_exact_crop_costs_exactly_nothing(seed, size):
    """Student and teacher see crops of one scene of cells: moved into the teacher's frame they are equal bit by bit."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.randn(4, 5, size + 4, size + 4, generator=generator)
    mine, theirs = (torch.randint(0, 5, (4, 2), generator=generator) for _ in range(2))
    student, target = shifted(scene, mine, size), shifted(scene, theirs, size)
    ours, truth, mask = meet(student, target, "teacher", theirs - mine, (size, size))
    assert torch.equal(MSE()(ours, truth, mask), torch.zeros(4))
    overlap = (size - (theirs - mine).abs()).clamp(min=0).prod(1)
    assert torch.equal(mask.sum((1, 2)), overlap)
    loss = CosineSmoothL1()(ours, truth, mask)
    assert loss.isfinite().all() and loss.abs().max() < 1e-6


def test_the_wrong_direction_is_not_free():
    scene = torch.randn(1, 5, 9, 9)
    mine, theirs = torch.tensor([[1, 2]]), torch.tensor([[2, 0]])
    ours, truth, mask = meet(shifted(scene, mine, 5), shifted(scene, theirs, 5), "teacher", mine - theirs, (5, 5))
    assert MSE()(ours, truth, mask) > 0.5


def test_no_overlap_is_a_finite_0_with_a_finite_gradient():
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    ours, truth, mask = meet(student, torch.randn(2, 3, 4, 4), "teacher", torch.tensor([[4, 0], [0, -9]]), (4, 4))
    loss = CosineSmoothL1()(ours, truth, mask)
    assert torch.equal(loss, torch.zeros(2))
    loss.sum().backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("rule", ["teacher", "larger"])
@pytest.mark.parametrize("other", [3, 6, 12])
def test_unequal_grids_count_only_cells_from_inside_the_overlap(rule, other):
    """Poison outside of the overlap must not reach a counted cell, whatever the interpolation mixes."""
    student = torch.zeros(1, 1, 6, 6)
    shift = torch.tensor([[2, -1]])
    moved, inside = move(student, shift)
    poisoned = torch.where(inside[:, None], moved, torch.tensor(1e6))
    grid = other if rule == "teacher" else max(other, 6)
    ours, truth, mask = meet(student, torch.zeros(1, 1, other, other), rule, shift, (6, 6))
    assert ours.shape == truth.shape == (1, 1, grid, grid) and mask.shape == (1, grid, grid)
    assert mask.any() and not mask.all()
    assert align(poisoned, (grid, grid)).masked_select(mask[:, None]).abs().max() < 1e6 * 2e-4


def test_an_upsampling_head_moves_by_its_own_cells():
    scene = torch.randn(1, 2, 16, 16)  # two cells of the head to one of the student's
    ours, truth, mask = meet(
        shifted(scene, torch.tensor([[2, 4]]), 8), shifted(scene, torch.tensor([[4, 2]]), 8), "teacher",
        torch.tensor([[1, -1]]), (4, 4),
    )  # fmt: skip
    assert mask.sum() == 36 and torch.equal(MSE()(ours, truth, mask), torch.zeros(1))


@pytest.mark.parametrize("theirs", [4, 8])
def test_larger_grid_is_shared_and_targets_never_shrink(theirs):
    ours, truth, mask = meet(torch.randn(1, 2, 6, 6), torch.randn(1, 2, theirs, theirs), "larger", None, (6, 6))
    assert ours.shape == truth.shape == (1, 2, max(6, theirs), max(6, theirs)) and mask is None
    ours, truth, _ = meet(torch.randn(1, 2, 6, 6), torch.randn(1, 2, theirs, theirs), "teacher", None, (6, 6))
    assert ours.shape == truth.shape == (1, 2, theirs, theirs)


def test_crop_is_slicing():
    images = torch.rand(3, 3, 20, 24)
    corner = torch.tensor([[0, 0], [4, 8], [12, 16]])
    got = crop(images, corner, (8, 8))
    for window, image, (row, column) in zip(got, images, corner.tolist(), strict=True):
        assert torch.equal(window, image[:, row : row + 8, column : column + 8])


def test_draws_are_a_rounded_normal_within_the_limit():
    """Round(N(0, 0.5)): P(0) = 0.6827, P(+-1) = 0.1573 each, P(beyond) = 0.0027."""
    shifts = draw(ShiftOptions(std=0.5, limit=1), 40_000, 1)
    share = [(shifts == value).float().mean().item() for value in (-1, 0, 1)]
    assert share == pytest.approx([0.1587, 0.6827, 0.1587], abs=0.006)
    assert draw(ShiftOptions(std=5.0, limit=2), 1000, 1).abs().max() == 2


def test_draws_follow_from_seed_and_key_alone():
    options = ShiftOptions(std=3.0, limit=9)
    torch.manual_seed(0)
    first = draw(options, 64, 7, 0, "clip")
    torch.manual_seed(1)
    assert torch.equal(first, draw(options, 64, 7, 0, "clip"))
    others = [
        draw(options, 64, 8, 0, "clip"),
        draw(options, 64, 7, 0, "dino"),
        draw(ShiftOptions(3.0, 9, 1), 64, 7, 0, "clip"),
    ]
    assert all(not torch.equal(first, other) for other in others)
    pairs = torch.stack([first.flatten(), others[1].flatten()]).float()
    assert abs(torch.corrcoef(pairs)[0, 1]) < 0.3, "student and teachers are shifted independently"


def test_the_distiller_shows_shifted_windows_and_moves_the_prediction(tiny_student, tiny_teachers):
    """A student that copies its pixels into its map, and a teacher that does too: the loss is 0 at every draw."""
    from agglom.distiller import Distiller
    from agglom.plan import Part

    student = tiny_student()  # 32 px, stride 8
    module = Distiller(student, tiny_teachers("sam"), shift=ShiftOptions(std=2.0, limit=2), spatial_loss=MSE)
    images = torch.rand(6, 3, 64, 64)
    part = Part(0, 0, 32, 32, 6)
    frames = module.frames(images, part, (3, 0, 0))
    assert frames.student.shape == frames.view("sam").shape == (6, 3, 32, 32)
    mine, theirs = (torch.nn.functional.pixel_unshuffle(x, 8) for x in (frames.student, frames.view("sam")))
    ours, truth, mask = meet(mine, theirs, "teacher", frames.offset("sam"), (4, 4))
    assert torch.equal(MSE()(ours, truth, mask), torch.zeros(6)) and frames.offset("sam").unique().numel() > 2
    assert not torch.equal(frames.offset("sam"), frames.offset("clip")) and not frames.offset("").any()
    still = module.frames(images)
    assert still.student is images and still.view("sam") is images and still.offset("sam") is None


def test_a_missing_margin_is_one_line(tiny_student, tiny_teachers):
    from agglom.distiller import Distiller
    from agglom.errors import UserError
    from agglom.plan import Part

    module = Distiller(tiny_student(), tiny_teachers("sam"), shift=ShiftOptions(limit=1))
    with pytest.raises(UserError, match="data.margin: images of .32, 32. pixels; valid: 8 pixels on each side"):
        module.frames(torch.rand(1, 3, 32, 32), Part(0, 0, 32, 32, 1), (0,))


def test_heads_run_before_moving_and_aligning(tiny_student, tiny_teachers):
    """With a non-linear head the order shows: project, then move, then align."""
    from agglom.distiller import Distiller

    module = Distiller(tiny_student(), tiny_teachers("sam"), spatial_loss=Cosine).eval()
    head = module.heads["sam"]
    features = StudentFeatures(torch.randn(2, 1, 32), torch.randn(2, 32, 4, 4))
    shift = torch.tensor([[1, 0], [-1, 2]])
    target = head.targets(module.encoders["sam"](torch.rand(2, 3, 32, 32)))
    got = head(features, target, shift)["spatial"]
    projected = head.adaptor.project(features).spatial
    moved, inside = move(projected, shift)
    mask = align(inside[:, None].float(), target.spatial.shape[-2:])[:, 0] > 1 - 1e-4
    right = Cosine()(align(moved, target.spatial.shape[-2:]), target.spatial, mask)
    torch.testing.assert_close(got, right)
    early = features._replace(spatial=align(move(features.spatial, shift)[0], target.spatial.shape[-2:]))
    assert (Cosine()(head.adaptor.project(early).spatial, target.spatial, mask) - right).abs().max() > 1e-3
