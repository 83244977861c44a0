"""Exports as graphs: ONNX by onnxruntime and .pt2 by torch give the student's features at any batch and size; int8."""

import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

import agglom
from agglom.adaptors import AttentionAdaptor, ConvAdaptor, LadderAdaptor, MLPAdaptor
from agglom.callbacks import export_module
from agglom.cli import main
from agglom.distiller import Distiller
from agglom.errors import UserError
from agglom.graphs import BOUND, OPSET, Graph, pictures, trace, write_graphs, write_onnx
from agglom.students import TimmStudent
from agglom.teachers import manifest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
STUDENTS = {
    "fixed": ({"name": "vit_tiny_patch16_224", "kwargs": VIT, "summary_tokens": 2, "registers": 1}, AttentionAdaptor),
    "any size": ({"name": "vit_tiny_patch16_224", "kwargs": {**VIT, "dynamic_img_size": True}}, LadderAdaptor),
    "cnn": ({"name": "resnet10t"}, ConvAdaptor),
    # padded as TensorFlow does, by an amount that depends on the size: no .pt2 of any size
    "same": ({"name": "resnet10t", "kwargs": {"output_stride": 8, "channels": [8, 16, 24, 32]}}, MLPAdaptor),
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def export(options, adaptor, tiny_teachers, folder):
    torch.manual_seed(0)
    student = TimmStudent(**options, mean=MEAN, std=STD)
    module = Distiller(student, tiny_teachers("clip", "dino", "sam"), adaptor=adaptor).train()
    for _ in range(2):
        images = torch.rand(4, 3, 32, 32)
        module.targets(module.frames(images), module.names)
        module.student(images)
    return export_module(module.eval(), folder, manifest(dict(module.encoders.items())), 32, 7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", STUDENTS)
@torch.no_grad()
def test_onnx_and_pt2_answer_as_the_student(kind, tiny_teachers, tmp_path):
    """Read with the runtimes alone, from images in [0, 1]: nobody can normalise them twice."""
    folder = export(*STUDENTS[kind], tiny_teachers, tmp_path)
    lines = write_graphs(folder, onnx=True, pt2=True, adaptors=["clip", "sam"])
    assert [line.split(":")[0] for line in lines] == ["backbone.onnx", "backbone.pt2", "adaptors.onnx", "adaptors.pt2"]
    assert all(f"opset {OPSET}" in line for line in lines if ".onnx" in line)
    model, card = agglom.load(folder), (folder / "README.md").read_text()
    sizes = [(32, 32)] if kind == "fixed" else [(32, 32), (64, 96), (32, 160)]
    names = {"backbone": ["summary", "map"]}
    names["adaptors"] = [*names["backbone"], "clip_summary", "clip_map", "sam_map"]
    for title, outputs in names.items():
        assert f"`{title}.onnx`: ONNX, opset {OPSET}" in card
        made = onnx.load(folder / f"{title}.onnx")
        onnx.checker.check_model(made)
        assert [entry.version for entry in made.opset_import if entry.domain == ""] == [OPSET]
        session = onnxruntime.InferenceSession(folder / f"{title}.onnx", providers=["CPUExecutionProvider"])
        assert [out.name for out in session.get_outputs()] == outputs
        free = [32, 32] if kind == "fixed" else ["height", "width"]
        assert session.get_inputs()[0].shape == ["batch", 3, *free] and session.get_outputs()[0].shape[0] == "batch"
        program = torch.export.load(folder / f"{title}.pt2").module()
        for count, (height, width) in zip((1, 3, 2), sizes, strict=False):
            images = torch.rand(count, 3, height, width)
            plain, clip, sam = model(images), model.adaptors["clip"](images), model.adaptors["sam"](images)
            expected = [plain.summary, plain.spatial, clip.summary, clip.spatial, sam.spatial][: len(outputs)]
            programs = [] if kind == "same" and (height, width) != (32, 32) else [program(images)]
            for found in (session.run(None, {"images": images.numpy()}), *programs):
                for got, wanted in zip(found, expected, strict=True):
                    torch.testing.assert_close(torch.as_tensor(got), wanted, rtol=1e-4, atol=1e-4)
    assert ("any batch, 32 x 32 pixels" in lines[1]) == (kind in ("fixed", "same"))
    if kind == "fixed":
        assert "any batch, 32 x 32 pixels" in lines[0]
        with pytest.raises(Exception, match="(?i)invalid.*dimension|got invalid"):
            session.run(None, {"images": np.zeros((1, 3, 40, 32), dtype=np.float32)})
    else:
        assert f"any batch, any multiple of {model.input.stride} pixels" in lines[0]


@pytest.mark.slow
def test_int8_is_measured(tiny_teachers, scenes, tmp_path):
    """The cosine that is printed is the one of the files, on the images of the training's data."""
    folder = export(*STUDENTS["any size"], tiny_teachers, tmp_path)
    about = json.loads((folder / "agglom.json").read_text())
    (folder / "agglom.json").write_text(json.dumps({**about, "data": {"address": str(scenes)}}))
    lines = write_graphs(folder, onnx=True, int8=True)
    (line,) = (line for line in lines if line.startswith("backbone.int8.onnx"))
    assert "on 32 val images" in line
    small, whole = folder / "backbone.int8.onnx", folder / "backbone.onnx"
    assert small.stat().st_size < 0.5 * whole.stat().st_size
    weights = {np.dtype(onnx.helper.tensor_dtype_to_np_dtype(t.data_type)) for t in onnx.load(small).graph.initializer}
    assert np.dtype(np.uint8) in weights
    images, _ = pictures(agglom.load(folder))
    assert images.shape == (32, 3, 32, 32) and 0 <= images.min() < 0.2 and 0.5 < images.max() <= 1
    session = onnxruntime.InferenceSession(small, providers=["CPUExecutionProvider"])
    # activations get the scale of their batch: of what write_int8 sends
    parts = [session.run(["map"], {"images": part.numpy()})[0] for part in images.split(16)]
    with torch.no_grad():
        wanted = agglom.load(folder)(images).spatial
    cosine = F.cosine_similarity(torch.from_numpy(np.concatenate(parts)), wanted, dim=1).mean().item()
    assert f"map {cosine:.4f}" in line and 0.99 < cosine < 1 - 1e-7


def test_a_graph_that_answers_otherwise_is_refused_and_not_kept(tiny_teachers, tmp_path):
    folder = export(
        {"name": "vit_tiny_patch16_224", "kwargs": {**VIT, "depth": 1}}, MLPAdaptor, tiny_teachers, tmp_path
    )
    graph = Graph(agglom.load(folder), []).eval()
    program = trace(copy.deepcopy(graph))  # a program shares its module's tensors
    with torch.no_grad():
        graph.student.backbone.norm.bias.add_(2 * BOUND)
    with pytest.raises(UserError, match=r"x\.onnx: \w+ is 2\.\de-04 from torch at 32 x 32 pixels; valid: up to") as err:
        write_onnx(folder / "x.onnx", graph, program)
    assert "\n" not in str(err.value) and not (folder / "x.onnx").exists()
    with torch.no_grad():
        graph.student.backbone.norm.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="is nan from torch"):
        write_onnx(folder / "x.onnx", graph, program)


def test_bad_input_is_one_line(tiny_teachers, tmp_path, capsys, monkeypatch):
    folder = export(
        {"name": "vit_tiny_patch16_224", "kwargs": {**VIT, "depth": 1}}, MLPAdaptor, tiny_teachers, tmp_path
    )
    with pytest.raises(UserError, match="onnx_adaptors: 'clop'.*did you mean clip"):
        write_graphs(folder, pt2=True, adaptors=["clop"])
    monkeypatch.setattr("agglom.graphs.PACKAGES", ("onnx", "onnx_that_nobody_has"))
    for args, said in (
        (["--onnx"], "onnx_that_nobody_has not installed.*pip install 'agglom"),
        (["--int8"], "int8: true without onnx"),
        (["--onnx-adaptors", "clip"], "onnx_adaptors: clip without onnx"),
        (["--onnx-adaptors=clip"], "onnx_adaptors: clip without onnx"),
    ):
        with pytest.raises(SystemExit) as err:
            main(["export", "--ckpt", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *args])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert err.value.code == 2 and line.startswith("agglom export: ")
        assert re.search(said, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_and_a_second_export(tiny_teachers, scenes, tmp_path, one_thread):
    """Files of an earlier export's weights do not outlive them."""
    tiny = {"class_path": "agglom.teachers.TinyTeacher", "init_args": {"name": "clip", "pretrained": False}}
    student = {"name": "vit_tiny_patch16_224", "kwargs": {**VIT, "depth": 1, "img_size": 48}}
    config = {
        "model": {
            "student": {"class_path": "agglom.students.TimmStudent", "init_args": student},
            "teachers": {"clip": {"encoder": tiny}},
            "warmup_steps": 1,
        },
        "data": {"data": str(scenes), "batch_size": 4, "size": 48, "val_split": None, "num_workers": 0},
        "trainer": {"max_steps": 2, "default_root_dir": str(tmp_path / "run"), "accelerator": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    command = [
        sys.executable,
        "-m",
        "agglom.cli",
        "export",
        "--ckpt",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path / "out"),
    ]
    more = ["--onnx", "--onnx-adaptors", "clip", "--int8", "--pt2"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    files = [
        "backbone.onnx",
        "backbone.int8.onnx",
        "backbone.pt2",
        "adaptors.onnx",
        "adaptors.int8.onnx",
        "adaptors.pt2",
    ]
    assert [line.split(":")[0] for line in lines[1:]] == files and lines[0] == str(tmp_path / "out")
    assert "on 32 val images" in lines[2] and all((tmp_path / "out" / name).is_file() for name in files)
    subprocess.run(command, check=True, capture_output=True, env=one_thread)
    assert not any((tmp_path / "out" / name).exists() for name in files)
    assert "Other formats" not in (tmp_path / "out" / "README.md").read_text()
