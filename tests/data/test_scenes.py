"""Fashion scenes: a pure function of seed and index; masks, boxes, class and caption agree with each other and with an
independent reading of the pixels; no garment in two splits; the same bytes whatever the workers; one-line errors.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from agglom.data import garments as garments_module
from agglom.data import read_index
from agglom.data.garments import CLASSES, Garments, load_garments
from agglom.data.scenes import COLOURS, PROMPTS, render, write_scenes
from agglom.errors import UserError


def write_idx(folder: Path, *, train: np.ndarray, test: np.ndarray, packed: bool = False) -> Path:
    """Fashion-MNIST's four files with these images; labels count up modulo ten."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in (("train", train), ("t10k", test)):
        labels = (np.arange(len(images)) % 10).astype(np.uint8)
        files = {
            f"{name}-images-idx3-ubyte": struct.pack(">4I", 2051, len(images), 28, 28) + images.tobytes(),
            f"{name}-labels-idx1-ubyte": struct.pack(">2I", 2049, len(labels)) + labels.tobytes(),
        }
        for file, data in files.items():
            if packed:
                (folder / f"{file}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / file).write_bytes(data)
    return folder


def squares(count: int, seed: int = 0) -> np.ndarray:
    """Bright rectangles on black, each with its own shape and cloth."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, 28, 28), dtype=np.uint8)
    for image in images:
        top, left = rng.integers(1, 9, 2)
        height, width = rng.integers(10, 19, 2)
        image[top : top + height, left : left + width] = rng.integers(120, 256, (height, width))
    return images


@pytest.fixture(scope="module")
def garments() -> Garments:
    return Garments(squares(60), (np.arange(60) % 10).astype(np.uint8))


@pytest.fixture(scope="module")
def scenes(garments: Garments) -> list[dict]:
    return [render(garments, 3, index) for index in range(150)]


def test_pure(garments: Garments, scenes: list[dict]) -> None:
    again = render(garments, 3, 77)
    for key, value in scenes[77].items():
        assert np.array_equal(again[key], value), key
    assert not np.array_equal(render(garments, 4, 77)["image"], scenes[77]["image"])
    assert not np.array_equal(scenes[76]["image"], scenes[77]["image"])


@pytest.mark.parametrize("size", [48, 64, 100])
def test_any_size(garments: Garments, size: int) -> None:
    scene = render(garments, 0, 5, size)
    assert scene["image"].shape == (size, size, 3) and scene["image"].dtype == np.uint8
    assert scene["seg"].shape == (size, size) and scene["seg"].dtype == np.uint8


def test_class_is_the_largest_visible_area(scenes: list[dict]) -> None:
    for scene in scenes:
        areas = [(scene["seg"] == 1 + label).sum() for label in range(10)]
        assert areas[scene["cls"]] == max(areas) > 0


def test_boxes_hold_the_visible_garments_tightly(scenes: list[dict]) -> None:
    for scene in scenes:
        covered = np.zeros_like(scene["seg"], dtype=bool)
        for entry in scene["boxes"]:
            x, y, w, h = entry["bbox"]
            part = scene["seg"][y : y + h, x : x + w] == entry["label"] + 1
            assert part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()
            covered[y : y + h, x : x + w] |= part
        assert np.array_equal(covered, scene["seg"] > 0)  # nothing of a garment lies outside of its box


def test_the_mask_is_where_the_colour_is(scenes: list[dict]) -> None:
    """Garments are saturated and backgrounds muted, so the pixels alone tell them apart."""
    chroma = [np.ptp(scene["image"].astype(int), axis=2) for scene in scenes]
    guess = np.stack(chroma) > 95
    mask = np.stack([scene["seg"] > 0 for scene in scenes])
    assert (guess & mask).sum() / (guess | mask).sum() > 0.85


def test_captions_say_what_is_there(scenes: list[dict]) -> None:
    names = "|".join(sorted(CLASSES, key=len, reverse=True))
    phrase = re.compile(rf"\b(an?) ({'|'.join(COLOURS)}) ({names})\b")
    for scene in scenes:
        found = phrase.findall(scene["txt"])
        assert sorted(CLASSES.index(name) for _, _, name in found) == sorted(box["label"] for box in scene["boxes"])
        assert found[0][2] == CLASSES[scene["cls"]]
        assert all(article == ("an" if colour == "orange" else "a") for article, colour, _ in found)


def test_relations_agree_with_the_boxes(scenes: list[dict]) -> None:
    axes = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    checked = 0
    for scene in scenes:
        relation = next((word for word in axes if f" {word} " in scene["txt"]), None)
        labels = [box["label"] for box in scene["boxes"]]
        if relation is None or len(set(labels)) != 2 or len(labels) != 2:
            continue
        axis, sign = axes[relation]
        first, second = sorted(scene["boxes"], key=lambda box: box["label"] != scene["cls"])
        centres = [entry["bbox"][axis] + entry["bbox"][2 + axis] / 2 for entry in (first, second)]
        assert (centres[0] - centres[1]) * sign > 0
        checked += 1
    assert checked > 10


def test_counts_scales_and_colours_are_spread(garments: Garments, scenes: list[dict]) -> None:
    counts = np.bincount([len(scene["boxes"]) for scene in scenes], minlength=5) / len(scenes)
    assert counts[0] == 0 and (counts[1:] > 0.04).all() and counts[5:].sum() == 0
    assert {colour for colour in COLOURS for scene in scenes if colour in scene["txt"]} == set(COLOURS)
    assert all("{}" in prompt for prompt in PROMPTS)


def test_no_garment_in_two_splits(tmp_path: Path) -> None:
    train, test = squares(20, seed=1), squares(30, seed=2)
    test[4] = train[7]  # one that leaked
    test[9] = test[8]  # and one that is there twice
    splits = load_garments(write_idx(tmp_path, train=train, test=test, packed=True))
    keys = {name: [image.tobytes() for image in split.images] for name, split in splits.items()}
    assert len(keys["train"]) == 20 and len(keys["val"]) + len(keys["test"]) == 28
    assert len(set(keys["val"])) == len(keys["val"]) and len(set(keys["test"])) == len(keys["test"])
    assert not set(keys["train"]) & set(keys["val"])
    assert not (set(keys["train"]) | set(keys["val"])) & set(keys["test"])
    assert splits["val"].labels.tolist() == [row % 10 for row in (0, 3, 7, 11, 14, 17, 20, 23, 26, 29)]


def test_real_garments_are_split_by_item() -> None:
    if not garments_module.DEBIAN.is_dir():
        pytest.skip("the package dataset-fashion-mnist is not installed")
    splits = load_garments()
    keys = {name: {image.tobytes() for image in split.images} for name, split in splits.items()}
    assert not keys["train"] & keys["val"] and not keys["train"] & keys["test"] and not keys["val"] & keys["test"]
    assert len(splits["train"].images) == 60000 and len(keys["val"]) > 3000 and len(keys["test"]) > 6000


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_bytes_do_not_depend_on_workers_and_a_second_run_reuses(tmp_path: Path) -> None:
    source = write_idx(tmp_path / "source", train=squares(20), test=squares(20, seed=1))
    options = {"source": source, "train": 10, "val": 4, "test": 5, "shard_size": 4}
    for workers in (1, 2):
        index = read_index(write_scenes(tmp_path / str(workers), workers=workers, **options).parent)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    assert index.counts == {"train": 10, "val": 4, "test": 5}
    assert [shard.count for shard in index.shards("train")] == [4, 4, 2]
    assert index.classes == CLASSES and index.seg_classes == ("background", *CLASSES)
    before = (tmp_path / "1" / "train-000000.tar").stat().st_mtime_ns
    write_scenes(tmp_path / "1", workers=1, **options)
    assert (tmp_path / "1" / "train-000000.tar").stat().st_mtime_ns == before


def test_splits_differ_in_layout(tmp_path: Path) -> None:
    images = squares(9)
    source = write_idx(tmp_path / "source", train=images, test=squares(9, seed=1))
    write_scenes(tmp_path / "out", source=source, train=2, val=2, test=2, workers=1)
    tars = {(tmp_path / "out" / f"{split}-000000.tar").read_bytes() for split in ("train", "val", "test")}
    assert len(tars) == 3


def test_another_data_set_is_not_overwritten(tmp_path: Path) -> None:
    source = write_idx(tmp_path / "source", train=squares(9), test=squares(9, seed=1))
    write_scenes(tmp_path / "out", source=source, train=2, val=1, test=1, workers=1)
    with pytest.raises(UserError, match=r"out: .*train 2 instead of 3\); choose or empty") as caught:
        write_scenes(tmp_path / "out", source=source, train=3, val=1, test=1, workers=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("train", -1), ("size", 8), ("seed", -1), ("shard_size", 0), ("workers", 0)]
)
def test_values_out_of_range(tmp_path: Path, key: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"{key}: {value}; valid: \d+ or more"):
        write_scenes(tmp_path / "out", **{key: value})


def test_a_missing_source_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train-images-idx3-ubyte"):
        load_garments(tmp_path)


def test_a_broken_source_is_no_idx_file(tmp_path: Path) -> None:
    write_idx(tmp_path, train=squares(3), test=squares(3))
    file = tmp_path / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="is not an idx file of images"):
        load_garments(tmp_path)


def test_without_any_source_one_message_gives_three_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torchvision.datasets

    def no_network(*args: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(garments_module, "DEBIAN", tmp_path / "absent")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", no_network)
    with pytest.raises(UserError) as caught:
        load_garments()
    message = str(caught.value)
    assert "\n" not in message
    assert all(way in message for way in ("apt install dataset-fashion-mnist", "--source DIR", "network access"))


def test_a_plain_scene_is_one_garment_on_one_colour(garments, tmp_path):
    for index in range(20):
        scene = render(garments, 3, index, plain=True)
        ground = scene["image"][scene["seg"] == 0].astype(float)
        far = np.abs(ground - np.median(ground, axis=0)).max(1) > 20  # the soft edge of the garment, and nothing else
        assert len(scene["boxes"]) == 1 and far.mean() < 0.1
        assert scene["seg"].max() == 1 + scene["cls"] and np.median(ground, axis=0).std() < 20
    source = write_idx(tmp_path / "idx", train=squares(10), test=squares(10, seed=1))
    options = {"source": source, "train": 4, "val": 2, "test": 2, "workers": 1}
    write_scenes(tmp_path / "scenes", **options, plain=True)
    assert read_index(tmp_path / "scenes").extra["scenes"]["plain"] is True
    with pytest.raises(UserError, match="plain True instead of None"):
        write_scenes(tmp_path / "scenes", **options)
