"""mmsegmentation: its IoUMetric and ours, its Runner on our backbone and shards, stand-ins, life without the extra."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agglom.data import eval_stream, write_index, write_shard
from agglom.errors import UserError
from agglom.features import ask
from agglom.probes.segmentation import count_areas, scores
from agglom.runs import resolve

CONFIG = Path(__file__).parent.parent / "configs" / "mmseg" / "linear_scenes.py"


@pytest.fixture(scope="module")
def mmseg():
    pytest.importorskip("mmseg", reason="needs the extra agglom[mmseg]")
    import agglom.mmseg

    return agglom.mmseg


@pytest.fixture
def config(mmseg, scenes, tmp_path):
    """The config as it is shipped, but for place, length and worker processes."""
    from mmengine.config import Config

    config = Config.fromfile(str(CONFIG))
    config.work_dir = str(tmp_path / "work")
    for part in ("train", "val", "test"):
        loader = config[f"{part}_dataloader"]
        loader.dataset.data_root = str(scenes)
        loader.num_workers, loader.persistent_workers = 0, False
    config.train_dataloader.batch_size = 8
    config.param_scheduler[0].end = config.param_scheduler[1].begin = 5
    config.param_scheduler[1].end = config.train_cfg.max_iters = config.train_cfg.val_interval = 20
    config.default_hooks.checkpoint.interval = 20
    return config


def masks(case, *, images=6, classes=5):
    """(predicted, truth) of one case, (n, 9, 7) uint8."""
    rng = np.random.default_rng(len(case))
    predicted = rng.integers(0, classes, (images, 9, 7)).astype(np.uint8)
    truth = rng.integers(0, classes, (images, 9, 7)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.3] = 255
    if case == "a class in neither":
        predicted[predicted == 3] = 0
        truth[truth == 3] = 1
    elif case == "a class in predictions alone":
        truth[truth == 4] = 0
    elif case == "a class predicted under ignore alone":
        predicted[(predicted == 4) & (truth != 255)] = 0
        truth[truth == 4] = 1
        assert (predicted == 4).any()
    elif case == "a class in truth alone":
        predicted[predicted == 2] = 0
    elif case == "empty masks":
        truth[:4] = 0
    elif case == "images all ignored":
        truth[::2] = 255
    elif case == "everything ignored":
        truth[:] = 255
    elif case == "all right":
        predicted = np.where(truth == 255, predicted, truth)
    else:
        assert case == "some pixels ignored"
    return predicted, truth


@pytest.mark.parametrize(
    "case",
    [
        "some pixels ignored",
        "a class in neither",
        "a class in predictions alone",
        "a class predicted under ignore alone",
        "a class in truth alone",
        "empty masks",
        "images all ignored",
        "everything ignored",
        "all right",
    ],
)
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_scores_are_those_of_ioumetric(mmseg, case):
    from mmseg.evaluation import IoUMetric

    predicted, truth = masks(case)
    ours = count_areas(predicted, truth, 5)
    metric = IoUMetric()
    metric.dataset_meta = {"classes": tuple("abcde")}
    samples = [
        {"pred_sem_seg": {"data": torch.from_numpy(p)[None].long()}, "gt_sem_seg": {"data": torch.from_numpy(t)[None]}}
        for p, t in zip(predicted, truth, strict=True)
    ]
    metric.process({}, samples)
    for mine, (inter, union, predictions, labels) in zip(ours, metric.results, strict=True):
        assert (mine == np.stack([inter, predictions, labels])).all()
        assert (mine[1] + mine[2] - mine[0] == union.numpy()).all()
    theirs = metric.compute_metrics(metric.results)  # percent, two decimals
    found = scores(ours.sum(0))
    for name, value in (("mIoU", found["miou"]), ("aAcc", found["aacc"]), ("mAcc", found["macc"])):
        assert theirs[name] == pytest.approx(100 * value, abs=0.0051, nan_ok=True)
    exact = IoUMetric.total_area_to_metrics(*(sum(areas) for areas in zip(*metric.results, strict=True)))  # float32
    assert np.nanmean(exact["IoU"]) == pytest.approx(found["miou"], rel=1e-6, nan_ok=True)
    assert np.nanmean(exact["Acc"]) == pytest.approx(found["macc"], rel=1e-6, nan_ok=True)


@pytest.mark.slow
def test_runner_trains_and_evaluates(config, scenes):
    from mmengine.runner import Runner

    runner = Runner.from_cfg(config)
    before = {name: tensor.clone() for name, tensor in runner.model.backbone.model.tensors()}
    model = runner.train()
    losses = runner.message_hub.get_scalar("train/loss").data[0]
    assert len(losses) == 20 and np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.model.tensors())
    reported = runner.message_hub.get_scalar("val/mIoU").current()

    # the same predictions under our own metric, with truth as our own stream reads it
    model.eval()
    predicted = np.concatenate(
        [s.pred_sem_seg.data.numpy() for batch in runner.val_dataloader for s in model.val_step(batch)]
    )
    truth = np.stack([sample["seg"].numpy() for sample in eval_stream(scenes, "val", fields=["seg"])])
    assert predicted.shape == truth.shape == (32, 48, 48)
    found = 100 * scores(count_areas(predicted, truth, 11).sum(0))["miou"]
    assert reported == pytest.approx(found, abs=0.0051)
    assert found > 100 / 11 * 0.85  # all background: one class right, which is most of the pixels

    # the checkpoint holds neck and head, and mmengine reads it again
    config.load_from = f"{config.work_dir}/iter_20.pth"
    again = Runner.from_cfg(config)
    assert {name.split(".")[0] for name in again.model.state_dict()} == {"neck", "decode_head"}
    assert again.val()["mIoU"] == reported


def test_upernet_and_slide_inference(mmseg):
    """One map four times, mmseg's pyramid, UPerHead; windows over a picture larger than the model."""
    from mmengine.config import ConfigDict
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    torch.manual_seed(0)
    norm = {"type": "BN"}
    model = MODELS.build(
        {
            "type": "EncoderDecoder",
            "backbone": {"type": "agglom.Backbone", "model": "tiny:dino", "repeat": 4},
            "neck": {"type": "Feature2Pyramid", "embed_dim": 192, "rescales": [4, 2, 1, 0.5], "norm_cfg": norm},
            "decode_head": {
                "type": "UPerHead",
                "in_channels": [192] * 4,
                "in_index": [0, 1, 2, 3],
                "channels": 8,
                "num_classes": 3,
                "norm_cfg": norm,
                "align_corners": False,
            },
            "test_cfg": ConfigDict(mode="slide", crop_size=(64, 64), stride=(32, 32)),
        }
    )
    images = torch.rand(2, 3, 64, 64)
    truth = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 3, (1, 64, 64)))) for _ in images]
    loss = model.loss(images, truth)["decode.loss_ce"]
    loss.backward()
    assert torch.isfinite(loss) and model.neck.upsample_4x[0].weight.grad.abs().sum() > 0
    with torch.no_grad():
        answer = model.eval().predict(torch.rand(1, 3, 96, 80))[0]
    assert answer.pred_sem_seg.data.shape == (1, 96, 80) and answer.seg_logits.data.shape == (3, 96, 80)


def test_backbone_is_the_model_frozen(mmseg):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = resolve("tiny:clip")
    backbone = mmseg.Backbone("tiny:clip")
    backbone.init_weights()  # mmengine's initialisation draws nothing anew
    backbone.train()
    (found,) = backbone(images)
    assert torch.equal(found, model(images).spatial) and not found.requires_grad
    assert not list(backbone.parameters()) and not backbone.state_dict()
    last = mmseg.Backbone("tiny:clip", blocks=3)(images)
    wanted = ask(model, images, blocks=3).blocks
    assert len(last) == 3 and all(torch.equal(x, y.spatial) for x, y in zip(last, wanted, strict=True))
    assert not torch.equal(last[0], last[2]) and torch.equal(last[2], found)
    moved = mmseg.Backbone("tiny:clip").to("meta")
    assert moved.model.device.type == "meta"


@pytest.fixture(scope="module")
def cnn_export(tmp_path_factory):
    """An export of an untrained CNN without adaptors."""
    from agglom.export import write_export
    from agglom.students import TimmStudent

    torch.manual_seed(0)
    student = TimmStudent(name="resnet10t", kwargs={"channels": [8, 16, 24, 32]})
    out = tmp_path_factory.mktemp("export")
    return write_export(out, student=student, heads={}, teachers={"teachers": {}}, size=64, step=0)


def test_an_export_can_be_trained(mmseg, cnn_export):
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    levels = mmseg.Backbone(str(cnn_export), blocks=4)(images)
    assert [tuple(x.shape[1:]) for x in levels] == [(8, 16, 24), (16, 8, 12), (24, 4, 6), (32, 2, 3)]
    frozen = mmseg.Backbone(str(cnn_export))
    trained = mmseg.Backbone(str(cnn_export), frozen=False)
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    trained.init_weights()
    assert state and all(torch.equal(state[name], tensor) for name, tensor in trained.state_dict().items())
    assert torch.equal(frozen.train()(images)[0], trained.eval()(images)[0])
    out = trained.train()(images)[0]
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in trained.model.student.backbone.layer1.parameters())
    assert not torch.equal(out, frozen(images)[0])  # batch statistics: it is in training mode, the frozen one never is


@pytest.mark.parametrize(
    "options, message",
    [
        ({"blocks": 2, "repeat": 4}, "backbone: blocks 2, repeat 4; valid: positive, and one of them 1"),
        ({"blocks": 0}, "blocks 0"),
        ({"frozen": False}, "backbone.frozen: false; tiny:dino is a frozen teacher; give an export or a run"),
        ({"init_cfg": {"type": "Pretrained"}}, "backbone.init_cfg"),
        ({"model": "tiny:dina"}, "did you mean dino"),
    ],
)
def test_backbone_options_without_meaning(mmseg, options, message):
    with pytest.raises(UserError, match=message) as caught:
        mmseg.Backbone(**{"model": "tiny:dino", **options})
    assert "\n" not in str(caught.value)


def test_backbone_and_images_that_do_not_fit(mmseg, cnn_export):
    with pytest.raises(UserError, match=r"data_preprocessor: pixels from 0 to 255; .* set mean \[0, 0, 0\]"):
        mmseg.Backbone("tiny:dino")(torch.linspace(0, 255, 3 * 64 * 64).view(1, 3, 64, 64))
    with pytest.raises(UserError, match="size_divisor: 32"):
        mmseg.Backbone(str(cnn_export))(torch.zeros(1, 3, 64, 80))
    with pytest.raises(UserError, match="backbone.blocks: 99; tiny:dino tells of 4"):
        mmseg.Backbone("tiny:dino", blocks=99)(torch.zeros(1, 3, 64, 64))


def test_shards_load_as_our_own_streams_read_them(config, scenes):
    from mmseg.registry import DATASETS

    config.val_dataloader.dataset._scope_ = "mmseg"
    dataset = DATASETS.build(config.val_dataloader.dataset)
    assert dataset.metainfo["classes"][:2] == ("background", "t-shirt") and len(dataset.metainfo["palette"]) == 11
    samples = list(eval_stream(scenes, "val", fields=["image", "seg"]))
    assert len(dataset) == len(samples) == 32
    for item, sample in zip(dataset, samples, strict=True):
        assert torch.equal(item["inputs"].flip(0), sample["image"])  # BGR
        assert torch.equal(item["data_samples"].gt_sem_seg.data[0], sample["seg"].long())
        assert item["data_samples"].img_path.endswith(f"/{sample['key']}.png")


def test_shards_that_do_not_fit(mmseg, scenes, tmp_path):
    with pytest.raises(UserError, match="valid: background, t-shirt"):
        mmseg.ShardDataset(str(scenes), "val", metainfo={"classes": ["cat", "dog"]})
    with pytest.raises(UserError, match="no split 'vall'"):
        mmseg.ShardDataset(str(scenes), "vall")
    image, seg = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
    shard = write_shard(
        tmp_path / "train-0.tar", [{"key": "a", "image": image, "seg": seg}, {"key": "b", "image": image}]
    )
    write_index(tmp_path, {"train": [shard]}, seg_classes=["x", "y"])
    with pytest.raises(UserError, match="sample b has no field 'seg'"):
        mmseg.ShardDataset(str(tmp_path), "train")
    write_index(tmp_path, {"train": [shard._replace(count=3)]}, seg_classes=["x", "y"])
    with pytest.raises(UserError, match="holds 2 samples, the index says 3"):
        mmseg.ShardDataset(str(tmp_path), "train")
    write_index(tmp_path, {"train": [shard]})
    with pytest.raises(UserError, match="set metainfo.classes"):
        mmseg.ShardDataset(str(tmp_path), "train")
    (tmp_path / "train-0.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match="not a readable shard"):
        mmseg.shards.locate(mmseg.shards.read_index(tmp_path), "train")


def test_operators_of_a_compiled_mmcv(mmseg):
    from mmcv.ops import point_sample, sigmoid_focal_loss
    from mmseg.models.losses.focal_loss import py_sigmoid_focal_loss

    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 4, 8, generator=generator)
    centres = torch.stack([(torch.arange(8) + 0.5) / 8, torch.full((8,), 2.5 / 4)], -1).expand(2, 8, 2)  # row 2
    assert torch.allclose(point_sample(maps, centres), maps[:, :, 2])
    assert torch.allclose(point_sample(maps, centres[:, None]), maps[:, :, 2:3])

    logits = torch.randn(6, 4, generator=generator, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, 0])  # 4 is background
    one_hot = torch.nn.functional.one_hot(target, 5)[:, :4]
    for gamma, alpha in ((2.0, 0.25), (1.5, 0.5)):
        theirs = py_sigmoid_focal_loss(logits, one_hot, gamma=gamma, alpha=alpha, reduction="none")
        assert torch.allclose(sigmoid_focal_loss(logits, target, gamma, alpha, None, "none"), theirs, atol=1e-6)
        assert torch.allclose(sigmoid_focal_loss(logits, target, gamma, alpha), theirs.sum() / 6, atol=1e-6)
    with pytest.raises(NotImplementedError, match="compiled mmcv"):
        sigmoid_focal_loss(logits, target, 2.0, 0.25, torch.ones(4))
    with pytest.raises(ModuleNotFoundError, match="CrissCrossAttention needs a compiled mmcv"):
        from mmcv.ops import CrissCrossAttention  # noqa: F401
    assert not hasattr(sys.modules["mmcv.ops"], "__path__")


class Method:
    """Pickles as a method of `owner`."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_checkpoints_run_no_code(mmseg, tmp_path):
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import CheckpointLoader

    path = str(tmp_path / "a.pth")
    history = HistoryBuffer([1.0, 3.0], [1, 1])
    torch.save({"state_dict": {"x": torch.ones(2)}, "loss": history, "max": Method(HistoryBuffer, "max")}, path)
    loaded = CheckpointLoader.load_checkpoint(path, map_location="cpu")
    assert loaded["loss"].mean() == 2 and loaded["max"] is HistoryBuffer.max
    torch.save({"bad": Method(torch.Tensor, "add_")}, path)
    with pytest.raises(ValueError, match="may only name methods of HistoryBuffer"):
        CheckpointLoader.load_checkpoint(path, map_location="cpu")
    torch.save({"bad": os.system}, path)
    with pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint(path, map_location="cpu")


def test_without_the_extra_one_line_says_what_to_install(one_thread):
    code = """
import sys
sys.modules["mmseg"] = None
try:
    import agglom.mmseg
except ImportError as err:
    print(err)
from agglom.cli import main
main(["mmseg", "train", "x.py"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=one_thread)
    message = "mmsegmentation: mmseg is not installed; install it with: pip install 'agglom[mmseg]'"
    assert done.returncode == 2 and done.stdout.splitlines() == [message]
    assert done.stderr.splitlines() == [f"agglom mmseg: {message}"]


@pytest.mark.parametrize("missing", ["mmcv", "mmengine", "ftfy", "regex"])
def test_a_part_of_the_extra_is_missing(mmseg, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"^mmsegmentation: {missing} is not installed; .*pip install") as caught:
        mmseg.import_mmseg()
    assert isinstance(caught.value, UserError)


def test_command_says_what_is_wrong(mmseg, capsys):
    from agglom.cli import main

    for args, message in (
        (["trian", str(CONFIG)], "'trian' is no tool; valid: test, train (did you mean train?)"),
        (["train", "nowhere.py"], "nowhere.py: no such config"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["mmseg", *args])
        assert caught.value.code == 2 and message in capsys.readouterr().err
    main(["mmseg"])
    assert "usage: agglom mmseg train CONFIG" in capsys.readouterr().out
