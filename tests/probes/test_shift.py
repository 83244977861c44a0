"""Errors under shifts: models that move along, models that don't, and errors worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from agglom.errors import UserError
from agglom.features import Features, InputSpec
from agglom.probes.shift import shift_errors

WHOLE = [(8, 0), (0, 8), (-8, 0), (0, -16), (8, -8)]
PARTS = [(4, 0), (0, -4), (-4, 12), (2, -6)]


def model(function):
    """A backbone of stride 8 with this map and nothing else."""

    class Model:
        input = InputSpec(size=None, stride=8)

        def __call__(self, images):
            return Features(None, function(images))

    return Model()


def ramp(count, height=64, width=64):
    """Images that grow in a line, in another direction each."""
    slopes = torch.randn(count, 3, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    return slopes[:, :, 0] * rows + slopes[:, :, 1] * columns


def test_a_map_that_follows_has_no_error():
    """Means of cells follow by whole cells whatever the image; between cells they do where the image is linear."""
    means = model(lambda x: F.avg_pool2d(x, 8))
    noise = torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    assert shift_errors(means, noise, WHOLE).abs().max() < 1e-5
    assert shift_errors(means, noise, PARTS).min() > 0.3, "a part of a cell of noise can't be interpolated"
    found = shift_errors(means, ramp(3), WHOLE + PARTS)
    assert found.shape == (9, 3) and found.abs().max() < 1e-5, "mirrored pixels count nowhere"


def test_shifts_are_of_pixels_whatever_the_model_resizes_to():
    twice = model(lambda x: F.avg_pool2d(F.interpolate(x, scale_factor=2, mode="nearest"), 8))  # cells of 4 pixels
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert shift_errors(twice, noise, [(4, 0), (0, -8)]).abs().max() < 1e-5
    assert shift_errors(twice, noise, [(2, 0)]).min() > 0.3


def test_what_lies_beyond_the_edge_is_mirrored():
    """Stripes moved along themselves stay what they are, for a model that sees the whole image too."""
    wide = model(lambda x: F.avg_pool2d(x, 8) * x.mean((1, 2, 3), keepdim=True))
    stripes = torch.rand(2, 3, 64, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, -1, 64)
    assert shift_errors(wide, stripes, [(0, 8), (0, -13)]).abs().max() < 1e-5


def test_a_map_bound_to_its_place_has_the_error_of_that_place():
    """The map is its own column 0..7 whatever the image. Moved by one cell it is off by 1 at columns 1 to 7, whose
    deviation is sqrt((9 + 4 + 1 + 0 + 1 + 4 + 9) / 7) = 2; by two cells off by 2 at six, deviation sqrt(35 / 12); by
    half a cell off by 1/2 at columns 1 to 6, with the same deviation."""
    columns = model(lambda x: torch.arange(8.0).expand(len(x), 2, 8, 8))
    found = shift_errors(columns, torch.rand(2, 3, 64, 64), [(0, 8), (0, -16), (0, 4), (8, 0)])
    expected = torch.tensor([1 / 2, 2 / math.sqrt(35 / 12), 0.5 / math.sqrt(35 / 12), 0.0])
    torch.testing.assert_close(found, expected[:, None].expand(-1, 2))


def test_maps_without_anything_in_common_and_without_anything():
    generator = torch.Generator().manual_seed(0)
    drawn = model(lambda x: torch.randn(len(x), 192, 8, 8, generator=generator))
    assert shift_errors(drawn, torch.rand(20, 3, 64, 64), [(8, 0)]).mean() == pytest.approx(math.sqrt(2), abs=0.02)
    same = model(lambda x: torch.ones(len(x), 4, 8, 8))
    assert shift_errors(same, torch.rand(2, 3, 64, 64), [(8, 0)]).isnan().all()
    offset = model(lambda x: F.avg_pool2d(x, 8) + torch.arange(8.0) / 8 + 100)
    plain = model(lambda x: F.avg_pool2d(x, 8) + torch.arange(8.0) / 8)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    torch.testing.assert_close(*(shift_errors(m, images, [(0, 8)]) for m in (offset, plain)), rtol=1e-3, atol=0)


def test_refusals():
    images = torch.rand(1, 3, 16, 16)
    with pytest.raises(UserError, match="16 pixels; valid: less than the image's 16"):
        shift_errors(model(lambda x: F.avg_pool2d(x, 8)), images, [(0, 16)])
    with pytest.raises(UserError, match=r"\(12, 0\) pixels leave no overlap on a grid of \(2, 2\)"):
        shift_errors(model(lambda x: F.avg_pool2d(x, 8)), images, [(12, 0)])
    with pytest.raises(UserError, match="no feature map"):
        shift_errors(model(lambda x: None), images, [(8, 0)])
