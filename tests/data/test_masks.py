"""Block-wise masks: how many, of which images, in blocks, drawn from the generator; and the lists of their places."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agglom.data.masks import LEAST, block_masks, most_masked, positions
from agglom.errors import UserError

GRID = (14, 16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(masks):
    return masks.flatten(1).sum(1)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_exactly_the_share_of_images_is_masked(count, share):
    for seed in range(10):
        masks = block_masks(count, GRID, share=share, generator=generator(seed))
        assert masks.shape == (count, *GRID) and masks.dtype == torch.bool
        assert int((numbers(masks) > 0).sum()) == math.floor(share * count + 0.5)


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (1, 9), (2, 2), (2, 3), (4, 4), (9, 1)])
def test_a_masked_image_has_a_masked_patch_in_the_smallest_grids(grid):
    for seed in range(20):
        masks = block_masks(8, grid, share=1.0, generator=generator(seed))
        assert (numbers(masks) >= 1).all() and int(masks.sum()) <= most_masked(8, grid, share=1.0)


@pytest.mark.parametrize("ratio", [(0.1, 0.5), (0.3, 0.3), (0.0, 0.2), (0.6, 0.9)])
@pytest.mark.parametrize("masked", [1, 2, 5, 16])
def test_numbers_of_patches_are_spread_evenly_over_the_range(masked, ratio):
    """The i-th smallest of n lies in the i-th of n parts of the range: never more, at most a few patches less."""
    patches = GRID[0] * GRID[1]
    for seed in range(20):
        found = numbers(block_masks(2 * masked, GRID, ratio=ratio, generator=generator(seed))).sort().values[masked:]
        for part, number in enumerate(found.tolist()):
            low, high = (ratio[0] + (ratio[1] - ratio[0]) * edge / masked for edge in (part, part + 1))
            assert max(1, round(low * patches) - LEAST + 1) <= number <= max(1, round(high * patches))


def test_numbers_come_close_to_what_is_wanted():
    """With one ratio for all, the wanted number is known: 80 of 224 patches."""
    found = numbers(block_masks(300, GRID, share=1.0, ratio=(80 / 224, 80 / 224), generator=generator()))
    assert found.max() == 80 and found.float().mean() > 79.5


def test_ratios_of_single_images_cover_the_range():
    """Where one image is masked at a time, its ratio is drawn in all of the range, not taken from the middle."""
    rng = generator()
    found = [int(block_masks(2, GRID, generator=rng).sum()) / 224 for _ in range(500)]
    assert np.abs(np.quantile(found, [0.05, 0.25, 0.5, 0.75, 0.95]) - [0.12, 0.2, 0.3, 0.4, 0.48]).max() < 0.03


def test_every_image_and_every_ratio_may_meet():
    """Over many draws each place is masked as often as any other, with as many patches."""
    rng = generator()
    found = torch.stack([numbers(block_masks(6, GRID, generator=rng)) for _ in range(600)]).float()
    often = (found > 0).float().mean(0)
    assert (often - 0.5).abs().max() < 4 * math.sqrt(0.25 / 600)
    assert (found.mean(0) / 224 - 0.15).abs().max() < 0.03


def inside_blocks(mask):
    """Whether every masked patch is part of a wholly masked rectangle of LEAST patches: 2 x 2, 1 x 4 or 4 x 1."""
    covered = torch.zeros_like(mask)
    for height, width in ((2, 2), (1, 4), (4, 1)):
        blocks = F.unfold(mask[None, None].float(), (height, width)).all(1, keepdim=True).float()
        back = F.fold(blocks.expand(-1, height * width, -1), mask.shape, (height, width))
        covered |= back[0, 0] > 0
    return torch.equal(covered & mask, mask)


def test_masked_patches_lie_in_blocks():
    masks = block_masks(64, GRID, share=1.0, generator=generator())
    assert all(inside_blocks(mask) for mask in masks)
    scattered = torch.rand(64, *GRID, generator=generator()) < 0.3
    assert not any(inside_blocks(mask) for mask in scattered)


def masked_neighbours(masks):
    """Mean share of a masked patch's four neighbours (inside the grid) that are masked too."""
    cross = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])[None, None]
    around, there = (F.conv2d(x[:, None], cross, padding=1)[:, 0] for x in (masks.float(), torch.ones(masks.shape)))
    return float((around / there)[masks].mean())


def test_masks_are_far_more_contiguous_than_random_ones():
    masks = block_masks(64, GRID, share=1.0, ratio=(0.3, 0.3), generator=generator())
    random = torch.rand(64, *GRID, generator=generator()) < 0.3
    assert abs(masked_neighbours(random) - 0.3) < 0.02
    assert masked_neighbours(masks) > 0.65


def test_blocks_have_many_shapes_and_lie_everywhere():
    """Masks of one block: of 4 patches all three shapes, none of them seldom; every patch of the grid in its turn."""
    rng, shapes, often = generator(), Counter(), torch.zeros(GRID)
    for _ in range(400):
        (mask,) = block_masks(1, GRID, share=1.0, ratio=(4 / 224, 4 / 224), generator=rng)
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        height, width = (int(x.max() - x.min()) + 1 for x in (rows, columns))
        shapes[height, width] += 1
        often += mask
    assert set(shapes) == {(2, 2), (1, 4), (4, 1)} and min(shapes.values()) > 20
    assert (often > 0).all()


def test_masks_follow_from_the_generator_alone():
    first = block_masks(16, GRID, generator=generator(3))
    torch.manual_seed(1)
    assert torch.equal(block_masks(16, GRID, generator=generator(3)), first)
    assert not torch.equal(block_masks(16, GRID, generator=generator(4)), first)
    torch.manual_seed(3)
    assert torch.equal(block_masks(16, GRID, generator=None), first)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("options", [{}, {"share": 1.0, "ratio": (0.2, 0.2)}, {"share": 0.0}])
def test_positions_are_the_mask(options, seed):
    masks = block_masks(9, GRID, generator=generator(seed), **options)
    places = positions(masks, **options)
    length = most_masked(9, GRID, **options)
    assert [x.shape for x in places] == [(length,)] * 3
    assert [x.dtype for x in places] == [torch.int64, torch.int64, torch.bool]
    back = torch.zeros(masks.numel(), dtype=torch.bool)
    back[places.patch[places.valid]] = True
    assert torch.equal(back.view_as(masks), masks) and int(places.valid.sum()) == int(masks.sum())
    assert torch.equal(places.image[places.valid], masks.nonzero()[:, 0])
    assert (places.patch[~places.valid] == 0).all() and (places.image[~places.valid] == 0).all()


def test_length_of_the_lists_depends_on_the_options_and_wastes_little():
    lengths, parts = set(), []
    for seed in range(30):
        places = positions(block_masks(64, GRID, generator=generator(seed)))
        lengths.add(len(places.valid))
        parts.append(float(places.valid.float().mean()))
    assert lengths == {most_masked(64, GRID)} and min(parts) > 0.95
    # by hand: two of four images, ratios up to 0.3 and 0.5 of 100 patches
    assert most_masked(4, (10, 10)) == 30 + 50


def test_a_mean_over_masked_patches_without_knowing_how_many():
    """What the lists are for: a mean per image, then over images, equal to the loop that knows."""
    masks, errors = block_masks(6, GRID, generator=generator()), torch.rand(6, *GRID, generator=generator(1))
    patch, image, valid = positions(masks)
    values = errors.flatten()[patch] * valid
    sums, counts = (torch.zeros(6).index_add(0, image, x) for x in (values, valid.float()))
    vectorised = sums / counts.clamp(min=1)
    by_hand = [errors[i][masks[i]].mean() if masks[i].any() else torch.tensor(0.0) for i in range(6)]
    torch.testing.assert_close(vectorised, torch.stack(by_hand))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"count": -1}, "count: -1"),
        ({"grid": (0, 4)}, "grid: (0, 4)"),
        ({"share": 1.5}, "share: 1.5"),
        ({"ratio": (0.5, 0.1)}, "ratio: (0.5, 0.1)"),
        ({"ratio": (0.5, 1.1)}, "ratio: (0.5, 1.1)"),
    ],
)
def test_wrong_options(wrong, named):
    options = {"count": 4, "grid": GRID, "generator": generator(), **wrong}
    with pytest.raises(UserError) as err:
        block_masks(**options)
    assert named in str(err.value) and "valid:" in str(err.value) and "\n" not in str(err.value)


def test_positions_of_a_mask_of_other_options_are_refused():
    masks = block_masks(4, GRID, share=1.0, generator=generator())
    with pytest.raises(UserError, match="mask: .* masked patches; valid: at most .* share 0.5"):
        positions(masks)
