"""Fine-tuning: rates by depth, a classifier that timm loads, Lightning's BackboneFinetuning, the shipped recipe."""

import json
from importlib.resources import files

import pytest
import timm
import torch
import yaml
from lightning.pytorch.callbacks import BackboneFinetuning

from agglom.callbacks import export_module
from agglom.cli import main
from agglom.data import ShardDataModule
from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.finetune import Classifier, timm_name
from agglom.teachers import manifest


@pytest.fixture
def folder(tiny_student, tiny_teachers, tmp_path):
    """An export of two blocks for 32 pixels, in a run directory."""
    module = Distiller(tiny_student(registers=1), tiny_teachers("clip")).eval()
    return export_module(module, tmp_path / "run" / "export", manifest(dict(module.encoders.items())), 32, 7)


def data(scenes, **options):
    return ShardDataModule(
        data=str(scenes),
        batch_size=8,
        size=32,
        fields=("image", "cls"),
        num_workers=0,
        **{"val_split": None, **options},
    )


def test_rates_fall_with_depth(folder, scenes, quiet_trainer):
    """Embedding, two blocks (the norm goes with the last), head: lr * decay^depth, and no weight decay on vectors."""
    model = Classifier(str(folder), lr=0.01, layer_decay=0.5, weight_decay=0.1)
    quiet_trainer(max_steps=1).fit(model, datamodule=data(scenes))
    groups = model.configure_optimizers().param_groups
    place = {id(p): group for group in groups for p in group["params"]}
    named = {name: place[id(p)] for name, p in model.named_parameters()}
    assert len(named) == sum(len(group["params"]) for group in groups), "each parameter once"
    rates = {name: group["lr"] for name, group in named.items()}
    for name, power in (
        ("head.weight", 0),
        ("backbone.norm.weight", 1),
        ("backbone.blocks.1.mlp.fc1.weight", 1),
        ("backbone.blocks.0.mlp.fc1.weight", 2),
        ("backbone.patch_embed.proj.weight", 3),
    ):
        assert rates[name] == pytest.approx(0.01 * 0.5**power), name
    for name in ("backbone.blocks.0.mlp.fc1.bias", "backbone.norm.weight", "backbone.pos_embed", "backbone.cls_token"):
        assert named[name]["weight_decay"] == 0, name
    assert named["backbone.blocks.0.mlp.fc1.weight"]["weight_decay"] == 0.1
    # of a run of one step, the first of a warm-up of half of it: the full rate at once
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.slow
def test_the_recipe_learns_and_timm_loads_the_classifier(folder, scenes, tmp_path, capsys):
    config = yaml.safe_load((files("agglom.configs") / "finetune" / "scenes.yaml").read_text())
    out = tmp_path / "finetune"
    command = [
        "finetune", "--config", "configs/finetune/scenes.yaml", "--model.backbone", str(folder.parent),
        "--data.data", str(scenes), "--data.size", "32", "--data.num_workers", "0", "--trainer.max_steps", "40",
        "--trainer.val_check_interval", "40", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(out),
    ]  # fmt: skip
    main(command)
    said = capsys.readouterr().out.strip().splitlines()
    assert said[-2].startswith("top-1 on test: ") and said[-1] == str(out / "model")
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["model"]["layer_decay"] == config["model"]["layer_decay"] == 0.75
    model = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True).eval()
    before = timm.create_model(f"local-dir:{folder}", pretrained=True)
    moved = (model.patch_embed.proj.weight - before.patch_embed.proj.weight).abs().max().item()
    assert model.num_classes == 10 and 0 < moved < 0.1, "fine-tuned, not trained anew"
    about = json.loads((out / "model" / "config.json").read_text())
    assert about["label_names"][:2] == ["t-shirt", "trouser"]

    # the accuracy that was printed is that of the folder, through plain timm
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    module = data(scenes, val_split="test")
    module.setup("validate")
    right = total = 0
    for batch in module.val_dataloader():
        with torch.no_grad():
            right += (model((batch["image"] / 255 - mean) / std).argmax(1) == batch["cls"]).sum().item()
        total += len(batch["cls"])
    assert said[-2] == f"top-1 on test: {100 * right / total:.1f} %" and total == 32

    with pytest.raises(SystemExit) as err:
        main(command)
    assert err.value.code == 2 and "holds a run; start anew with --overwrite true" in capsys.readouterr().err


@pytest.mark.slow
def test_the_head_alone_first_with_lightnings_callback(folder, scenes, quiet_trainer):
    model, seen = Classifier(str(folder), lr=0.01, warmup_steps=0), []
    start = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}

    class Watch(BackboneFinetuning):
        def on_train_epoch_end(self, trainer, pl_module):
            changed = any(not torch.equal(p, start[name]) for name, p in pl_module.backbone.named_parameters())
            seen.append((changed, len(trainer.optimizers[0].param_groups), pl_module.head.weight.std().item()))

    watch = Watch(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.1, verbose=False)
    trainer = quiet_trainer(max_epochs=3, limit_train_batches=2, callbacks=[watch])
    trainer.fit(model, datamodule=data(scenes))
    assert [changed for changed, *_ in seen] == [False, True, True]
    assert seen[1][1] == seen[0][1] + 1 and seen[1][2] != seen[0][2] and trainer.global_step == 6


def test_random_weights_have_the_same_shape(folder):
    trained, scratch = Classifier(str(folder)), Classifier(str(folder), pretrained=False)
    assert trained.spec == scratch.spec and trained.spec.size == (32, 32)
    pairs = list(zip(trained.backbone.parameters(), scratch.backbone.parameters(), strict=True))
    assert all(a.shape == b.shape for a, b in pairs) and not all(torch.equal(a, b) for a, b in pairs)


def test_where_a_backbone_comes_from(folder, tmp_path):
    assert timm_name(str(folder)) == timm_name(str(folder.parent)) == f"local-dir:{folder}"
    assert timm_name("timm:resnet18") == timm_name("resnet18") == "resnet18" and timm_name("hf-hub:a/b") == "hf-hub:a/b"
    (tmp_path / "unfinished").mkdir()
    for name, said in (("resnet81", "did you mean resnet"), (str(tmp_path / "unfinished"), "holds no export")):
        with pytest.raises(UserError, match=said) as err:
            timm_name(name)
        assert "\n" not in str(err.value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model.backbone", "resnet81"], "did you mean"),
        (["--model.backbone", "resnet10t", "--model.layer_decay", "0"], "model.layer_decay: 0.0; valid: above 0"),
        (["--model.backbone", "resnet10t", "--model.nothing", "1"], "agglom finetune --help"),
    ],
)
def test_bad_input_is_one_line(args, said, scenes, tmp_path, capsys):
    shared = ["--data.data", str(scenes), "--data.batch_size", "8", "--data.size", "32", "--data.num_workers", "0"]
    with pytest.raises(SystemExit) as err:
        main(["finetune", *shared, "--trainer.default_root_dir", str(tmp_path / "run"), *args])
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert err.value.code == 2 and line.startswith("agglom finetune: ") and said in line
