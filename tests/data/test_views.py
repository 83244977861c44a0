"""Views: what is cut out, how it is distributed, and that image, mask and boxes stay on top of each other."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from agglom.data import EvalView, TrainView
from agglom.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator())


def test_eval_view_of_the_right_size_is_the_image():
    image = noise(24, 24)
    assert torch.equal(EvalView(size=24)(image), image)


def test_eval_view_cuts_the_centre_without_resampling_it():
    image = noise(24, 30)
    assert torch.equal(EvalView(size=24)(image), image[:, :, 3:27])


def test_eval_view_resizes_the_centre_square():
    image = noise(40, 61)
    seen = EvalView(size=16)(image)
    expected = F.interpolate(image[None, :, :, 10:50].float(), (16, 16), mode="bicubic", antialias=True)[0]
    assert seen.dtype == torch.uint8 and seen.shape == (3, 16, 16)
    assert (seen.float() - expected.clamp(0, 255)).abs().max() <= 1.5  # fixed-point arithmetic and rounding


def test_train_view_without_crop_or_flip_is_the_image():
    view = TrainView(size=20, scale=(1.0, 1.0), flip=0)
    image = noise(20, 20)
    assert all(torch.equal(view(image, generator(seed)), image) for seed in range(20))
    assert torch.equal(TrainView(size=20, scale=(1, 1), flip=1)(image), image.flip(-1))


def test_train_view_follows_from_its_generator_alone():
    view, image = TrainView(size=8), noise(32, 48)
    first = view(image, generator(5))
    torch.manual_seed(1)
    assert torch.equal(view(image, generator(5)), first) and not torch.equal(view(image, generator(6)), first)
    assert first.shape == (3, 8, 8) and first.dtype == torch.uint8 and first.is_contiguous()


def test_crops_are_distributed_as_torchvision_distributes_them():
    """Area, aspect and place of 4,000 crops against RandomResizedCrop's, by their quantiles."""
    height, width, scale, ratio = 90, 120, (0.2, 0.9), (0.6, 1.8)
    view, rng = TrainView(size=8, scale=scale, ratio=ratio), generator()
    ours = [view.window(height, width, rng) for _ in range(4000)]
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(8, scale, ratio)
    drawn = [reference.make_params([torch.empty(3, height, width)]) for _ in range(4000)]
    theirs = [(p["top"], p["left"], p["height"], p["width"]) for p in drawn]

    def quantiles(windows):
        top, left, h, w = np.array([window[:4] for window in windows], float).T
        measures = h * w / (height * width), np.log(w / h), top / (height - h + 1), left / (width - w + 1)
        return np.array([np.quantile(measure, [0.1, 0.25, 0.5, 0.75, 0.9]) for measure in measures])

    assert np.abs(quantiles(ours) - quantiles(theirs)).max() < 0.05
    for top, left, h, w, *_ in ours:
        assert 0 <= top <= height - h and 0 <= left <= width - w
        assert scale[0] - 0.02 < h * w / (height * width) < scale[1] + 0.02
        assert ratio[0] - 0.03 < w / h < ratio[1] + 0.05
    assert abs(np.mean([window.flip for window in ours]) - 0.5) < 4 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize(("height", "width"), [(4, 400), (400, 4), (1, 1), (1, 9)])
def test_extreme_shapes(height, width):
    view = TrainView(size=8)
    for seed in range(20):
        window = view.window(height, width, generator(seed))
        assert 0 < window.height <= height and 0 < window.width <= width
        assert view(noise(height, width), generator(seed)).shape == (3, 8, 8)
    assert EvalView(size=8)(noise(height, width)).shape == (3, 8, 8)


def scene():
    """A bright rectangle on black, with its mask and box."""
    seg = torch.zeros(40, 60, dtype=torch.uint8)
    seg[12:28, 20:44] = 7
    return {
        "key": "a",
        "image": ((seg > 0) * 255).to(torch.uint8).expand(3, -1, -1).contiguous(),
        "seg": seg,
        "boxes": [{"bbox": [20, 12, 24, 16], "label": 7, "iscrowd": 0}],
    }


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("view", [TrainView(size=64, scale=(0.3, 1.0)), EvalView(size=64)], ids=["train", "eval"])
def test_image_mask_and_boxes_stay_together(view, seed):
    sample = scene()
    out = view.sample(sample, generator(seed))
    assert out["seg"].shape == (64, 64) and set(out["seg"].unique().tolist()) <= {0, 7}
    # edges of the bicubic image are soft for a pixel or two
    assert ((out["image"][0] > 127) != (out["seg"] > 0)).float().mean() < 0.05
    rows, columns = torch.nonzero(out["seg"], as_tuple=True)
    if len(rows) == 0:
        assert out["boxes"] == []
        return
    (box,) = out["boxes"]
    x, y, w, h = box["bbox"]
    tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(np.array([x, y, x + w, y + h]) - np.array(tight)).max() < 1.01
    assert (box["label"], box["iscrowd"]) == (7, 0)
    assert sample["boxes"][0]["bbox"] == [20, 12, 24, 16], "the sample given must not change"


def test_sample_and_call_see_the_same():
    view, sample = TrainView(size=16), scene()
    assert torch.equal(view.sample(sample, generator(3))["image"], view(sample["image"], generator(3)))


def test_boxes_outside_are_gone_and_boxes_alone_are_refused():
    sample = {**scene(), "boxes": [{"bbox": [0, 0, 5, 40], "label": 1, "iscrowd": 0}]}
    assert EvalView(size=40).sample(sample)["boxes"] == []
    with pytest.raises(UserError, match="needs 'image'"):
        EvalView(size=40).sample({"key": "a", "boxes": []})
    assert EvalView(size=40).sample({"key": "a", "cls": 1}) == {"key": "a", "cls": 1}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"size": 0}, "size: 0"),
        ({"scale": (0, 1)}, "view.scale"),
        ({"scale": (0.5, 1.1)}, "view.scale"),
        ({"scale": (0.9, 0.5)}, "view.scale"),
        ({"ratio": (2, 1)}, "view.ratio"),
        ({"flip": 1.5}, "view.flip: 1.5"),
    ],
)
def test_wrong_options(wrong, named):
    with pytest.raises(UserError) as err:
        TrainView(**{"size": 8, **wrong})
    assert named in str(err.value) and "valid:" in str(err.value) and "\n" not in str(err.value)
