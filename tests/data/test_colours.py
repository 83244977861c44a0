"""Colours: what is drawn, one picture and a whole batch alike, and views that are the same wherever they are made."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as TF

from agglom.data import (
    CropOptions,
    MultiCrop,
    ShardDataModule,
    TrainView,
    ViewOptions,
    arrived,
    view_options,
    write_index,
    write_shard,
)
from agglom.data.colours import UNCHANGED, ColourOptions, change, change_batch, draw, pack, turn_hue
from agglom.errors import UserError

ALL = ColourOptions(jitter=0.8, grayscale=0.2, blur=0.5, solarize=0.2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photos(count=48, side=40):
    """Soft colours, uint8."""
    coarse = torch.rand(count, 3, 6, 6, generator=generator(9))
    return (torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 255).round().byte()


def one_by_one(image, recipe):
    """torchvision's functions on floats in [0, 1], a picture at a time."""
    brightness, contrast, saturation, hue, grey, sigma, solarize, *order = recipe
    for part in order:
        image = (
            lambda x: TF.adjust_brightness(x, brightness),
            lambda x: TF.adjust_contrast(x, contrast),
            lambda x: TF.adjust_saturation(x, saturation),
            lambda x: TF.adjust_hue(x, hue),
        )[int(part)](image)
    image = TF.rgb_to_grayscale(image, num_output_channels=3) if grey else image
    if sigma:
        width = 2 * min(math.ceil(3 * sigma), image.shape[-1] - 1) + 1
        image = TF.gaussian_blur(image, [width, width], [sigma, sigma])
    return TF.solarize(image, 128 / 255) if solarize else image


def test_a_batch_is_changed_as_torchvision_changes_each_picture():
    images, rng = photos().float() / 255, generator()
    recipes = [draw(ALL, rng) for _ in images]
    together = change_batch(images, torch.stack([pack(recipe, ALL, 40) for recipe in recipes]))
    assert len({recipe[7:] for recipe in recipes}) > 15, "orders of the jitter's parts"
    for image, recipe, ours in zip(images, recipes, together, strict=True):
        theirs = one_by_one(image, recipe)
        # a value next to the threshold of solarisation may fall on either side
        apart = ((ours - theirs).abs() > 2e-4) & ((theirs - 0.5).abs() > 0.01) & ((ours - 0.5).abs() > 0.01)
        assert apart.float().mean() < 1e-3, recipe


class NoReads(TorchDispatchMode):
    """Fails where a device would have to tell the host a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


def test_a_batch_on_a_device_never_waits_for_the_host():
    packed = torch.stack([pack(draw(ALL, generator(seed)), ALL, 40) for seed in range(4)])
    with NoReads():
        change_batch(torch.rand(4, 3, 40, 40), packed)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            bool(packed[0, 0] > 0)


def test_a_worker_makes_the_same_but_for_its_256_steps():
    images, rng, options = photos(), generator(1), replace(ALL, solarize=0.0)
    recipes = [draw(options, rng) for _ in images]
    alone = torch.stack([change(image, recipe) for image, recipe in zip(images, recipes, strict=True)])
    together = change_batch(images.float() / 255, torch.stack([pack(recipe, options, 40) for recipe in recipes]))
    apart = (alone - together * 255).abs()
    assert apart.max() < 8 and apart.mean() < 1.5


def test_the_recipe_without_change():
    images = photos(4)
    assert all(torch.equal(change(image, UNCHANGED), image) for image in images)
    packed = torch.stack([pack(UNCHANGED, ALL, 40)] * 4)
    assert torch.equal(change_batch(images.float() / 255, packed), images.float() / 255)


@pytest.mark.parametrize(
    ("colour", "third", "half"),
    [((1, 0, 0), (0, 1, 0), (0, 1, 1)), ((1, 1, 0), (0, 1, 1), (0, 0, 1)), ((0.4, 0.4, 0.4),) * 3],
)
def test_hue_turns_around_the_circle(colour, third, half):
    """Red, green, cyan; yellow, cyan, blue; grey has none."""
    image = torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1)
    for turn, wanted in ((1 / 3, third), (0.5, half), (-2 / 3, third), (1.0, colour)):
        found = turn_hue(image, torch.tensor(turn)).flatten()
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32), atol=1e-6, rtol=0)


def test_blur_is_a_gaussian_of_its_width():
    """A white line on black spreads with the standard deviation asked for, and keeps its sum."""
    line = torch.zeros(3, 33, 33, dtype=torch.uint8)
    line[:, :, 16] = 250
    recipe = (*UNCHANGED[:5], 1.5, *UNCHANGED[6:])
    for blurred in (
        change(line, recipe)[0, 16].double(),
        255 * change_batch(line[None] / 255, pack(recipe, ALL, 33)[None])[0, 0, 16].double(),
    ):
        places = torch.arange(33) - 16
        assert abs(float(blurred.sum()) - 250) < 5
        torch.testing.assert_close(blurred, blurred.flip(0), atol=1e-3, rtol=0)
        assert abs(float((blurred * places**2).sum() / blurred.sum()) - 1.5**2) < 0.1
    assert torch.equal(change(line.transpose(1, 2), recipe), change(line, recipe).transpose(1, 2))


def test_how_often_and_how_much():
    drawn = np.array([draw(ALL, generator(seed)) for seed in range(3000)])
    jittered = drawn[:, 0] != 1
    for found, wanted in (
        (jittered, 0.8), (drawn[:, 4] == 1, 0.2), (drawn[:, 5] > 0, 0.5), (drawn[:, 6] == 1, 0.2),
        (drawn[:, 7] == 2, 0.25),
    ):  # fmt: skip
        assert abs(found.mean() - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / 3000)
    for place, strength, middle in ((0, 0.4, 1), (1, 0.4, 1), (2, 0.2, 1), (3, 0.1, 0)):
        values = drawn[jittered, place] - middle
        assert np.abs(values).max() <= strength + 1e-6 and abs(values.mean()) < 0.06 * strength
        assert abs(values.std() - strength / math.sqrt(3)) < 0.05 * strength, "uniform"
    sigmas = drawn[drawn[:, 5] > 0, 5]
    assert 0.1 <= sigmas.min() < 0.13 and 1.97 < sigmas.max() <= 2.0


def test_one_probability_can_be_changed_and_the_rest_stays_the_same():
    for seed in range(50):
        one, two = draw(ALL, generator(seed)), draw(replace(ALL, blur=0.0), generator(seed))
        assert one[:5] == two[:5] and one[6:] == two[6:] and two[5] == 0


def test_a_view_keeps_its_crop_and_is_made_again_bit_for_bit():
    image = photos(1, 60)[0]
    plain, coloured = TrainView(size=24), TrainView(size=24, colours=replace(ALL, jitter=1.0))
    for seed in range(10):
        window = coloured.window(60, 60, generator(seed))
        assert window[:5] == plain.window(60, 60, generator(seed))[:5] and window.colours is not None
        seen = coloured(image, generator(seed))
        assert torch.equal(coloured.cut(image, window), seen)
        assert torch.equal(coloured.sample({"image": image}, window=window)["image"], seen)
        assert torch.equal(change(plain(image, generator(seed)), window.colours), seen)


@pytest.fixture
def root(tmp_path):
    samples = [{"key": f"{n:06d}", "image": image.permute(1, 2, 0).numpy()} for n, image in enumerate(photos(24, 48))]
    shards = [write_shard(tmp_path / f"train-{k}.tar", samples[k::2]) for k in range(2)]
    write_index(tmp_path, {"train": shards})
    return tmp_path


@pytest.mark.parametrize("margin", [0, 4])
def test_left_to_a_device_it_is_the_same_picture(root, monkeypatch, margin):
    """The batch of a run on an accelerator, which brings recipes along, becomes that of a run on a CPU."""
    colours = ColourOptions(jitter=1.0, grayscale=0.2, blur=0.5)
    crops = CropOptions(global_size=24, local_size=12, local_crops=3, solarize=0.0)

    def batch(device):
        data = ShardDataModule(
            data=str(root), batch_size=12, size=24, num_workers=0, val_split=None, view=ViewOptions(colours=colours),
            crops=crops, margin=margin,
        )  # fmt: skip
        monkeypatch.setattr(data, "_device", lambda: device)
        data.setup("fit")
        return next(iter(data.train_dataloader()))

    here, there = batch("cpu"), batch("mps")
    assert "colours" not in here and here["crops"].keys() == {"global", "local"}
    assert there["colours"].shape == (12, 11 + 13) and there["crops"]["local_colours"].shape == (12, 3, 11 + 13)
    assert not torch.equal(here["image"], there["image"]), "not changed yet"
    assert here["key"] == there["key"]
    here, there = arrived(here), arrived(there)
    assert here.keys() == there.keys() and there["crops"].keys() == {"global", "local"}
    for one, two in zip(
        (here["image"], *here["crops"].values()), (there["image"], *there["crops"].values()), strict=True
    ):
        assert one.shape == two.shape and (one - two).abs().max() < 0.04 and (one - two).abs().mean() < 0.006


def test_options_are_read_and_refused():
    assert view_options({"scale": [1, 1], "ratio": [1, 1], "flip": 0}).fixed
    read = view_options({"colours": {"jitter": 0.5, "strengths": [0.1, 0.1, 0.1, 0.0]}})
    assert read.colours == ColourOptions(jitter=0.5, strengths=(0.1, 0.1, 0.1, 0.0)) and not read.fixed
    for wrong, words in (
        ({"jitter": 2.0}, "view.colours.jitter: 2.0; valid: a probability"),
        ({"sigma": (0.0, 1.0)}, "view.colours.sigma: \\[0.0, 1.0\\]; valid: 0 < least"),
    ):
        with pytest.raises(UserError, match=words):
            TrainView(size=8, colours=ColourOptions(**wrong))


def test_crops_without_local_ones_can_be_left_to_a_device():
    crop = MultiCrop(CropOptions(global_size=8, local_size=4, local_crops=0))
    crop.aside = True
    batch = {name: value[None] for name, value in crop(photos(1)[0], generator()).items()}
    seen = arrived({"image": photos(1), "crops": batch})["crops"]
    assert seen["global"].shape == (1, 2, 3, 8, 8) and seen["local"].shape == (1, 0, 3, 4, 4)
