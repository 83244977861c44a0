"""COCO into shards: boxes, masks, classes and captions against hand-drawn ones and pycocotools; bad files."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from agglom.data import eval_stream, read_index
from agglom.data.coco import write_coco
from agglom.data.coco_annotations import Thing, clip_box
from agglom.data.coco_masks import decode, instance_mask, panoptic_mask
from agglom.data.writing import Writing
from agglom.errors import UserError

COCO50 = Path(__file__).parents[3] / "shared" / "data" / "coco50"
ONE = Writing(workers=1)
FIELDS = ["image", "boxes", "cls", "seg", "txt"]
WIDTH, HEIGHT = 12, 8


def square(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def annotation(key, image, category, box, **more):
    return {
        "id": key, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0,
        "segmentation": [square(*box)], **more,
    }  # fmt: skip


def listing(ids):
    return [{"id": i, "file_name": f"{i:012d}.jpg", "width": WIDTH, "height": HEIGHT} for i in ids]


def instances(ids, annotations):
    names = {7: "dog", 3: "cat", 90: "yak"}  # ids with gaps and out of order
    return {
        "images": listing(ids),
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }


def captions(ids, texts):
    found = [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(texts)]
    return {"images": listing(ids), "annotations": found}


def pictures(folder, ids):
    folder.mkdir(parents=True, exist_ok=True)
    for i in ids:
        Image.new("RGB", (WIDTH, HEIGHT), (i, i, i)).save(folder / f"{i:012d}.jpg")


def save(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body))
    return path


def by_number(root, split, fields):
    """Samples by the grey of their picture, which is its id."""
    return {int(s["image"].float().mean().round()): s for s in eval_stream(root, split, fields=fields)}


@pytest.fixture
def folder(tmp_path):
    """COCO's layout: train2017 with three pictures, val2017 with one; instances and captions."""
    root = tmp_path / "coco"
    pictures(root / "train2017", (10, 20, 30))
    pictures(root / "val2017", (40,))
    crowd = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * 10, HEIGHT * 2]}  # the two columns on the right
    train = [
        annotation(1, 10, 90, [1, 1, 2, 2]),
        annotation(2, 10, 3, [0, 0, 6, 5]),
        annotation(3, 10, 90, [10, 0, 2, 8], iscrowd=1, segmentation=crowd),
        annotation(4, 20, 7, [-2, 6.5, 20, 9]),
        annotation(5, 20, 7, [3, 3, 0, 4]),
    ]
    save(root / "annotations" / "instances_train2017.json", instances((10, 20, 30), train))
    save(root / "annotations" / "instances_val2017.json", instances((40,), [annotation(9, 40, 7, [0, 0, 1, 1])]))
    texts = [(20, "two\n dogs "), (10, "a cat"), (20, "dogs"), (30, "nothing")]
    save(root / "annotations" / "captions_train2017.json", captions((10, 20, 30), texts))
    save(root / "annotations" / "captions_val2017.json", captions((40,), []))
    save(root / "annotations" / "person_keypoints_train2017.json", {"not": "read"})
    return root


def panoptic(root, name, ids, kinds, colour=(5, 1, 2)):
    """A panoptic file whose maps are class 9 in the left third, class 200 in the middle, void on the right."""
    number = colour[0] + 256 * colour[1] + 65536 * colour[2]
    found = []
    for i in ids:
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        pixels[:, :4], pixels[:, 4:8] = colour, (7, 0, 0)
        (root / "annotations" / f"panoptic_{name}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "annotations" / f"panoptic_{name}" / f"{i}.png")
        segments = [{"id": number, "category_id": 9}, {"id": 7, "category_id": 200}]
        found.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
    categories = [{"id": i, "name": kind, "isthing": 0} for i, kind in kinds.items()]
    body = {"images": listing(ids), "annotations": found, "categories": categories}
    return save(root / "annotations" / f"panoptic_{name}.json", body)


def test_one_folder_becomes_boxes_classes_masks_and_captions(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "agglom.data"):
        write_coco(tmp_path / "out", source=folder, language="en", writing=ONE)
    index = read_index(tmp_path / "out")
    assert index.counts == {"train": 3, "val": 1} and index.fields["train"] == ("boxes", "cls", "image", "seg", "txt")
    assert index.classes == ("cat", "dog", "yak") and index.seg_classes == ("background", "cat", "dog", "yak")
    assert index.language == "en" and index.extra["coco"]["boxes_without_area"] == 1
    assert index.extra["coco"]["images_without_caption"] == 1 and index.extra["coco"]["masks"] == "instances"
    assert [m.split(": ", 1)[1] for m in caplog.messages] == ["boxes without area: 1", "images without caption: 1"]
    train = by_number(tmp_path / "out", "train", FIELDS)
    assert set(train) == {10, 20, 30}
    assert train[10]["boxes"] == [
        {"bbox": [1, 1, 2, 2], "label": 2, "iscrowd": 0},
        {"bbox": [0, 0, 6, 5], "label": 0, "iscrowd": 0},
        {"bbox": [10, 0, 2, 8], "label": 2, "iscrowd": 1},
    ]
    assert train[20]["boxes"] == [{"bbox": [0, 6.5, 12, 1.5], "label": 1, "iscrowd": 0}]  # clipped
    assert [train[i]["cls"] for i in (10, 20, 30)] == [[0, 2], [1], []] and train[30]["boxes"] == []
    assert [train[i]["txt"] for i in (10, 20, 30)] == ["a cat", "two dogs\ndogs", "nothing"]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[0:5, 0:6], expected[1:3, 1:3], expected[:, 10:] = 1, 3, 255  # the small yak lies on the cat
    assert np.array_equal(train[10]["seg"], expected) and not train[30]["seg"].any()
    assert by_number(tmp_path / "out", "val", FIELDS)[40]["txt"] == ""


def test_panoptic_maps(folder, tmp_path):
    kinds = {200: "sky", 9: "tree", 15: "road"}
    panoptic(folder, "train2017", (10, 20, 30), kinds)
    write_coco(tmp_path / "instances", source=folder, writing=ONE)  # val has no maps
    assert read_index(tmp_path / "instances").extra["coco"]["masks"] == "instances"
    panoptic(folder, "val2017", (40,), kinds)
    write_coco(tmp_path / "out", source=folder, writing=ONE)
    index = read_index(tmp_path / "out")
    assert index.seg_classes == ("tree", "road", "sky") and index.classes == ("cat", "dog", "yak")
    for split in ("train", "val"):
        for sample in by_number(tmp_path / "out", split, ["image", "seg", "boxes"]).values():
            assert sample["seg"][3].tolist() == [0] * 4 + [2] * 4 + [255] * 4
    write_coco(tmp_path / "none", source=folder, masks="none", writing=ONE)
    index = read_index(tmp_path / "none")
    assert index.seg_classes is None and index.fields["train"] == ("boxes", "cls", "image", "txt")
    alone = panoptic(tmp_path / "alone", "maps", (10, 20), kinds)
    write_coco(tmp_path / "only", images=folder / "train2017", panoptic=alone, writing=ONE)
    assert read_index(tmp_path / "only").fields["train"] == ("image", "seg")


def test_files_of_ones_own_with_fractions_and_workers(tmp_path):
    pictures(tmp_path / "photos", range(100, 140))
    body = instances(range(100, 140), [annotation(n, 100 + n, 3, [n % 5, 1, 4, 4]) for n in range(40)])
    path = save(tmp_path / "own.json", body)
    for name, workers in (("one", 1), ("two", 2)):
        writing = Writing(workers=workers, shard_size=8)
        write_coco(tmp_path / name, images=tmp_path / "photos", instances=path, val_fraction=0.3, writing=writing)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    counts = read_index(tmp_path / "one").counts
    assert sum(counts.values()) == 40 and 2 <= counts["val"] <= 24
    for split in counts:
        for number, sample in by_number(tmp_path / "one", split, ["image", "boxes"]).items():
            assert sample["boxes"][0]["bbox"] == [(number - 100) % 5, 1, 4, 4]  # the picture's own


def test_pictures_that_do_not_fit_are_skipped(folder, tmp_path, caplog):
    (folder / "train2017" / f"{10:012d}.jpg").unlink()
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "train2017" / f"{20:012d}.jpg")
    with caplog.at_level(logging.WARNING, "agglom.data"):
        write_coco(tmp_path / "out", source=folder, writing=ONE)
    assert "skipped 2 unreadable of 4" in caplog.text
    index = read_index(tmp_path / "out")
    assert index.counts == {"train": 1, "val": 1} and index.extra["coco"]["skipped"] == 2
    for path in folder.glob("*2017/*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match="none of its 4 pictures can be read, first"):
        write_coco(tmp_path / "nothing", source=folder, writing=ONE)


def test_a_picture_on_its_side_is_measured_as_it_will_be_seen(tmp_path):
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH), (10, 10, 10)).save(tmp_path / "photos" / f"{10:012d}.jpg", exif=exif)
    path = save(tmp_path / "own.json", instances((10,), [annotation(1, 10, 3, [0, 0, 6, 5])]))
    write_coco(tmp_path / "out", images=tmp_path / "photos", instances=path, writing=ONE)
    (sample,) = eval_stream(tmp_path / "out", "train", fields=["image", "seg"])
    assert sample["image"].shape[-2:] == sample["seg"].shape == (HEIGHT, WIDTH)


def test_polygons_that_are_none_are_dropped(tmp_path):
    """Four numbers would be read as a box; an instance that has nothing else is unknown within its own box."""
    pictures(tmp_path / "photos", (10,))
    broken = [[0, 0, 12, 8], [1, 1, 9, 1, 9, 7, 4]]
    body = instances(
        (10,),
        [
            annotation(1, 10, 3, [1, 1, 3, 3], segmentation=[*broken, square(1, 1, 3, 3)]),
            annotation(2, 10, 7, [6, 1, 2, 2], segmentation=broken),
        ],
    )
    path = save(tmp_path / "own.json", body)
    write_coco(tmp_path / "out", images=tmp_path / "photos", instances=path, writing=ONE)
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[1:4, 1:4], expected[1:3, 6:8] = 1, 255
    assert np.array_equal(by_number(tmp_path / "out", "train", ["image", "seg"])[10]["seg"], expected)
    assert read_index(tmp_path / "out").extra["coco"]["polygons_without_area"] == 4


def test_panoptic_maps_that_do_not_fit(folder, tmp_path, caplog):
    path = panoptic(folder, "train2017", (10, 20, 30), {9: "tree", 200: "sky"})
    maps = path.with_suffix("")
    options = {"images": folder / "train2017", "panoptic": path, "writing": ONE}
    body = json.loads(path.read_text())
    body["annotations"].pop(0)  # of image 10
    save(path, body)
    with caplog.at_level(logging.WARNING, "agglom.data"):
        write_coco(tmp_path / "first", **options)
    assert "skipped 1 unreadable of 3" in caplog.text and "(no panoptic annotation)" in caplog.text
    Image.new("RGB", (HEIGHT, WIDTH)).save(maps / "20.png")
    with caplog.at_level(logging.WARNING, "agglom.data"):
        write_coco(tmp_path / "out", **options)
    assert "skipped 2 unreadable of 3" in caplog.text
    assert set(by_number(tmp_path / "out", "train", ["image"])) == {30}
    Image.new("L", (WIDTH, HEIGHT)).save(maps / "30.png")
    with pytest.raises(UserError, match="none of its 3 pictures can be read"):
        write_coco(tmp_path / "out2", **options)
    body["images"][0]["width"] += 1
    save(path, body)
    with pytest.raises(UserError, match="image 10: another size than in the instances' file"):
        write_coco(tmp_path / "out2", instances=folder / "annotations" / "instances_train2017.json", **options)


def test_only_images_in_all_files_are_written(folder, tmp_path):
    save(folder / "annotations" / "captions_train2017.json", captions((20, 30), [(20, "dogs"), (30, "none")]))
    write_coco(tmp_path / "out", source=folder, writing=ONE)
    index = read_index(tmp_path / "out")
    assert index.counts == {"train": 2, "val": 1} and index.extra["coco"]["images_not_in_all_files"] == 1


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_those_of_pycocotools(seed):
    api = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(20, 90)), int(rng.integers(20, 90)))
    polygons = [(rng.uniform(-5, 95, 2 * n)).tolist() for n in (3, 4, 7)]
    merged = api.merge(api.frPyObjects(polygons, size[1], size[0]))
    assert np.array_equal(decode(polygons, size), api.decode(merged).astype(bool))
    noise = np.asfortranarray(rng.random((size[1], size[0])) < 0.3, np.uint8)
    packed = api.encode(noise)
    for counts in (packed["counts"].decode(), packed["counts"]):
        assert np.array_equal(decode({"size": [size[1], size[0]], "counts": counts}, size), noise)
    flat = noise.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *([0] if flat[0] else []), *edges, flat.size]).tolist()  # the first run is of zeros
    assert np.array_equal(decode({"size": [size[1], size[0]], "counts": runs}, size), noise)


def test_polygons_are_filled_as_pillow_fills_them_but_for_their_rim():
    points = [20.0, 10.0, 80.0, 25.0, 60.0, 70.0, 15.0, 55.0]
    canvas = Image.new("1", (100, 80))
    ImageDraw.Draw(canvas).polygon(points, fill=1)
    other = np.array(canvas)
    assert 0 < (decode([points], (100, 80)) ^ other).sum() < 0.06 * other.sum()  # half a pixel along 190 pixels of rim


def test_stacking_does_not_depend_on_the_order_and_unknown_masks_are_ignored():
    things = [
        Thing([0, 0, 8, 8], 0, False, [square(0, 0, 8, 8)]),
        Thing([1, 1, 4, 4], 1, True, [square(1, 1, 4, 4)]),
        Thing([2, 2, 2, 2], 2, False, [square(2, 2, 2, 2)]),
        Thing([5.5, 6, 1, 1], 3, False, None),
    ]
    expected = np.zeros((8, 10), np.uint8)
    expected[:8, :8], expected[1:5, 1:5], expected[2:4, 2:4], expected[6, 5:7] = 1, 255, 3, 255
    for order in (things, things[::-1]):
        assert np.array_equal(instance_mask(order, (10, 8)), expected)


def test_broken_masks():
    for mask in (
        {"size": [8, 10], "counts": [70, 5]},
        {"size": [10, 8], "counts": [70, 10]},
        {"size": [8, 10], "counts": "zz"},
    ):
        with pytest.raises(ValueError):
            decode(mask, (10, 8))
    with pytest.raises(ValueError, match="segment 3 "):
        panoptic_mask(np.full((2, 2, 3), (3, 0, 0), np.uint8), {4: 0})


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ([0.1, 0.2, 9.9, 7.8], [0.1, 0.2, 9.9, 7.8]),
        ([-1, -2, 4, 5], [0, 0, 3, 3]),
        ([8, 6, 4, 4], [8, 6, 2, 2]),
        ([8, 1, 4, 4], [8, 1, 2, 4]),
        ([1, 6, 4, 4], [1, 6, 4, 2]),
        ([10, 0, 1, 1], None),
        ([-3, 0, 3, 1], None),
        ([1, 1, 0, 3], None),
        ([4, 4, -2, 2], None),
    ],
)
def test_boxes_are_clipped(box, clipped):
    assert clip_box(box, (10, 8)) == clipped


def change(name, edit):
    """A damage to one file of the folder."""

    def damage(root):
        body = json.loads((root / "annotations" / name).read_text())
        edit(body)
        save(root / "annotations" / name, body)

    return damage


TRAIN, TEXTS = "instances_train2017.json", "captions_train2017.json"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "annotations" / TRAIN).write_text("{"), f"{TRAIN}: not readable as JSON"),
        (lambda root: (root / "annotations" / TRAIN).write_text("[]"), "no list 'images'"),
        (change(TRAIN, lambda b: b.pop("categories")), "no list 'categories'"),
        (change(TRAIN, lambda b: b["images"].append(b["images"][0])), f"{TRAIN}: images: id 10 twice"),
        (change(TRAIN, lambda b: b["annotations"].append(b["annotations"][0])), "annotations: id 1 twice"),
        (change(TRAIN, lambda b: b["annotations"][0].update(category_id=4)), "annotation 1: category_id 4 is not in"),
        (change(TRAIN, lambda b: b["annotations"][0].update(image_id=11)), "annotation 1: image_id 11 is not in"),
        (change(TRAIN, lambda b: b["annotations"][0].update(bbox=[1, 2, 3])), "annotation 1: bbox: [1, 2, 3]"),
        (change(TRAIN, lambda b: b["annotations"][0].update(segmentation="x")), "1: segmentation of type str"),
        (change(TRAIN, lambda b: b["images"][0].pop("width")), "image 10: width, height (None, 8)"),
        (change(TRAIN, lambda b: b["categories"].pop()), "annotation 1: category_id 90"),
        (change("instances_val2017.json", lambda b: b["categories"].pop()), "other categories than"),
        (change(TEXTS, lambda b: b["annotations"][0].update(caption=3)), "annotation 0: caption 3"),
        (change(TEXTS, lambda b: (b["images"].clear(), b["annotations"].clear())), "no image that all of them list"),
        (lambda root: (root / "val2017").rename(root / "pictures"), "no pictures for captions_val2017.json"),
        (lambda root: pictures(root / "train2014", (1,)) or save(root / "annotations" / "captions_train2014.json", {}),
         "one more of split train"),
        (lambda root: (root / "annotations").rename(root / "labels"), "has no annotations/instances_*.json"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(folder, tmp_path, damage, words):
    damage(folder)
    with pytest.raises(UserError) as err:
        write_coco(tmp_path / "out", source=folder, writing=ONE)
    assert words in str(err.value) and "\n" not in str(err.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give --source DIR, or"),
        ({"source": "SRC", "images": "SRC"}, "drop one"),
        ({"source": "SRC", "val_fraction": 0.1}, "splits of its own"),
        ({"source": "nowhere"}, "nowhere: no such folder"),
        ({"source": "SRC", "masks": "panoptic"}, "masks: panoptic, but split train has none"),
        ({"source": "SRC", "masks": "stuff"}, "valid: panoptic, instances, none"),
        ({"images": "SRC/train2017", "instances": "none.json"}, "none.json: can't be read"),
        ({"images": "nowhere", "captions": "SRC/annotations/captions_val2017.json"}, "images: nowhere: no such folder"),
        ({"images": "SRC/train2017", "captions": "SRC/annotations/captions_train2017.json", "masks": "instances"},
         "masks: instances, but split train has none"),
        ({"images": "SRC/train2017", "panoptic": "SRC/panoptic.json"}, "no folder panoptic with its maps"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(folder, tmp_path, options, words):
    body = {"images": listing((10,)), "annotations": [], "categories": [{"id": 1, "name": "sky"}]}
    save(folder / "panoptic.json", body)
    options = {k: v.replace("SRC", str(folder)) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UserError) as err:
        write_coco(tmp_path / "out", writing=ONE, **options)
    assert words in str(err.value) and "\n" not in str(err.value)


def test_more_classes_than_a_mask_has_values(tmp_path):
    pictures(tmp_path / "photos", (10,))
    body = instances((10,), [annotation(1, 10, 1, [0, 0, 3, 3])])
    for number, fits in ((254, True), (255, False)):  # and the background
        body["categories"] = [{"id": n, "name": str(n)} for n in range(number)]
        path = save(tmp_path / "own.json", body)
        options = {"images": tmp_path / "photos", "instances": path, "writing": ONE}
        if fits:
            write_coco(tmp_path / "out", **options)
        else:
            with pytest.raises(UserError, match="256 classes; valid: up to 255.*--masks none"):
                write_coco(tmp_path / "out2", **options)
            write_coco(tmp_path / "out3", **options, masks="none")


@pytest.mark.skipif(not COCO50.is_dir(), reason="no ../shared/data/coco50")
def test_fifty_real_photos(tmp_path):
    files = {"instances": COCO50 / "instances.json", "captions": COCO50 / "captions.json"}
    write_coco(tmp_path / "out", images=COCO50 / "images", **files, writing=ONE)
    index = read_index(tmp_path / "out")
    assert index.counts == {"train": 50} and index.extra["coco"]["skipped"] == 0 and len(index.classes) == 80
    body = json.loads(files["instances"].read_text())
    names = {c["id"]: c["name"] for c in body["categories"]}
    ids = {image["file_name"]: image["id"] for image in body["images"]}
    lines = (tmp_path / "out" / "train-files.tsv").read_text().splitlines()
    keys = dict(line.split("\t") for line in lines)
    seen = 0
    for sample in eval_stream(index, "train", fields=FIELDS):
        given = [a for a in body["annotations"] if a["image_id"] == ids[keys[sample["key"]]]]
        boxes = [b["bbox"] for b in sample["boxes"]]
        assert len(boxes) == len(given) and np.allclose(boxes, [a["bbox"] for a in given], atol=0.02)
        assert [index.classes[b["label"]] for b in sample["boxes"]] == [names[a["category_id"]] for a in given]
        assert [b["iscrowd"] for b in sample["boxes"]] == [a["iscrowd"] for a in given]
        assert sample["cls"] == sorted({b["label"] for b in sample["boxes"]})
        assert len(sample["txt"].splitlines()) == 5 and sample["seg"].shape == sample["image"].shape[-2:]
        seg = sample["seg"].numpy()
        assert set(np.unique(seg)) - {0, 255} <= {label + 1 for label in sample["cls"]}
        alone = [a for a in given if sum(b["category_id"] == a["category_id"] for b in given) == 1]
        for a in alone:  # the only one of its class: what is seen of it lies in its box and is at most its area
            ys, xs = np.nonzero(seg == sorted(names).index(a["category_id"]) + 1)
            x, y, w, h = a["bbox"]
            if len(xs):
                assert (
                    x - 1.5 <= xs.min() and xs.max() <= x + w + 0.5 and y - 1.5 <= ys.min() and ys.max() <= y + h + 0.5
                )
                assert len(xs) <= 1.1 * a["area"] + 20
                seen += 1
    assert seen > 50
