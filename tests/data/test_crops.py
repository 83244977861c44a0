"""Crops beside the main view: what they show, how they are drawn, when they begin, and that the main view stays."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

from agglom.data import CropOptions, MultiCrop, ShardDataModule, ViewOptions, write_index, write_shard
from agglom.errors import UserError
from agglom.plan import Partition, Stage

PLAIN = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "solarize": 0.0}
HEIGHT, WIDTH = 200, 250


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def options(**changes):
    return CropOptions(**{"global_size": 32, "local_size": 16, **changes})


def coordinates(height=HEIGHT, width=WIDTH):
    """An image whose red is the column and whose green is the row of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows, torch.full_like(rows, 9)]).to(torch.uint8)


def photo(height=40, width=40):
    """Soft noise in colours."""
    return torch.randint(60, 200, (3, height, width), dtype=torch.uint8, generator=generator(9))


def extent(crop):
    """(first column, last column, first row, last row) that a crop of `coordinates` shows, and whether mirrored."""
    red, green = crop[0].float().mean(0), crop[1].float().mean(1)
    out = []
    for line in (red, green):
        # straight from the middle of the first pixel to that of the last; the ends are soft and left out
        slope = float(line[-3] - line[2]) / (len(line) - 5)
        middle = float(line[2:-2].mean())
        out += [middle + 0.5 - abs(slope) * len(line) / 2, middle + 0.5 + abs(slope) * len(line) / 2]
    return out, bool(red[-3] < red[2])


def test_sizes_numbers_and_types():
    crops = MultiCrop(options(global_crops=3, local_crops=5))(photo(), generator())
    assert list(crops) == ["global", "local"] and all(crop.dtype == torch.uint8 for crop in crops.values())
    assert crops["global"].shape == (3, 3, 32, 32) and crops["local"].shape == (5, 3, 16, 16)
    default = MultiCrop(options())(photo(7, 90), generator())
    assert default["global"].shape == (2, 3, 32, 32) and default["local"].shape == (8, 3, 16, 16)
    none = MultiCrop(options(local_crops=0))(photo(), generator())
    assert none["local"].shape == (0, 3, 16, 16)


def test_crops_are_parts_of_the_original_within_their_bounds():
    """Read from the pixels themselves: place, area, shape and mirroring of 400 global and 1,600 local crops."""
    crop, image, rng = MultiCrop(options(**PLAIN)), coordinates(), generator()
    drawn = [crop(image, rng) for _ in range(200)]
    for name, (low, high) in (("global", (0.4, 1.0)), ("local", (0.05, 0.4))):
        areas, shapes, mirrored = [], [], []
        for one in torch.cat([crops[name] for crops in drawn]):
            assert (one[2] == 9).all()
            (left, right, top, bottom), flip = extent(one)
            assert -2 < left < right < WIDTH + 2 and -2 < top < bottom < HEIGHT + 2
            areas.append((right - left) * (bottom - top) / (WIDTH * HEIGHT))
            shapes.append((right - left) / (bottom - top))
            mirrored.append(flip)
        assert low - 0.02 < min(areas) < low + 0.05 and high - 0.1 < max(areas) < high + 0.03
        assert 3 / 4 - 0.06 < min(shapes) < 0.8 and 1.25 < max(shapes) < 4 / 3 + 0.08
        assert abs(np.mean(mirrored) - 0.5) < 4 * math.sqrt(0.25 / len(mirrored))
    # areas are drawn evenly: those of local crops always fit
    assert np.abs(np.quantile(areas, [0.25, 0.5, 0.75]) - [0.1375, 0.225, 0.3125]).max() < 0.02


def test_crops_of_an_image_differ_from_each_other():
    crops = MultiCrop(options(**PLAIN))(coordinates(), generator())
    for group in crops.values():
        assert len({tuple(crop.flatten().tolist()) for crop in group}) == len(group)


@pytest.mark.parametrize("changes", [{}, PLAIN])
def test_crops_follow_from_their_generator_alone(changes):
    crop = MultiCrop(options(**changes))
    first = crop(photo(), generator(5))
    torch.manual_seed(1)
    again, other = crop(photo(), generator(5)), crop(photo(), generator(6))
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)


def test_probabilities_are_independent_of_each_other():
    """Other colours, the same places: turning the photometric part off changes nothing of the geometry."""
    plain = MultiCrop(options(**PLAIN))(photo(), generator(2))
    solarized = MultiCrop(options(**{**PLAIN, "solarize": 1.0}))(photo(), generator(2))
    assert torch.equal(plain["local"], solarized["local"]), "local crops are never solarised"
    expected = torch.where(plain["global"] >= 128, 255 - plain["global"], plain["global"])
    assert torch.equal(solarized["global"], expected)


CHANGED = {
    "flip": lambda one, plain: torch.equal(one, plain.flip(-1)),
    "jitter": lambda one, plain: not torch.equal(one, plain),
    "grayscale": lambda one, plain: torch.equal(one[0], one[1]) and torch.equal(one[0], one[2]),
    "blur": lambda one, plain: one.float().diff(dim=-1).abs().mean() < 0.9 * plain.float().diff(dim=-1).abs().mean(),
    "solarize": lambda one, plain: not torch.equal(one, plain),
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_each_change_happens_as_often_as_it_should(name, probability):
    """Of one augmentation alone, against the same draws without it; 0 and 1 are exact."""
    without = {**PLAIN, "flip": 0.0, "sigma": (1.0, 2.0), "local_crops": 2}
    plain, changed = MultiCrop(options(**without)), MultiCrop(options(**{**without, name: probability}))
    for group in ("global", "local"):
        wanted = 0.0 if (name, group) == ("solarize", "local") else probability
        found = [
            CHANGED[name](one, two)
            for seed in range(150)
            for one, two in zip(
                changed(photo(), generator(seed))[group], plain(photo(), generator(seed))[group], strict=True
            )
        ]
        assert abs(np.mean(found) - wanted) <= 4 * math.sqrt(wanted * (1 - wanted) / len(found))


def flat(*colour):
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 12, 12)


@pytest.mark.parametrize("index", range(3))
def test_strength_of_brightness_contrast_and_saturation(index):
    """Each alone, on grey, noise or a colour: the factors cover 1 - s to 1 + s and nothing beyond."""
    one_of_them = {"strengths": tuple(0.4 * (index == other) for other in range(4)), "local_crops": 0}
    plain, crop = (MultiCrop(options(**{**PLAIN, **one_of_them, "jitter": p})) for p in (0.0, 1.0))
    image = (flat(100, 100, 100), photo() // 4 + 80, flat(160, 100, 100))[index]
    measure = (torch.mean, torch.std, lambda one: (one[0] - one[1]).mean())[index]
    factors = [
        float(measure(one.float()) / measure(two.float()))
        for seed in range(200)
        for one, two in zip(*(make(image, generator(seed))["global"] for make in (crop, plain)), strict=True)
    ]
    assert 0.58 < min(factors) < 0.64 and 1.36 < max(factors) < 1.42
    assert abs(np.mean(factors) - 1) < 0.05


def test_strength_of_hue():
    """A turn of at most a tenth of the circle: red may become orange or pink, never yellow, magenta or dark."""
    crop = MultiCrop(options(**{**PLAIN, "jitter": 1.0, "strengths": (0.0, 0.0, 0.0, 0.1), "local_crops": 0}))
    seen = torch.cat([crop(flat(200, 0, 0), generator(seed))["global"][:, :, 0, 0] for seed in range(200)]).float()
    assert (seen[:, 0] >= 198).all() and (seen[:, 1:].min(1).values <= 2).all()
    assert seen[:, 1].max() <= 122 and seen[:, 2].max() <= 122 and min(seen[:, 1].max(), seen[:, 2].max()) > 100


def test_jitter_of_strength_zero_is_none():
    plain, still = (MultiCrop(options(**{**PLAIN, "jitter": p, "strengths": (0.0, 0.0, 0.0, 0.0)})) for p in (0.0, 1.0))
    one, two = plain(photo(), generator()), still(photo(), generator())
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 200), (200, 3)])
def test_extreme_shapes_and_sizes(height, width):
    crop = MultiCrop(options(local_size=2, blur=1.0))
    for seed in range(10):
        crops = crop(photo(height, width), generator(seed))
        assert crops["global"].shape == (2, 3, 32, 32) and crops["local"].shape == (8, 3, 2, 2)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"global_size": 0, "local_crops": 0}, "data.crops.global_size: 0; valid: 1 or more"),
        ({"local_size": -1}, "data.crops.local_size: -1; valid: 1 or more"),
        ({"global_crops": 0}, "data.crops.global_crops: 0; valid: 1 or more"),
        ({"local_crops": -1}, "data.crops.local_crops: -1; valid: 0 or more"),
        ({"global_scale": (0.5, 1.1)}, "data.crops.global_scale: [0.5, 1.1]; valid: 0 < least"),
        ({"local_scale": (0.3, 0.1)}, "data.crops.local_scale: [0.3, 0.1]; valid: 0 < least"),
        ({"local_scale": (0.0, 0.1)}, "data.crops.local_scale: [0.0, 0.1]; valid: 0 < least"),
        ({"local_size": 33}, "data.crops.local_size: 33; valid: at most global_size 32"),
        (
            {"local_scale": (0.05, 0.5)},
            "data.crops.local_scale: [0.05, 0.5]; valid: at most 0.4, the least",
        ),
        ({"ratio": (2.0, 1.0)}, "data.crops.ratio: [2.0, 1.0]; valid:"),
        ({"flip": 1.5}, "data.crops.flip: 1.5; valid: a probability"),
        ({"jitter": -0.1}, "data.crops.jitter: -0.1; valid: a probability"),
        ({"grayscale": 2}, "data.crops.grayscale: 2; valid: a probability"),
        ({"blur": math.nan}, "data.crops.blur: nan; valid: a probability"),
        ({"solarize": 7}, "data.crops.solarize: 7; valid: a probability"),
        ({"strengths": (1.5, 0.0, 0.0, 0.0)}, "data.crops.strengths: [1.5, 0.0, 0.0, 0.0]; valid: brightness"),
        ({"strengths": (0.0, 0.0, 0.0, 0.6)}, "data.crops.strengths: [0.0, 0.0, 0.0, 0.6]; valid: brightness"),
        ({"sigma": (0.0, 1.0)}, "data.crops.sigma: [0.0, 1.0]; valid: 0 < least"),
        ({"start": -1}, "data.crops.start: -1; valid: an optimiser step"),
        ({"start": 1.0}, "data.crops.start: 1.0; valid: an optimiser step"),
    ],
)
def test_what_is_refused(wrong, named):
    with pytest.raises(UserError) as err:
        MultiCrop(options(**wrong))
    assert str(err.value).startswith(named) and "\n" not in str(err.value) and str(err.value).count("data.crops") == 1


def test_all_that_is_wrong_is_said_at_once_and_unused_options_of_local_crops_are_not():
    with pytest.raises(UserError, match="data.crops.flip: 2; .*; data.crops.blur: 3; valid"):
        MultiCrop(options(flip=2, blur=3))
    MultiCrop(options(local_crops=0, local_size=64, local_scale=(0.05, 0.9)))


@pytest.mark.parametrize(
    ("start", "total", "step"),
    [(0, None, 0), (7, -1, 7), (0.8, 1000, 800), (0.07, 100, 7), (0.29, 100, 29), (0.0, 50, 0), (0.999, 10, 10)],
)
def test_first_step(start, total, step):
    assert options(start=start).first_step(total) == step


@pytest.mark.parametrize("total", [None, -1])
def test_a_fraction_of_an_open_end_is_refused(total):
    with pytest.raises(UserError) as err:
        options(start=0.8).first_step(total)
    assert str(err.value).startswith("data.crops.start: 0.8; valid: an optimiser step") and "\n" not in str(err.value)


# in training


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four training shards of 20 pictures that show their own coordinates, in blue their number; 5 for validation."""
    folder = tmp_path_factory.mktemp("crops")

    def samples(start, stop):
        for number in range(start, stop):
            image = coordinates().clone()
            image[2] = number
            yield {"key": f"{number:09d}", "image": image.permute(1, 2, 0).numpy(), "cls": number}

    train = [write_shard(folder / f"train-{n:06d}.tar", samples(20 * n, 20 * n + 20)) for n in range(4)]
    write_index(folder, {"train": train, "val": [write_shard(folder / "val-000000.tar", samples(90, 95))]})
    return folder


def module(root, crops, **changes):
    return ShardDataModule(
        **{"data": str(root), "batch_size": 3, "size": 8, "num_workers": 0, "shuffle": 10, "crops": crops, **changes}
    )


def first(data, number):
    data.setup("fit")
    return list(itertools.islice(data.train_dataloader(), number))


def same(one, two):
    """Whether two batches are equal in all but their crops."""
    left, right = ({name: value for name, value in batch.items() if name != "crops"} for batch in (one, two))
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) if isinstance(left[name], torch.Tensor) else left[name] == right[name]
        for name in left
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_main_stream_is_the_same_with_and_without_crops(root, workers):
    plain, late, all_along = (
        first(module(root, crops, num_workers=workers, fields=("image", "cls")), 9)
        for crops in (None, options(start=4), options())
    )
    assert all(same(*batches) for batches in zip(plain, late, strict=True))
    assert all(same(*batches) for batches in zip(plain, all_along, strict=True))
    assert not same(plain[0], plain[1])


def test_batches_hold_crops_of_the_original_beside_the_view(root):
    """The main view sees a twentieth of each image at 8 pixels; the crops show nearly all of it, and its number."""
    wide = options(**PLAIN, global_scale=(0.9, 1.0), local_scale=(0.5, 0.6), local_crops=3)
    for batch in first(module(root, wide, view=ViewOptions(scale=(0.05, 0.06), flip=0.0)), 4):
        crops = batch["crops"]
        assert {name: (value.shape, value.dtype) for name, value in crops.items()} == {
            "global": ((3, 2, 3, 32, 32), torch.uint8),
            "local": ((3, 3, 3, 16, 16), torch.uint8),
        }
        for number, key in enumerate(batch["key"]):
            (left, right, *_), _ = extent(batch["image"][number])
            assert right - left < 0.35 * WIDTH
            for name, least in (("global", 0.85), ("local", 0.45)):
                for one in crops[name][number]:
                    (left, right, top, bottom), _ = extent(one)
                    assert (right - left) * (bottom - top) > least * WIDTH * HEIGHT
                    assert (one[2] == int(key)).all(), "crops stand in the row of their own image"


def test_crops_are_reproducible_and_differ_between_seeds_and_workers(root):
    def crops(**changes):
        return [batch["crops"]["local"] for batch in first(module(root, options(**PLAIN), **changes), 4)]

    once, again, other = crops(), crops(), crops(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(once, other, strict=True))
    places = [[extent(one) for one in batch[0]] for batch in crops(num_workers=2)]  # all images have the same
    assert places[0] != places[1]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("micros", [1, 2])
def test_crops_begin_with_the_very_batch_of_their_first_step(root, workers, micros, monkeypatch):
    monkeypatch.setattr(ShardDataModule, "micros", property(lambda self: micros))
    batches = first(module(root, options(start=3), num_workers=workers), 5 * micros)
    assert ["crops" in batch for batch in batches] == [False] * 3 * micros + [True] * 2 * micros


@pytest.mark.parametrize("workers", [0, 3])
def test_crops_of_partitions_have_their_numbers_of_images(root, workers, monkeypatch):
    monkeypatch.setattr(ShardDataModule, "micros", property(lambda self: 2))
    stages = [Stage(steps=2), Stage(partitions=[Partition(size=24, batch_size=2), Partition(size=12, batch_size=5)])]
    batches = first(module(root, options(start=1), num_workers=workers, stages=stages, margin=3), 8)
    numbers = [len(batch["crops"]["global"]) if "crops" in batch else None for batch in batches]
    assert numbers == [None, None, 3, 3, 2, 5, 2, 5]
    assert batches[-1]["image"].shape == (5, 3, 18, 18) and batches[-1]["crops"]["global"].shape[2:] == (3, 32, 32)


@pytest.fixture
def calls(monkeypatch):
    """How often crops were made of an image, over all workers (they are forked)."""
    count, real = torch.zeros(1, dtype=torch.int64).share_memory_(), MultiCrop.__call__

    def counted(self, *args):
        count.add_(1)
        return real(self, *args)

    monkeypatch.setattr(MultiCrop, "__call__", counted)
    return count


def test_nothing_is_computed_before_the_start(root, calls):
    data = module(root, options(start=4))
    data.setup("fit")
    for number, _ in enumerate(itertools.islice(data.train_dataloader(), 7)):
        assert int(calls) == 3 * max(0, number - 3)


def test_workers_compute_nothing_before_the_start(root, calls):
    """Two batches a worker are prefetched: of 12 + 6, none is of the step 30."""
    first(module(root, options(start=30), num_workers=3), 12)
    assert int(calls) == 0
    first(module(root, options(start=12), num_workers=3), 14)
    assert int(calls) >= 6, "the count goes up where workers do make crops"


def test_validation_has_no_crops(root, calls):
    data = module(root, options())
    data.setup("fit")
    assert [set(batch) for batch in data.val_dataloader()] == [{"key", "shard", "image"}] * 2
    assert int(calls) == 0


class Recorder(LightningModule):
    """Learns nothing; remembers which steps had crops, and saves the state before some steps."""

    def __init__(self, saves, folder):
        super().__init__()
        self.layer, self.seen, self.saves, self.folder = torch.nn.Linear(1, 1), [], saves, folder

    def training_step(self, batch, batch_idx):
        crops = batch.get("crops")
        shapes = None if crops is None else {name: tuple(value.shape) for name, value in crops.items()}
        self.seen.append((self.trainer.global_step, shapes))
        return self.layer(batch["image"].float().mean().view(1, 1)).sum() * 0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx % 2 and self.trainer.global_step in self.saves:
            self.trainer.save_checkpoint(self.folder / f"{self.trainer.global_step}.ckpt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("workers", "start", "step"), [(0, 5, 5), (1, 5, 5), (3, 5, 5), (1, 0.5, 4)])
def test_the_first_step_with_crops_is_exact_after_a_resume(root, tmp_path, workers, start, step):
    """8 steps of two micro-batches; saved before the start, at it and after it, each goes on as if nothing had been."""

    def run(save=(), ckpt=None):
        model, data = Recorder(save, tmp_path), module(root, options(start=start, local_crops=2), num_workers=workers)
        trainer = Trainer(
            max_steps=8, accumulate_grad_batches=2, enable_checkpointing=False, logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
            limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=ckpt)
        assert data.crops_start == step
        return model.seen

    shapes = {"global": (3, 2, 3, 32, 32), "local": (3, 2, 3, 16, 16)}
    whole = [(number, shapes if number >= step else None) for number in range(8) for _ in range(2)]
    saves = (step - 2, step, step + 1)
    assert run(saves) == whole
    for save in saves:
        assert run(ckpt=tmp_path / f"{save}.ckpt") == whole[2 * save :]


def test_a_fraction_needs_the_length_of_the_run(root):
    data = module(root, options(start=0.5))
    with pytest.raises(UserError, match="data.crops.start: 0.5; valid: an optimiser step"):
        data.setup("fit")
    assert module(root, None).crops_start is None


def test_crops_need_images(root):
    with pytest.raises(UserError) as err:
        module(root, options(), fields=("cls",))
    assert str(err.value) == "data.fields: ['cls']; valid: with image, as data.crops needs it; add it"


@pytest.mark.parametrize(("start", "parsed"), [("40", 40), ("0.8", 0.8)])
def test_configuration(root, start, parsed):
    parser = ArgumentParser()
    parser.add_class_arguments(ShardDataModule, "data")
    crops = f"{{global_size: 32, local_size: 16, local_scale: [0.05, 0.3], start: {start}}}"
    args = [f"--data.data={root}", "--data.batch_size=2", "--data.size=8", f"--data.crops={crops}"]
    data = parser.instantiate_classes(parser.parse_args(args)).data
    assert replace(data.crops.options, start=0) == options(local_scale=(0.05, 0.3))
    assert data.crops.options.start == parsed and type(data.crops.options.start) is type(parsed)
    assert parser.instantiate_classes(parser.parse_args(args[:3])).data.crops is None
