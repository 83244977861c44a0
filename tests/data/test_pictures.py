"""Pictures decoded no larger than a view needs: when, how near to the whole one, and upright; and what stays whole."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from agglom.data import EvalView, TrainView, decode_image, eval_stream, train_stream, write_index, write_shard
from agglom.data.pictures import Broken, Picture, reduction
from agglom.data.views import Window

PHOTOS = Path(__file__).parents[3] / "shared/data/coco50/images"
ORIENTATIONS = range(1, 9)


def smooth(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image, orientation=None, **options):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 92, **options}, exif=exif)
    return buffer.getvalue()


def both(data, window, size):
    """A window seen through the reduced and through the whole picture, float."""
    view = EvalView(size=size)
    reduced = view.sample({"image": Picture(data)}, window=window)["image"]
    return reduced.float(), view.cut(decode_image(data), window).float()


@pytest.mark.parametrize(
    ("height", "width", "size", "by"),
    [
        (447, 900, 224, 1),  # 447 // 2 = 223
        (448, 448, 224, 2),
        (895, 900, 224, 2),
        (896, 2000, 224, 4),
        (2000, 896, 224, 4),
        (1791, 1791, 224, 4),
        (1792, 1792, 224, 8),
        (9000, 9000, 224, 8),  # the decoder has no sixteenth
        (100, 100, 224, 1),
        (8, 8, 1, 8),
    ],
)
def test_the_box_keeps_at_least_the_pixels_of_the_view(height, width, size, by):
    assert reduction((5, 7, height, width), size) == by


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=["420", "progressive", "444"])
@pytest.mark.parametrize("by", [2, 4, 8])
def test_a_reduced_picture_looks_like_the_whole_one(by, options):
    """Smooth, so that what is left out of it is small: where the box falls on its pixels, grey values agree to 3 of
    255; elsewhere it may be half a pixel away, which is the gradient of the view."""
    data, size = jpeg(smooth(517, 643), **options), 48
    extent = size * by
    reduced, whole = both(data, Window(8 * 3, 8 * 5, extent, extent), size)
    assert (reduced - whole).abs().max() <= 3
    window = Window(13, 27, extent + 17, extent + 5, True)
    assert Picture(data).part(window[:4], size)[0].shape == (3, -(-517 // by), -(-643 // by))
    reduced, whole = both(data, window, size)
    slope = max((whole[:, 1:] - whole[:, :-1]).abs().max(), (whole[..., 1:] - whole[..., :-1]).abs().max())
    assert (reduced - whole).abs().max() <= 3 + slope


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_are_reduced_too(mode):
    reduced, whole = both(jpeg(smooth(400, 420).convert(mode)), Window(8, 16, 384, 384), 48)
    assert reduced.shape == (3, 48, 48) and (reduced - whole).abs().max() <= 3


def ramps(height, width):
    """Red says the column, green the row: 0.8 grey values a pixel."""
    rows, columns = np.mgrid[:height, :width] * 0.8
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], 2).round().astype(np.uint8))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("shape", [(256, 312), (253, 309), (249, 305)])
def test_a_box_stays_where_it_is_whichever_way_the_picture_was_held(orientation, shape):
    """To half of a decoded pixel. Sides that 8 doesn't divide leave up to 7 / 8 of one over, and the end of the stored
    picture may be the beginning of the upright one."""
    data = jpeg(ramps(*shape), orientation, quality=98, subsampling=0)
    picture, whole = Picture(data), decode_image(data)
    assert picture.shape == tuple(whole.shape) and (picture.shape[1] > picture.shape[2]) == (orientation >= 5)
    for size, by in ((100, 2), (50, 4), (25, 8)):
        for window in (Window(24, 16, 200, 200), Window(21, 27, 203, 206)):
            pixels, box = picture.part(window[:4], size)
            assert pixels.shape[1:] == tuple(-(-side // by) for side in picture.shape[1:])
            assert box[0] + box[2] <= pixels.shape[1] and box[1] + box[3] <= pixels.shape[2]
            reduced, full = both(data, window, size)
            off = (reduced - full)[:2].mean((1, 2)) / 0.8  # pixels of the whole picture
            assert off.abs().max() <= by / 2 + 0.3


def test_boxes_of_a_picture_held_upside_down():
    """By hand: 313 = 39 * 8 + 1, so the upright picture begins with a pixel of which 7 of 8 columns are not there."""
    box = (24, 16, 200, 200)
    assert Picture(jpeg(ramps(249, 313), 1)).part(box, 25)[1] == (3, 2, 25, 25)
    assert Picture(jpeg(ramps(249, 313), 3)).part(box, 25)[1] == (4, 3, 25, 25)  # 31 / 8 = 3.9, 23 / 8 = 2.9


def test_no_box_is_rounded_below_the_view():
    rng = np.random.default_rng(0)
    for _ in range(300):
        by = int(rng.choice([2, 4, 8]))
        extent = [16 * by + int(rng.integers(0, by)) for _ in range(2)]
        top, left = int(rng.integers(0, 30)), int(rng.integers(0, 30))
        data = _PLAIN if rng.random() < 0.5 else _TURNED
        pixels, box = Picture(data).part((top, left, *extent), 16)
        assert min(box[2:]) >= 16 and box[0] + box[2] <= pixels.shape[1] and box[1] + box[3] <= pixels.shape[2]


_PLAIN, _TURNED = (jpeg(smooth(167, 171), orientation) for orientation in (1, 3))


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no photos here")
def test_a_photo_looks_the_same_reduced():
    """Detail that the view can't show is left out by another filter, here where that matters most, just below half the
    size: by 5 of 255 on average, of a photo with much detail."""
    for path in sorted(PHOTOS.glob("*.jpg"))[:5]:
        data = path.read_bytes()
        side = min(Picture(data).shape[1:])
        reduced, whole = both(data, Window(0, 0, side, side), side // 2 - 3)
        assert 0 < (reduced - whole).abs().mean() <= 5


# ------------------------------------------------------------------------------------------------- decoders agree


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"keep_rgb": True}], ids=str
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_both_decoders_agree_on_every_bit(mode, options):
    data = jpeg(smooth(61, 83).convert(mode), **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode_image(data), expected)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_is_turned_upright(orientation):
    """Numpy's turns, by the standard's wording of where row 0 and column 0 are."""
    image = smooth(40, 56)
    stored = torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg(image))))).permute(2, 0, 1)
    turned = {
        1: stored,
        2: stored.flip(2),
        3: stored.flip(1, 2),
        4: stored.flip(1),
        5: stored.transpose(1, 2),
        6: stored.rot90(-1, (1, 2)),
        7: stored.flip(1, 2).transpose(1, 2),
        8: stored.rot90(1, (1, 2)),
    }
    assert torch.equal(decode_image(jpeg(image, orientation)), turned[orientation])


def test_a_truncated_picture_is_named_as_before_in_full_and_reduced():
    data = jpeg(smooth(300, 300), quality=95)
    data = data[: len(data) // 2]
    with pytest.raises(OSError, match="image file is truncated"):
        decode_image(data)
    for size in (200, 20):
        with pytest.raises(Broken, match="image file is truncated"):
            Picture(data).part((0, 0, 300, 300), size)


# --------------------------------------------------------------------------------------------------------- streams


def shards(root, pictures, **fields):
    samples = [
        {"key": f"{n:04d}", "image": data, "ext": ext, "cls": n, **fields} for n, (data, ext) in enumerate(pictures)
    ]
    write_index(root, {"train": [write_shard(root / "train-000000.tar", samples)]})
    return root


def seen(root, view, count, **options):
    stream = train_stream(root, "train", transform=view, shuffle=0, seed=3, **options)
    found = iter(stream)
    return stream, [next(found) for _ in range(count)]


class Noted(TrainView):
    """Remembers what it was given and which windows it cut."""

    def __init__(self, **options):
        super().__init__(**options)
        self.given, self.windows = [], []

    def window(self, *args):
        self.windows.append(super().window(*args))
        return self.windows[-1]

    def sample(self, sample, *args):
        self.given.append(type(sample.get("image")))
        return super().sample(sample, *args)


def test_windows_do_not_depend_on_the_reduction(tmp_path):
    """A PNG is decoded in full, a JPEG isn't, and a view of another size reduces otherwise: the same windows."""
    images = [smooth(400, 300 + 20 * n, seed=n) for n in range(4)]
    png = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        png.append((buffer.getvalue(), "png"))
    small, large, whole = Noted(size=32), Noted(size=180), Noted(size=32)
    data = shards(tmp_path / "jpg", [(jpeg(image), "jpg") for image in images])
    seen(data, small, 8)
    seen(data, large, 8)
    seen(shards(tmp_path / "png", png), whole, 8)
    assert small.windows == large.windows == whole.windows
    assert set(small.given) == {Picture} and set(whole.given) == {torch.Tensor}


@pytest.mark.parametrize("field", ["seg", "boxes"])
def test_images_under_masks_and_boxes_are_whole(tmp_path, field):
    label = {"seg": np.zeros((400, 300), np.uint8), "boxes": [{"bbox": [1, 2, 30, 40], "label": 0, "iscrowd": 0}]}
    root = shards(tmp_path, [(jpeg(smooth(400, 300)), "jpg")], **{field: label[field]})
    for fields, given in ((("image", field), torch.Tensor), (("image", "cls"), Picture)):
        view = Noted(size=32)
        seen(root, view, 2, fields=fields)
        assert set(view.given) == {given}


def test_evaluation_and_cached_features_see_whole_images(tmp_path):
    data = jpeg(smooth(400, 300))
    root = shards(tmp_path, [(data, "jpg")])
    (sample,) = eval_stream(root, "train", transform=EvalView(size=32))
    assert torch.equal(sample["image"], EvalView(size=32)(decode_image(data)))
    window = Window(10, 20, 280, 270, True)
    stream = train_stream(root, "train", transform=TrainView(size=32), shuffle=0)
    stream.cached = lambda raw, generator: (window, {})
    assert torch.equal(next(iter(stream))["image"], EvalView(size=32).cut(decode_image(data).contiguous(), window))


@pytest.mark.parametrize("part", [0.5, 0.001])
def test_a_broken_sample_is_counted_and_leaves_the_others_their_views(tmp_path, part):
    """Wherever it breaks, in its header or in its body."""
    data = [(jpeg(smooth(400, 300, seed=n)), "jpg") for n in range(7)]
    _, expected = seen(shards(tmp_path / "good", data), TrainView(size=32), 7)
    data[2] = (data[2][0][: int(len(data[2][0]) * part)], "jpg")
    stream, found = seen(shards(tmp_path / "one", data), TrainView(size=32), 6, max_bad_fraction=0.5)
    assert (stream.bad, stream.seen) == (1, 7)
    del expected[2]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(found, expected, strict=True))
