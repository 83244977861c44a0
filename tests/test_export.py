"""Exports: plain timm gives the trained student's features without agglom, adaptors answer in their teachers' units."""

import json
import subprocess
import sys

import pytest
import timm
import torch
import yaml

import agglom
from agglom.adaptors import (
    AttentionAdaptor,
    ConvAdaptor,
    LadderAdaptor,
    LinearAdaptor,
    MLPAdaptor,
    OrthogonalAdaptor,
)
from agglom.callbacks import export_module
from agglom.cli import main
from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.export import fold_normalizers, random_like
from agglom.features import Dims, Features, StudentFeatures
from agglom.heads import Head
from agglom.objectives import MSE
from agglom.runs import build_distiller
from agglom.students import TimmStudent
from agglom.targets import Standardize
from agglom.teachers import manifest

STUDENTS = {
    "plain": {"summary_tokens": 2},
    "registers": {"summary_tokens": 2, "registers": 2},
    "any size": {"kwargs": {"dynamic_img_size": True}},
    "hybrid": {
        "name": "vit_tiny_r_s16_p8_224",
        "kwargs": {"img_size": 32, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2},
        "mean": (0.4, 0.5, 0.6),
    },
    "cnn": {"name": "resnet10t", "kwargs": {}},
}
# In a process that can't import agglom: features of the images in images.pt by timm alone.
PLAIN = """
import sys
sys.modules["agglom"] = None
import timm, torch
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
images = torch.load(sys.argv[1] + "/images.pt", weights_only=True)
mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
with torch.no_grad():
    torch.save(model.forward_features((images - mean) / std), sys.argv[1] + "/features.pt")
assert not [name for name in sys.modules if name.startswith("agglom.")]
"""


def distiller(tiny_student, tiny_teachers, kind, adaptor=MLPAdaptor):
    options = dict(STUDENTS[kind])
    torch.manual_seed(0)
    student = TimmStudent(**options) if "name" in options else tiny_student(**options)
    module = Distiller(student, tiny_teachers("clip", "dino", "sam"), adaptor=adaptor).train()
    for _ in range(2):  # statistics of teachers and of batch norms move off their initial values
        images = torch.rand(4, 3, 32, 32)
        module.targets(module.frames(images), module.names)
        module.student(images)
    return module.eval()


def export(module, out):
    return export_module(module, out, manifest(dict(module.encoders.items())), 32, 7)


def images(seed=5):
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def check_adaptors(module, folder):
    """`agglom.load(...).adaptors` against the training heads' predictions, denormalised."""
    loaded = agglom.load(folder)
    student = module.student(images(), module.taps)
    assert list(loaded.adaptors) == module.names
    for name, head in module.heads.items():
        got, raw = loaded.adaptors[name](images()), head.adaptor(student)
        for kind in head.losses:
            expected = head.normalizers[kind].denormalize(getattr(raw, kind).movedim(1, -1)).movedim(-1, 1)
            torch.testing.assert_close(getattr(got, kind), expected, rtol=1e-5, atol=1e-5)
    assert loaded.adaptors["sam"](images()).summary is None
    return loaded


@pytest.mark.parametrize("kept", [["sam"], ["clip", "dino"], []])
def test_adaptors_left_out_change_nothing_else(kept, tiny_student, tiny_teachers, tmp_path):
    module = distiller(tiny_student, tiny_teachers, "plain")
    whole, part = export(module, tmp_path / "whole"), tmp_path / "part"
    about = manifest(dict(module.encoders.items()))
    export_module(module, part, about, 32, 7, ["dino", "clip", "sam"])  # an older one, to be replaced
    export_module(module, part, about, 32, 7, kept)
    for name in ("config.json", "model.safetensors"):
        assert (whole / name).read_bytes() == (part / name).read_bytes()
    loaded, full = agglom.load(part), agglom.load(whole)
    assert list(loaded.adaptors) == kept and torch.equal(loaded(images()).summary, full(images()).summary)
    for name in kept:
        assert torch.equal(loaded.adaptors[name](images()).spatial, full.adaptors[name](images()).spatial)
    card = (part / "README.md").read_text()
    assert all(f"`{name}`" in card for name in kept) and ("backbone alone" in card) == (not kept)


@pytest.mark.parametrize("kind", STUDENTS)
def test_timm_and_adaptors(kind, tiny_student, tiny_teachers, tmp_path):
    module = distiller(tiny_student, tiny_teachers, kind)
    folder = export(module, tmp_path / "export")
    loaded = check_adaptors(module, folder)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert plain.pretrained_cfg["input_size"] in ((3, 32, 32), [3, 32, 32])
    own = module.student.input
    for key, value in (("mean", own.mean), ("std", own.std), ("interpolation", own.interpolation), ("crop_pct", 1.0)):
        got = plain.pretrained_cfg[key]
        assert (tuple(got) if isinstance(got, list) else got) == value
    with torch.no_grad():
        summary, spatial = loaded(images())
        expected = module.student(images())
    torch.testing.assert_close(summary, expected.summary.flatten(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spatial, expected.spatial, rtol=1e-5, atol=1e-5)
    if kind == "any size":
        with torch.no_grad():
            assert loaded(torch.rand(1, 3, 48, 64)).spatial.shape[-2:] == (6, 8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["registers", "hybrid", "cnn"])
def test_plain_timm_where_agglom_can_not_be_imported(kind, tiny_student, tiny_teachers, tmp_path, one_thread):
    module = distiller(tiny_student, tiny_teachers, kind)
    folder = export(module, tmp_path / "export")
    torch.save(images(), folder / "images.pt")
    subprocess.run([sys.executable, "-c", PLAIN, str(folder)], check=True, cwd=tmp_path, env=one_thread)
    features = torch.load(folder / "features.pt", weights_only=True)
    with torch.no_grad():
        expected = module.student(images())
    if features.ndim == 3:
        torch.testing.assert_close(features[:, : module.student.tokens], expected.summary, rtol=1e-5, atol=1e-5)
        prefix = module.student.backbone.num_prefix_tokens
        features = features[:, prefix:].transpose(1, 2).unflatten(2, expected.spatial.shape[-2:])
    torch.testing.assert_close(features, expected.spatial, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "cnn"])
def test_ladders_keep_their_taps(kind, tiny_student, tiny_teachers, tmp_path):
    module = distiller(tiny_student, tiny_teachers, kind, LadderAdaptor)
    assert module.taps
    check_adaptors(module, export(module, tmp_path / "export"))


ADAPTORS = {
    "mlp": (MLPAdaptor, {}),
    "mlp v2": (MLPAdaptor, {"version": "v2"}),
    "mlp upsampling": (MLPAdaptor, {"upsample": 2}),
    "ladder": (LadderAdaptor, {}),
    "ladder raw": (LadderAdaptor, {"raw_last": True}),
    "linear": (LinearAdaptor, {}),
    "orthogonal": (OrthogonalAdaptor, {}),
    "attention": (AttentionAdaptor, {}),
    "conv": (ConvAdaptor, {}),
    "conv upsampling": (ConvAdaptor, {"upsample": 2}),
}


@pytest.mark.parametrize("name", ADAPTORS)
@torch.no_grad()
def test_folded_prediction_is_the_denormalised_one(name):
    """Taps on three grids, as a CNN has them, so that a mean added twice or before an alignment would show."""
    torch.manual_seed(0)
    kind, options = ADAPTORS[name]
    widths = ((4, 4), (6, 6), (8, 8))
    taps = {str(i): (torch.randn(2, 1, w), torch.randn(2, w, 16 >> i, 16 >> i)) for i, (w, _) in enumerate(widths)}
    student = StudentFeatures(*taps["2"], taps)
    head = Head(
        student=Dims(8, 8, 1, 3, widths),
        teacher=Dims(10, 12),
        token=0,
        tap_names=tuple(taps),
        weights={"summary": 1.0, "spatial": 1.0},
        adaptor=lambda *dims: kind(*dims, **options),
        normalizers={"summary": Standardize, "spatial": Standardize},
        losses={"summary": MSE, "spatial": MSE},
    ).train()
    spread = torch.arange(1, 13.0).view(12, 1, 1)
    head.targets(Features(9 + 4 * torch.randn(8, 10), spread * torch.randn(8, 12, 4, 4) - 5))
    raw, folded = head.adaptor(student, (5, 5)), fold_normalizers(head)(student, (5, 5))
    for part in ("summary", "spatial"):
        expected = head.normalizers[part].denormalize(getattr(raw, part).movedim(1, -1)).movedim(-1, 1)
        torch.testing.assert_close(getattr(folded, part), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(getattr(raw, part), expected, atol=0.1)
        torch.testing.assert_close(getattr(head.adaptor(student, (5, 5)), part), getattr(raw, part))  # left untouched


@pytest.mark.parametrize("kind", ["registers", "cnn"])
def test_one_pass_answers_for_student_blocks_and_adaptors(kind, tiny_student, tiny_teachers, tmp_path):
    """`answer` runs the student once; each part equals what its own way gives."""
    loaded = agglom.load(export(distiller(tiny_student, tiny_teachers, kind, LadderAdaptor), tmp_path))
    calls = []
    loaded.student.register_forward_hook(lambda *_: calls.append(1))
    found = loaded.answer(images(), blocks=2, adaptors=("clip", "sam"))
    assert len(calls) == 1
    plain = loaded(images())
    torch.testing.assert_close(found.features.summary, plain.summary)
    torch.testing.assert_close(found.features.spatial, plain.spatial)
    for name in ("clip", "sam"):
        own = loaded.adaptors[name](images())
        torch.testing.assert_close(found.adaptors[name].spatial, own.spatial)
    assert found.adaptors["sam"].summary is None
    taps = loaded.forward_features(images(), loaded.student.tap_names[-2:]).taps
    norm = loaded.student.backbone.norm if loaded.student.is_vit else torch.nn.Identity()
    for block, (summary, spatial) in zip(found.blocks, taps.values(), strict=True):
        torch.testing.assert_close(block.summary, norm(summary).flatten(1))
        torch.testing.assert_close(block.spatial, norm(spatial.movedim(1, -1)).movedim(-1, 1))
    if loaded.student.is_vit:
        torch.testing.assert_close(found.blocks[-1].spatial, plain.spatial)


def test_random_like_is_another_student_and_seeded(tiny_student, tiny_teachers, tmp_path):
    loaded = agglom.load(
        export(distiller(tiny_student, tiny_teachers, "registers", LadderAdaptor), tmp_path / "export")
    )
    before = torch.random.get_rng_state()
    first, same, other = random_like(loaded, seed=5), random_like(loaded, seed=5), random_like(loaded, seed=6)
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.no_grad():
        features = [model(images()).spatial for model in (loaded, first, same, other)]
    assert torch.equal(features[1], features[2])
    assert not torch.allclose(features[0], features[1]) and not torch.allclose(features[1], features[3])
    assert {k: v.shape for k, v in first.state_dict().items()} == {k: v.shape for k, v in loaded.state_dict().items()}
    assert list(first.adaptors) == list(loaded.adaptors)


@pytest.fixture
def folder(tiny_student, tiny_teachers, tmp_path):
    return export(distiller(tiny_student, tiny_teachers, "plain"), tmp_path / "export")


@pytest.mark.parametrize(
    "name", ["agglom.json", "adaptors.json", "adaptors.safetensors", "config.json", "model.safetensors"]
)
def test_a_missing_or_broken_file_is_one_line(folder, name):
    for spoil in (lambda path: path.write_bytes(b"\x00{broken"), lambda path: path.unlink()):
        spoil(folder / name)
        with pytest.raises(UserError) as err:
            agglom.load(folder)
        assert name in str(err.value) and "\n" not in str(err.value)


def test_unknown_names_are_one_line(folder):
    with pytest.raises(UserError, match="adaptor 'clop'.*did you mean clip") as err:
        agglom.load(folder).adaptors["clop"]
    assert isinstance(err.value, KeyError) and str(err.value).startswith("adaptor 'clop'; valid: clip, dino, sam")
    entries = json.loads((folder / "adaptors.json").read_text())
    entries["clip"]["class"] = "os.system"
    (folder / "adaptors.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="class 'os.system'"):
        agglom.load(folder)


def test_nothing_pickled_and_the_card_names_teachers(folder):
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".md"}
    card = (folder / "README.md").read_text()
    assert all(f"`{name}`" in card for name in ("clip", "dino", "sam")) and "local-dir:" in card


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--ckpt", "unfinished", "--out", "out"], "ckpt: unfinished/checkpoints/last.ckpt does not exist"),
        (["--ckpt", "unfinished/config.yaml", "--out", "out"], "ckpt: unfinished/config.yaml can't be read"),
        (["--ckpt", "run", "--out", "/proc/agglom/out"], "out: /proc/agglom/out: No such file"),
        (["--ckpt", "run", "--out", "file"], "out: file: File exists; valid: a folder that can be written"),
        (["--ckpt", "run", "--out", "file/out"], "out: file/out: Not a directory"),
        (["--ckpt", "run", "--out", "out", "--adaptors", "clop"], "adaptors: 'clop'; valid: clip (did you mean clip?)"),
        (["--ckpt", "run", "--out", "out", "--onnx-adaptors", "clip"], "onnx_adaptors: clip without onnx"),
    ],
)
def test_bad_input_of_the_command_is_one_line(args, said, tmp_path, monkeypatch, capsys):
    """Nothing is written; the run is one that has a checkpoint, the other was stopped before its first."""
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    tiny = {"class_path": "agglom.teachers.TinyTeacher", "init_args": {"name": "clip", "pretrained": False}}
    student = {
        "class_path": "agglom.students.TimmStudent",
        "init_args": {"name": "vit_tiny_patch16_224", "kwargs": vit},
    }
    config = {"model": {"student": student, "teachers": {"clip": {"encoder": tiny}}}, "data": {"size": 32}}
    for name in ("run", "unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run" / "checkpoints").mkdir()
    state = {"state_dict": build_distiller(config).state_dict(), "callbacks": {}, "global_step": 1}
    state |= {"optimizer_states": [], "loops": {}}
    torch.save(state, tmp_path / "run" / "checkpoints" / "last.ckpt")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as err:
        main(["export", *args])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert err.value.code == 2 and line.startswith(f"agglom export: {said}")
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == ""
    main(["export", "--ckpt", "run", "--out", "out"])
    assert agglom.load("out").adaptors["clip"](images()).summary.shape == (2, 128)
