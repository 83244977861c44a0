"""Image-text contrast: open_clip's losses where captions differ, loops where some are equal or missing, by hand, ranks.

What is gathered over ranks is compared between one process and two; for that this file runs itself as the two.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from agglom.objectives.contrastive import own_caption_nearest, pairs, sigmoid_contrast, softmax_contrast

SCALE, BIAS = torch.tensor(14.0), torch.tensor(-4.0)
LOSSES = {
    "softmax": lambda found: softmax_contrast(found, SCALE),
    "sigmoid": lambda found: sigmoid_contrast(found, SCALE, BIAS),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def compare(images, texts, codes=None, counts=None):
    codes = torch.arange(len(images)) if codes is None else torch.tensor(codes)
    counts = torch.ones(len(images)).bool() if counts is None else torch.tensor(counts).bool()
    return pairs(images, texts, codes, counts)


@pytest.mark.parametrize("loss", LOSSES)
def test_open_clips_own_where_all_captions_differ(loss):
    """Values and gradients of the batch's mean."""
    from open_clip.loss import ClipLoss, SigLipLoss

    images, texts = (torch.randn(7, 5, requires_grad=True) for _ in range(2))
    normed = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    want = ClipLoss()(*normed, SCALE) if loss == "softmax" else SigLipLoss()(*normed, SCALE, BIAS)
    wanted = torch.autograd.grad(want, (images, texts))
    got = LOSSES[loss](compare(images, texts))
    assert got.shape == (7,)
    torch.testing.assert_close(got.mean(), want)
    for ours, theirs in zip(torch.autograd.grad(got.mean(), (images, texts)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_hand_computed():
    """Three orthogonal pairs, each image its caption: cosines are 1 and 0."""
    found = compare(3 * torch.eye(3), 0.1 * torch.eye(3))
    softmax = math.log(1 + 2 * math.exp(-14))
    sigmoid = math.log(1 + math.exp(-10)) + 2 * math.log(1 + math.exp(-4))
    assert softmax_contrast(found, SCALE).tolist() == pytest.approx([softmax] * 3, abs=1e-6)
    assert sigmoid_contrast(found, SCALE, BIAS).tolist() == pytest.approx([sigmoid] * 3, abs=1e-6)
    assert own_caption_nearest(found) == 1
    crossed = compare(torch.eye(3)[[1, 0, 2]], torch.eye(3))
    assert own_caption_nearest(crossed).item() == pytest.approx(1 / 3)
    assert softmax_contrast(crossed, SCALE)[2] < 1e-5 < 14 < softmax_contrast(crossed, SCALE)[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_captions_are_no_negatives(loss):
    """Against a loop that knows which captions are equal; to leave them in would give another number."""
    codes = [4, 9, 4, 2, 9, 4]
    images, texts = torch.randn(6, 5), torch.randn(10, 5)[codes]
    got = LOSSES[loss](compare(images, texts, codes))
    z = SCALE * F.cosine_similarity(images[:, None], texts[None], dim=2)
    for i in range(6):
        others = [j for j in range(6) if codes[j] != codes[i]]
        if loss == "softmax":
            over = [z[i, i].exp() + sum(side.exp() for side in sides) for sides in (z[i, others], z[others, i])]
            want = sum(total.log() - z[i, i] for total in over) / 2
        else:
            want = -F.logsigmoid(z[i, i] + BIAS) - sum(F.logsigmoid(-z[i, j] - BIAS) for j in others)
        torch.testing.assert_close(got[i], want)
    assert (got - LOSSES[loss](compare(images, texts))).min() < -1e-2
    if loss == "softmax":
        assert LOSSES[loss](compare(images, texts[:1].expand(6, -1), [1] * 6)).abs().max() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_without_a_caption_an_image_takes_no_part(loss):
    images, texts = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    counts = [1, 0, 1, 1, 0, 1]
    keep = torch.tensor(counts).bool()
    found = compare(images, texts, counts=counts)
    got = LOSSES[loss](found)
    torch.testing.assert_close(got[keep], LOSSES[loss](compare(images[keep], texts[keep])))
    got.sum().backward()
    for x in (images, texts):
        assert (x.grad[~keep] == 0).all() and (x.grad[keep].abs().sum(1) > 0).all()
    assert (got[~keep] == 0).all() and found.own.tolist() == [*range(6)]
    nearest = own_caption_nearest(compare(images[keep], texts[keep]))
    torch.testing.assert_close(own_caption_nearest(found), nearest)


@pytest.mark.parametrize("loss", LOSSES)
def test_invariances(loss):
    """Order, lengths and a rotation of the space."""
    images, texts, order = torch.randn(6, 5), torch.randn(6, 5), torch.randperm(6)
    want = LOSSES[loss](compare(images, texts))
    torch.testing.assert_close(LOSSES[loss](compare(images[order], texts[order])), want[order])
    turn = torch.linalg.qr(torch.randn(5, 5))[0]
    got = LOSSES[loss](compare(7 * images @ turn, 0.3 * texts @ turn))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [0.0, 1e2])
def test_fp32_and_finite_from_bf16_under_autocast(loss, size):
    images = (size * torch.randn(6, 5)).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = LOSSES[loss](compare(images, images.detach()))
    got.sum().backward()
    assert got.dtype == torch.float32 and got.isfinite().all() and images.grad.isfinite().all()
    torch.testing.assert_close(got, LOSSES[loss](compare(images, images.detach())))


def test_gradients():
    images, texts = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for loss in LOSSES.values():
        assert torch.autograd.gradcheck(lambda a, b, loss=loss: loss(compare(a, b, [0, 1, 0, 2])), (images, texts))


def test_no_step_makes_the_host_wait():
    """A tensor on the meta device has no value, so anything that would ask the device for one raises."""
    with torch.device("meta"):
        found = pairs(torch.randn(4, 3), torch.randn(4, 3), torch.zeros(4).long(), torch.ones(4).bool())
        scale = torch.tensor(1.0)
        softmax_contrast(found, scale), sigmoid_contrast(found, scale, scale), own_caption_nearest(found)


def test_bad_input():
    with pytest.raises(ValueError, match="wanted, got"):
        compare(torch.randn(4, 3), torch.randn(4, 2))
    with pytest.raises(ValueError, match="wanted, got"):
        compare(torch.randn(4, 3), torch.randn(4, 3), [1, 2, 3])


def scenario(rank, world):
    """Value and gradients of a rank's part; captions 1 and 6 are equal over ranks, image 5 has none."""
    generator, out = torch.Generator().manual_seed(3), {}
    full = [torch.randn(8, 5, generator=generator) for _ in range(2)]
    full += [torch.tensor([0, 1, 2, 3, 4, 5, 1, 7]), torch.arange(8) != 5]
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for name, loss in LOSSES.items():
        images, texts, codes, counts = (x[part].clone() for x in full)
        value = loss(pairs(images.requires_grad_(), texts.requires_grad_(), codes, counts))
        value.mean().backward()
        out[f"{name}.value"], out[f"{name}.images"], out[f"{name}.texts"] = value.detach(), images.grad, texts.grad
    return out


@pytest.mark.slow
def test_two_ranks_are_one_rank_with_the_joined_batch(tmp_path):
    command, env = [sys.executable, __file__, str(tmp_path)], os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(r)], env=env, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    one, two = scenario(0, 1), [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    for name, want in one.items():
        got = torch.cat([t[name] for t in two])
        # a rank's mean is over half of the images, and the mean of two ranks halves its gradient again
        torch.testing.assert_close(got / (1 if "value" in name else 2), want, rtol=1e-4, atol=1e-6, msg=name)


if __name__ == "__main__":
    folder, me = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=me, world_size=2)
    torch.save(scenario(me, 2), f"{folder}/{me}.pt")
    dist.destroy_process_group()
