"""Mosaic: what is packed comes out again at the same place; places, padding and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.features import Features, InputSpec
from agglom.looking import look
from agglom.mosaic import pack, places, unpack


def pixel_teacher(images, stride):
    """A teacher whose map is its image, seen cell by cell: (B, 3 * stride^2, H / stride, W / stride)."""
    return torch.nn.functional.pixel_unshuffle(images, stride)


@settings(max_examples=60, deadline=None)
@given(
    stride=st.sampled_from([1, 2, 4]),
    cells=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    canvas=st.tuples(st.integers(6, 17), st.integers(6, 17)),
    number=st.integers(1, 11),
)
def test_unpack_undoes_pack_bit_by_bit(stride, cells, canvas, number):
    spec = InputSpec(size=(canvas[0] * stride, canvas[1] * stride), stride=stride)
    size = (cells[0] * stride, cells[1] * stride)
    if places(size, spec) == (1, 1):
        return
    images = torch.rand(number, 3, *size)
    tiles = pack(images, spec)
    down, beside = places(size, spec)
    assert tiles.shape == (-(-number // (down * beside)), 3, *spec.size)
    back = unpack(pixel_teacher(tiles, stride), number, size, spec)
    # out - mean + mean costs a rounding; cells of a map are taken as they are
    torch.testing.assert_close(back, pixel_teacher(images, stride), rtol=0, atol=1e-6)
    inside = unpack(pixel_teacher(pack(torch.zeros_like(images), spec), stride), number, size, spec)
    assert torch.equal(inside, torch.zeros_like(inside)), "no padding may reach an image's own cells"


def test_432_pixels_on_sams_canvas():
    """RADIOv2.5: 2 x 2 cells of 512 with 80 pixels of padding each."""
    spec = InputSpec(size=(1024, 1024), stride=16, mean=(0.1, 0.2, 0.3))
    assert places((432, 432), spec) == (2, 2)
    tiles = pack(torch.ones(5, 3, 432, 432), spec)
    assert tiles.shape == (2, 3, 1024, 1024)
    first, second = tiles
    assert (first[:, 432:512] == first[:, 432:512, 432:512].mean((1, 2), keepdim=True)).all()
    torch.testing.assert_close(first[:, 450, 450], torch.tensor(spec.mean))  # the teacher's 0 after its normalisation
    assert (first[:, 512:944, 512:944] - 1).abs().max() < 1e-6
    torch.testing.assert_close(second[:, 700, 700], torch.tensor(spec.mean))  # three places of the second stay empty


@pytest.mark.parametrize(
    ("size", "expected"),
    [((256, 256), (4, 4)), ((512, 512), (2, 2)), ((528, 528), (1, 1)), ((1024, 512), (1, 2)), ((2048, 2048), (1, 1))],
)
def test_places(size, expected):
    assert places(size, InputSpec(size=(1024, 1024), stride=16)) == expected


def test_refusals():
    with pytest.raises(ValueError, match="fixed size"):
        places((32, 32), InputSpec(size=None, stride=16))
    with pytest.raises(ValueError, match=r"\(40, 40\).*whole cells of 16"):
        places((40, 40), InputSpec(size=(128, 128), stride=16))


class Looking:
    """A teacher that remembers what it was shown."""

    def __init__(self, stride):
        self.stride, self.shown = stride, []

    def __call__(self, images):
        self.shown.append(images)
        return Features(images.mean((2, 3)), pixel_teacher(images, self.stride))


def test_look_shows_a_mosaic_only_where_it_gains():
    spec = InputSpec(size=(64, 64), stride=8)
    images = torch.rand(5, 3, 32, 32)
    teacher = Looking(8)
    seen = look(teacher, spec, images, resolution=(32, 32), grid=(4, 4), mosaic=True)
    assert [x.shape for x in teacher.shown] == [(2, 3, 64, 64)] and seen.summary is None
    torch.testing.assert_close(seen.spatial, pixel_teacher(images, 8), rtol=0, atol=1e-6)
    teacher = Looking(8)
    look(teacher, spec, images, resolution=(48, 48), grid=(6, 6), mosaic=True)
    assert teacher.shown[0] is images  # left to the teacher's own resize
    teacher = Looking(8)
    look(teacher, spec, images, resolution=(32, 32), grid=(4, 4))
    assert teacher.shown[0] is images


def test_look_matches_the_grid_of_teachers_of_any_size():
    """Student p16 at 432 and teacher p14: 27 cells both, so the teacher sees 378."""
    teacher = Looking(14)
    spec = InputSpec(size=None, stride=14)
    seen = look(teacher, spec, torch.rand(1, 3, 432, 432), resolution=(432, 432), grid=(27, 27))
    assert teacher.shown[0].shape[-2:] == (378, 378) and seen.spatial.shape[-2:] == (27, 27)
    same = torch.rand(1, 3, 378, 378)
    look(teacher, spec, same, resolution=(378, 378), grid=(27, 27))
    assert teacher.shown[-1] is same
