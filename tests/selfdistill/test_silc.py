"""Captions as an objective, alone and beside Dino (SILC): which view it reads, what is trained, kept and averaged."""

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.features import Dims
from agglom.objectives.contrastive import pairs, sigmoid_contrast, softmax_contrast
from agglom.selfdistill import Dino, ImageText, Objective
from agglom.teachers import TinyTeacher, fingerprint

DIMS = Dims(32, 32)
TEXTS = ["a red bag", "a blue coat", "a green dress", "a pink shirt"]


def clip(seed=7):
    torch.manual_seed(seed)
    return TinyTeacher("clip", pretrained=False)


def batches(count=8, crops=0):
    """Images of the four captions' colours, the same for the same number; `crops` only changes the crops."""
    colours = torch.tensor([[0.8, 0, 0], [0, 0, 0.8], [0, 0.8, 0], [0.8, 0.4, 0.6]])[..., None, None]
    out = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        pixels = 0.2 * torch.rand(4, 3, 32, 32, generator=generator) + colours
        other = torch.Generator().manual_seed(1000 * crops + number)
        views = {name: torch.rand(4, 2, 3, 32, 32, generator=other) for name in ("global", "local")}
        out.append({"image": pixels, "key": list("abcd"), "txt": TEXTS, "crops": views})
    return out


def build(tiny_student, text=None, dino=False, seed=0, ema_decay=0.8, lr=1e-3, **options):
    text = text or clip()
    student = tiny_student(seed=seed)
    torch.manual_seed(seed)
    objectives = {"captions": partial(ImageText, text=text, **options)}
    if dino:
        objectives["views"] = partial(Dino, prototypes=16, hidden=32, bottleneck=8)
    return Distiller(student, {}, objectives=objectives, warmup_steps=0, ema_decay=ema_decay, lr=lr)


def fit(module, trainer, data=None):
    trainer.fit(module, DataLoader(data or batches(), batch_size=None))
    return module


@pytest.fixture
def seen(monkeypatch):
    """(class, scene, loss) of every call of an objective."""
    found = []
    for cls in (ImageText, Dino):
        plain = cls.forward

        def forward(self, scene, plain=plain):
            found.append((type(self), scene, plain(self, scene)))
            return found[-1][2]

        monkeypatch.setattr(cls, "forward", forward)
    return found


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("trainable", [False, True])
def test_the_loss_written_out(loss, trainable, tiny_student, quiet_trainer, seen):
    """The student's summary of the batch's own images, projected, against the tower's own embeddings."""
    text = clip()
    module = build(tiny_student, text, trainable=trainable, loss=loss)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    words = text.text.encode_text(TEXTS)
    fit(module, quiet_trainer(max_steps=1))
    ((_, scene, got),) = seen
    module.load_state_dict(before)
    objective = module.objectives["captions"]
    summary = module.student.train()(scene.batch["image"]).summary[:, 0]
    found = pairs(objective.project(summary), words, torch.arange(4), torch.ones(4).bool())
    if loss == "softmax":
        want = softmax_contrast(found, torch.tensor(1 / 0.07))
    else:
        want = sigmoid_contrast(found, torch.tensor(10.0), torch.tensor(-10.0))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_crops_are_not_seen(tiny_student, quiet_trainer, seen):
    """Other crops change Dino's part of the first step and not a bit of the captions'; another image does."""
    data = {"plain": batches(), "crops": batches(crops=1), "image": batches()[1:]}
    losses = {}
    for name, given in data.items():
        seen.clear()
        fit(build(tiny_student, dino=True), quiet_trainer(max_steps=1), given)
        losses[name] = {cls: loss.detach() for cls, _, loss in seen}
    assert torch.equal(losses["crops"][ImageText], losses["plain"][ImageText])
    assert not torch.equal(losses["crops"][Dino], losses["plain"][Dino])
    assert not torch.equal(losses["image"][ImageText], losses["plain"][ImageText])


def test_a_frozen_tower_is_nowhere(tiny_student, quiet_trainer):
    """No gradient, no byte changed, in no state, optimiser or average; and in the record of frozen encoders."""
    text = clip()
    before = fingerprint(text)
    module = fit(build(tiny_student, text, loss="sigmoid"), quiet_trainer(max_steps=3))
    objective, average = module.objectives["captions"], module.ema.average["objectives"]["captions"]
    names = {"project.weight", "log_scale", "bias"}
    assert set(objective.state_dict()) == set(average.state_dict()) == names
    assert {name for name, _ in objective.named_parameters()} == names
    assert fingerprint(text) == before and not any(x.requires_grad or x.grad is not None for _, x in text.tensors())
    held = {id(p) for group in module.optimizers().optimizer.param_groups for p in group["params"]}
    assert not held & {id(x) for _, x in text.tensors()}
    assert average.network is objective.network is text.text.network() and not objective.network.training
    assert average.project is not objective.project
    assert module.frozen == {"captions": text}


def test_a_trainable_tower_learns_and_is_averaged_and_saved(tiny_student, quiet_trainer, tmp_path):
    module = build(tiny_student, trainable=True, ema_decay=0.5)
    first = {k: v.detach().clone() for k, v in module.objectives["captions"].named_parameters()}
    fit(module, trainer := quiet_trainer(max_steps=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    objective, average = module.objectives["captions"], module.ema.average["objectives"]["captions"]
    unused = {"network.token_embedding.weight"}  # words that no caption has
    for name, p in objective.named_parameters():
        if name not in unused:
            assert not torch.equal(p, first[name]), name
            assert not torch.equal(average.get_parameter(name), p), name
    held = {id(p) for group in module.optimizers().optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in objective.parameters()} <= held and module.frozen == {}
    assert objective.network.training and not average.network.training
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for name, p in objective.named_parameters():
        assert torch.equal(saved[f"trained.objectives.captions.{name}"], p)
    # scalars, biases and positions are not decayed
    decayed = {id(p) for g in module.optimizers().optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    free = {name for name, p in objective.named_parameters() if id(p) not in decayed}
    assert {"log_scale", "network.positional_embedding"} <= free and "network.token_embedding.weight" not in free


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_it_learns_which_caption_is_whose(trainable, loss, tiny_student, quiet_trainer, seen):
    fit(build(tiny_student, trainable=trainable, loss=loss, lr=3e-3), quiet_trainer(max_steps=40), batches(40))
    first, last = (sum(loss.mean().item() for _, _, loss in part) / 5 for part in (seen[:5], seen[-5:]))
    assert last < 0.5 * first


def test_diagnosis_and_the_greatest_scale(tiny_student, quiet_trainer):
    module = build(tiny_student, loss="sigmoid", temperature=0.2, bias=-3.0)
    assert module.objectives["captions"].log_scale.exp().item() == pytest.approx(5)
    fit(module, quiet_trainer(max_steps=1))
    values = module.objectives["captions"].diagnosis()
    assert values["temperature"].item() == pytest.approx(0.2) and values["bias"].item() == -3
    assert 0 <= values["own_caption_nearest"] <= 1 and not any(x.requires_grad for x in values.values())
    module.objectives["captions"].log_scale.data.fill_(50.0)
    fit(module, quiet_trainer(max_steps=1))
    assert module.objectives["captions"].diagnosis()["temperature"].item() == pytest.approx(0.01)


def test_one_of_several_captions_is_drawn_by_the_step():
    objective = ImageText(DIMS, text=clip())
    texts = ["a red bag\na blue bag\n\n  \na bag", "a coat", "", " \n"]
    drawn = [objective._drawn(texts, (step,)) for step in range(60)]
    assert drawn == [objective._drawn(texts, (step,)) for step in range(60)]
    counts = [sum(row[0] == text for row in drawn) for text in ("a red bag", "a blue bag", "a bag")]
    assert sum(counts) == 60 and min(counts) >= 10
    assert {tuple(row[1:]) for row in drawn} == {("a coat", "", "")}


def test_equal_and_missing_captions_are_told_apart_by_their_tokens():
    """The tower reads no articles, so two of these are one caption; the empty one counts for nothing."""
    torch.manual_seed(0)
    objective = ImageText(DIMS, text=clip())
    features = torch.randn(4, 1, 32)

    def run(texts, rows):
        scene = SimpleNamespace(
            batch={"txt": texts}, features=lambda: SimpleNamespace(summary=features[rows]), key=(0,), step=0
        )
        return objective(scene)

    got = run(["a red bag", "red bag", "a coat", ""], [0, 1, 2, 3])
    assert got[3] == 0
    embedded = objective.teacher.text.encode_text(["a red bag", "red bag", "a coat"])
    found = pairs(objective.project(features[:3, 0]), embedded, torch.tensor([5, 5, 6]), torch.ones(3).bool())
    torch.testing.assert_close(got[:3], softmax_contrast(found, objective.log_scale.exp()))


def test_captions_that_never_came(tiny_student, quiet_trainer):
    without = [{k: v for k, v in batch.items() if k != "txt"} for batch in batches()]
    with pytest.raises(UserError, match="data.fields: no captions at step 0; valid: with txt"):
        fit(build(tiny_student), quiet_trainer(max_steps=1), without)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": TinyTeacher("sam", pretrained=False)}, "text: TinyTeacher sam has no text tower; valid: OpenClip"),
        ({"loss": "sigmod"}, "loss: 'sigmod'.*did you mean sigmoid"),
        ({"temperature": 0.001}, "temperature: 0.001; valid: >= 0.01"),
        ({"token": 1}, "token: 1; valid: 0 to 0"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(UserError, match=words) as err:
        ImageText(DIMS, **{"text": clip(), **options})
    assert "\n" not in str(err.value)


def test_an_annealed_average_beside_captions_is_refused(tiny_student):
    """Captions go on teaching, so the average must be able to follow; pure self-distillation may anneal."""
    captions, views = partial(ImageText, text=clip()), partial(Dino, prototypes=16, hidden=32, bottleneck=8)
    options = {"ema_schedule": "cosine"}
    with pytest.raises(UserError, match="model.ema_schedule: cosine.*captions.*ema_anneal_anyway: true"):
        Distiller(tiny_student(), {}, objectives={"captions": captions, "views": views}, **options)
    Distiller(tiny_student(), {}, objectives={"views": views}, **options)
    told = {**options, "ema_anneal_anyway": True}
    Distiller(tiny_student(), {}, objectives={"captions": captions, "views": views}, **told)
    assert ImageText.anchors and not Objective.anchors and not Dino.anchors


SCRIPT = '''
import sys
from functools import partial
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from agglom.distiller import Distiller
from agglom.selfdistill import ImageText
from agglom.students import TimmStudent
from agglom.teachers import TinyTeacher

ranks, out = int(sys.argv[1]), sys.argv[2]
TEXTS = ["a red bag", "a blue coat", "a red bag", "", "a pink shirt", "the red bag", "a bag", "a coat"]


class Parts(pl.LightningDataModule):
    """Rank r of n sees images r * 8 / n to (r + 1) * 8 / n of each step; equal captions lie on both."""

    def train_dataloader(self):
        pixels = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        part = slice(self.trainer.global_rank * 8 // ranks, (self.trainer.global_rank + 1) * 8 // ranks)
        steps = [{"image": x[part], "key": TEXTS[part], "txt": TEXTS[part]} for x in pixels]
        return DataLoader(steps, batch_size=None)


if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    student = TimmStudent(name="vit_tiny_patch16_224", kwargs={
        "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2})
    text = partial(TinyTeacher, "clip", pretrained=False)
    objectives = {
        "softmax": partial(ImageText, text=text(), trainable=True),
        "sigmoid": partial(ImageText, text=text(), trainable=True, loss="sigmoid"),
        "frozen": partial(ImageText, text=text()),
    }
    module = Distiller(student, {}, objectives=objectives, optimizer="sgd", lr=0.1, warmup_steps=0,
        schedule="constant", ema_decay=0.5)
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_steps=2, max_epochs=-1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=Parts())
    torch.save(module.state_dict(), f"{out}/{ranks}-{trainer.global_rank}.pt")
'''


@pytest.mark.slow
def test_two_ranks_train_the_weights_of_one(tmp_path, one_thread):
    """With all captions of the step as negatives, equal ones on both ranks and an image without one."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    for ranks in (1, 2):
        done = subprocess.run(
            [sys.executable, str(script), str(ranks), str(tmp_path)],
            env=one_thread, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert one.keys() == first.keys()
    for key, expected in one.items():
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, msg=f"ranks: {key}")
            torch.testing.assert_close(first[key], expected, rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")
