"""The tiny zoo: shapes and the shipped weights; what the network promises (windows of positions, hidden patches); the
tokenizer; the pieces of the three objectives against hand-made cases; equal steps give equal bytes; skills on scenes
that no teacher has seen.
"""

from __future__ import annotations

import argparse
import math
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from agglom.data.garments import CLASSES, DEBIAN, load_garments
from agglom.data.scenes import PROMPTS, render
from agglom.errors import UserError
from agglom.features import Features, TextTower
from agglom.teachers.tiny import NAMES, TinyTeacher
from agglom.teachers.tiny.loop import Scenes, crop, jitter, load_scenes, train
from agglom.teachers.tiny.model import CONTEXT, TinyClip, TinyViT, tokenize
from agglom.teachers.tiny.score import copied, figure, ridge, segmentation
from agglom.teachers.tiny.train_clip import contrast, cover, regions, shorten
from agglom.teachers.tiny.train_dino import colourfulness, repaint, spots
from agglom.teachers.tiny.train_sam import mask_loss, prompts


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def held_out() -> Scenes:
    """200 scenes of test garments."""
    if not DEBIAN.is_dir():
        pytest.skip("the package dataset-fashion-mnist is not installed")
    garments = load_garments()["test"]
    samples = [render(garments, 10_000, index) for index in range(200)]
    return Scenes(
        torch.from_numpy(np.stack([sample["image"].transpose(2, 0, 1) for sample in samples])),
        torch.from_numpy(np.stack([sample["seg"] for sample in samples])),
        torch.tensor([sample["cls"] for sample in samples]),
        [sample["txt"] for sample in samples],
        [[(*box["bbox"], box["label"]) for box in sample["boxes"]] for sample in samples],
    )


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name: str, pretrained: bool) -> None:
    teacher = TinyTeacher(name, pretrained)
    features = teacher(torch.rand(2, 3, 80, 70))
    assert features.spatial.shape == (2, 192, 8, 8)
    assert (features.summary is None) == (name == "sam")
    assert features.summary is None or features.summary.shape == (2, teacher.summary_dim)
    assert teacher.source == (f"tiny:{name}" if pretrained else "random")
    assert (teacher.text is not None) == (name == "clip")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_files(name: str) -> None:
    file = Path(str(files("agglom.teachers.tiny") / f"{name}.safetensors"))
    assert file.stat().st_size <= 4_000_000
    assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    vision = TinyTeacher(name, pretrained=False).network
    vision = vision.vision if name == "clip" else vision
    assert 1.5e6 <= sum(p.numel() for p in vision.parameters()) <= 3e6


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="valid: clip, dino, sam"):
        TinyTeacher("clap")  # type: ignore[arg-type]


def test_a_small_image_is_a_window_of_the_position_table() -> None:
    network = TinyViT().eval()
    network.blocks, network.norm = nn.Identity(), nn.Identity()
    with torch.no_grad():
        table = network.pos_embed.view(8, 8, -1)
        found = network.tokens(torch.zeros(1, 3, 32, 32)) - network.patch_embed(torch.zeros(1, 3, 32, 32)).flatten(1, 2)
    assert torch.allclose(found.view(4, 4, -1), table[2:6, 2:6], atol=1e-6)
    with pytest.raises(ValueError, match="at most 8x8"):
        network.tokens(torch.zeros(1, 3, 72, 64))


def test_hidden_patches_do_not_matter() -> None:
    """Beyond the reach of the stem, which looks 3.5 px over a patch's rim, hidden pixels change nothing."""
    network = TinyViT().eval()
    nn.init.normal_(network.mask_token)
    first = torch.rand(1, 3, 64, 64)
    second = first.clone()
    second[..., 24:40, 24:40] = 0  # inside of the cells 3 and 4, whose neighbours are hidden too
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 2:6] = True
    # GroupNorm sees the whole picture, so compare with it switched off
    for index in (1, 4):
        network.patch_embed.layers[index] = nn.Identity()
    with torch.no_grad():
        hidden = [network.tokens(image, mask.flatten()[None]) for image in (first, second)]
        shown = [network.tokens(image) for image in (first, second)]
    assert torch.allclose(hidden[0], hidden[1], atol=1e-5) and not torch.allclose(shown[0], shown[1], atol=1e-3)


def test_tokenize() -> None:
    first, second = tokenize(["An Orange ankle boot, with a red bag.", "red bag"])
    assert first.tolist()[7:] == [0] * (CONTEXT - 7) and second.argmax() == 2
    assert first[4:6].tolist() == second[:2].tolist()
    with pytest.raises(UserError, match="does not know the word 'zebra'"):
        tokenize(["a red zebra"])
    with pytest.raises(UserError, match="at most 19 words, not the 20"):
        tokenize(["red " * 20])


def test_text_tower() -> None:
    text = TinyTeacher("clip").text
    assert isinstance(text, TextTower)
    words = text.encode_text([prompt.format(name) for name in CLASSES for prompt in PROMPTS])
    assert words.shape == (100, 128) and torch.allclose(words.norm(dim=1), torch.ones(100), atol=1e-5)
    assert torch.allclose(text.encode_text(["a red bag"])[0], text.encode_text(["an red bag", "coat"])[0], atol=1e-6)


def test_text_is_the_same_beside_a_bf16_image_network() -> None:
    full, half = (TinyTeacher("clip", dtype=dtype) for dtype in ("fp32", "bf16"))
    assert torch.equal(*(teacher.text.encode_text(["a red bag"]) for teacher in (full, half)))
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    similarity = torch.cosine_similarity(full(images).summary, half(images).summary)
    assert (similarity > 0.999).all() and not torch.equal(full(images).summary, half(images).summary)


def test_contrast_of_equal_captions_is_classification() -> None:
    """Duplicates of a caption are no negatives: the image side is a cross-entropy over the distinct captions."""
    model = TinyClip().eval()
    images, texts = torch.randn(4, 128), ["red bag", "blue coat", "red bag", "dress"]
    words = F.normalize(model.text(tokenize(["blue coat", "dress", "red bag"])), dim=-1)
    logits = model.logit_scale.exp() * F.normalize(images, dim=-1) @ words.T
    to_text = F.cross_entropy(logits, torch.tensor([2, 0, 2, 1]), label_smoothing=0.05)
    columns = logits.T.log_softmax(-1)
    to_image = -(columns[0, 1] + columns[1, 3] + (columns[2, 0] + columns[2, 2]) / 2) / 3
    assert torch.allclose(contrast(model, images, texts), (to_text + 0.5 * to_image) / 1.5, atol=1e-5)


def test_shorten() -> None:
    texts = ["an orange ankle boot left of a red bag", "a photo of a blue t-shirt"]
    assert shorten(texts, first=True, plain=False) == ["orange ankle boot", "blue t-shirt"]
    assert shorten(texts, first=True, plain=True) == ["ankle boot", "t-shirt"]
    assert shorten(texts, first=False, plain=True)[0] == "an ankle boot left of a bag"


def test_regions_and_cover(held_out: Scenes) -> None:
    found = regions(held_out)
    assert 200 < len(found.texts) < 480
    for scene, box, text in zip(found.scene.tolist(), found.box.tolist(), found.texts, strict=True):
        label = next(entry[4] for entry in held_out.boxes[scene] if [*entry[:4]] == box)
        assert text in held_out.texts[scene] and text.split(" ", 1)[1] == CLASSES[label]
    share = cover(torch.tensor([[0.0, 0, 64, 64], [8, 16, 8, 8], [4, 0, 8, 8]])).view(3, 8, 8)
    assert torch.allclose(share[0], torch.full((8, 8), 1 / 64))
    assert share[1, 2, 1] == 1 and share[2, 0, :3].tolist() == [0.5, 0.5, 0]


def test_prompts_point_into_their_masks(held_out: Scenes) -> None:
    masks, weights, where = prompts(held_out, [*range(40)])
    assert torch.allclose(weights.sum(-1), torch.ones(40, 3)) and where.abs().max() <= 1
    coarse = F.avg_pool2d(masks, 4).flatten(2)
    assert ((weights * coarse).sum(-1) > 0).all()
    points = where[..., 4] > 0
    assert 0.3 < points.float().mean() < 0.7 and (weights[points] > 0).sum() == points.sum()


def test_mask_loss() -> None:
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., :2] = 1
    perfect, wrong = (mask_loss(sign * 50 * (2 * masks - 1), masks) for sign in (1, -1))
    assert all(float(value) < 1e-4 for value in perfect.values())
    assert wrong["dice"] > 0.9 and mask_loss(torch.zeros(1, 1, 4, 4), masks)["bce"] == pytest.approx(4 * math.log(2))


def test_colour_finds_the_garments(held_out: Scenes) -> None:
    """What stands in for boxes in dino's diet, judged by masks it never saw."""
    images, mask = held_out.images.float() / 127.5 - 1, held_out.seg > 0
    x, y = spots(images).long().T
    assert mask[torch.arange(200), y, x].float().mean() > 0.8
    painted = repaint(images, 1.0)
    change = (painted - images).abs().mean(1)
    assert change[mask].mean() < 0.25 * change[~mask].mean()
    assert torch.equal(repaint(images, 0.0), images) and colourfulness(images).amax() <= 1


def test_crop_and_jitter() -> None:
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    whole = crop(images, torch.full((3, 2), 32.0), torch.full((3,), 64.0), 64, flip=False)
    assert torch.allclose(whole, images, atol=1e-4)
    corner = crop(images, torch.zeros(3, 2), torch.full((3,), 16.0), 16, flip=False)  # pushed back into the picture
    assert torch.allclose(corner, images[..., :16, :16], atol=1e-4)
    assert torch.allclose(jitter(images, light=0, contrast=0), images, atol=1e-6)
    turned = jitter(images * 0.4, hue=0.5, light=0, contrast=0)
    assert torch.allclose(turned.mean(1), 0.4 * images.mean(1), atol=1e-5)  # a turn of hue keeps the grey value
    assert torch.allclose(turned.norm(dim=1), 0.4 * images.norm(dim=1), atol=1e-5)
    grey = jitter(images, light=0, contrast=0, grey=1.0)
    assert torch.allclose(grey, images.mean(1, keepdim=True).expand_as(grey), atol=1e-6)


def test_equal_steps_give_equal_bytes(tmp_path: Path) -> None:
    def run(seed: int) -> bytes:
        torch.manual_seed(seed)
        args = argparse.Namespace(steps=12, stop=None, out=str(tmp_path), seed=seed, save_every=5)
        model = nn.Linear(4, 4)

        def loss_of(model: nn.Module, average: nn.Module, progress: float) -> dict[str, torch.Tensor]:
            return {"distance": (model(torch.randn(8, 4)) - 1).square().mean()}

        train(model, loss_of, lambda model: model.state_dict(), name="x", args=args)
        return (tmp_path / "x.safetensors").read_bytes()

    assert run(0) == run(0) != run(1)


def test_load_scenes(tmp_path: Path, held_out: Scenes) -> None:
    from agglom.data.scenes import write_scenes

    write_scenes(tmp_path, train=3, val=2, test=0, workers=1)
    for _ in range(2):  # the second time from the .npz
        scenes = load_scenes(tmp_path, "val")
        sample = render(load_garments()["val"], 1, 1)
        assert np.array_equal(scenes.images[1].permute(1, 2, 0), sample["image"])
        assert np.array_equal(scenes.seg[1], sample["seg"]) and scenes.texts[1] == sample["txt"]
        assert [(*box["bbox"], box["label"]) for box in sample["boxes"]] == scenes.boxes[1]
        assert scenes.classes[1] == sample["cls"]


def test_ridge_recovers_a_linear_map() -> None:
    x, weight = torch.randn(500, 6), torch.randn(7, 3)
    assert torch.allclose(ridge(x, F.pad(x, (0, 1), value=1.0) @ weight), weight, atol=0.02)


def test_segmentation_by_hand() -> None:
    """Patches that are their class one-hot give back a mask of whole patches; a constant gives the background alone."""
    cells = torch.arange(64).view(1, 8, 8) // 6 % 11
    seg = cells.repeat_interleave(8, 1).repeat_interleave(8, 2)
    one_hot = Features(None, F.one_hot(cells, 11).permute(0, 3, 1, 2).float())
    assert segmentation(one_hot, seg, one_hot, seg) > 80
    seg = torch.zeros(1, 64, 64, dtype=torch.long)
    seg[:, :16] = torch.arange(64) % 11
    blank = Features(None, torch.zeros(1, 3, 8, 8))
    share = (seg == 0).float().mean().item()
    assert segmentation(blank, seg, blank, seg) == pytest.approx(100 * share / 11, abs=0.1)


def test_each_teacher_has_its_skill(held_out: Scenes) -> None:
    """Small probes on unseen garments: 120 scenes to fit, 80 to judge; margins are far below what was measured."""
    images = held_out.images.float() / 255
    teachers = {name: TinyTeacher(name) for name in NAMES} | {"random": TinyTeacher("sam", pretrained=False)}
    features = {name: teacher(images) for name, teacher in teachers.items()}

    text = teachers["clip"].text
    words = text.encode_text([prompt.format(name) for name in CLASSES for prompt in PROMPTS]).view(10, 10, -1).mean(1)
    right = (features["clip"].summary @ F.normalize(words, dim=1).T).argmax(1) == held_out.classes
    assert right.float().mean() > 0.35  # chance is 0.1

    def iou(name: str) -> float:
        fit, judge = (
            features[name]._replace(spatial=features[name].spatial[rows]) for rows in (slice(120), slice(120, None))
        )
        return figure(fit, held_out.seg[:120], judge, held_out.seg[120:])

    assert iou("sam") > 5 + max(iou(name) for name in ("clip", "dino", "random"))

    copies = F.normalize(teachers["dino"](copied(held_out.images)).summary, dim=1)
    found = (copies @ F.normalize(features["dino"].summary, dim=1).T).argmax(1)
    assert (found == torch.arange(200)).float().mean() > 0.4
