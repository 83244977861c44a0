"""Writes docs/tutorial.ipynb and runs it, so that its outputs are real.

python docs/tutorial.py [OUT.ipynb]    about a minute on one core; needs Fashion-MNIST, as `agglom data scenes` does
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).resolve().parent

CELLS = [
    """# Three teachers, one student

A training from end to end on what comes with agglom: three tiny frozen teachers and scenes of real Fashion-MNIST
garments. It takes about a minute on one CPU core, so the student stays far from its teachers; `make demo` trains one
for some minutes more.""",
    """## Scenes

Garments on cluttered canvases, with classes, masks, boxes and captions, written as WebDataset shards. `SOURCE` is the
folder with Fashion-MNIST's four files; None takes Debian's package or downloads them.""",
    """import os
from pathlib import Path

from agglom.data.scenes import write_scenes

SOURCE = os.environ.get("FASHION_MNIST")
print(write_scenes(Path("scenes"), source=SOURCE, train=600, val=200, test=200, shard_size=200, workers=1))""",
    """import matplotlib.pyplot as plt

from agglom.data import eval_stream, read_index

index = read_index("scenes")
samples = list(eval_stream(index, "test", fields=("image", "cls", "seg", "txt"), limit=4))
figure, axes = plt.subplots(2, 4, figsize=(10, 5))
for (above, below), sample in zip(axes.T, samples):
    above.imshow(sample["image"].permute(1, 2, 0))
    above.set_title(index.classes[sample["cls"]], fontsize=9)
    below.imshow(sample["seg"], cmap="tab20", vmin=0, vmax=11, interpolation="nearest")
for axis in axes.flat:
    axis.axis("off")
figure.tight_layout()""",
    """## Teachers

Each takes images in [0, 1] and does the rest itself. `clip` has learnt from captions, `dino` from crops of one image,
`sam` from masks.""",
    """import torch

from agglom.teachers import TinyTeacher

teachers = {name: TinyTeacher(name) for name in ("clip", "dino", "sam")}
images = torch.stack([torch.as_tensor(sample["image"]) for sample in samples]) / 255
for name, teacher in teachers.items():
    summary, spatial = teacher(images)
    print(f"{name:5} summary {None if summary is None else tuple(summary.shape)}, map {tuple(spatial.shape)}")""",
    """What a teacher's map says of a place: its three strongest directions (PCA over the four images) as colours.""",
    """def colours(spatial):
    pixels = spatial.movedim(1, -1).flatten(0, 2)
    pixels = pixels - pixels.mean(0)
    found = pixels @ torch.linalg.svd(pixels, full_matrices=False).Vh[:3].T
    low, high = found.quantile(0.02, dim=0), found.quantile(0.98, dim=0)
    return ((found - low) / (high - low)).clamp(0, 1).unflatten(0, (len(spatial), *spatial.shape[-2:]))


figure, axes = plt.subplots(3, 4, figsize=(8, 6))
for row, (name, teacher) in zip(axes, teachers.items()):
    for axis, picture in zip(row, colours(teacher(images).spatial)):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(name)
figure.tight_layout()""",
    """## Training

A small CNN is the student. Every teacher gets an adaptor of its own, which is the smallest possible here: one linear
layer. The view of an image never changes, so each teacher looks at each image once.""",
    """import logging
import warnings

import lightning.pytorch as pl

import agglom
from agglom.adaptors import LinearAdaptor
from agglom.data import ShardDataModule, ViewOptions
from agglom.heads import TeacherConfig
from agglom.students import TimmStudent

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pl.seed_everything(0, verbose=False)

student = TimmStudent(name="resnet10t", kwargs={"channels": [24, 48, 96, 192], "stem_width": 16, "output_stride": 8})
model = agglom.Distiller(
    student,
    {name: TeacherConfig(teacher) for name, teacher in teachers.items()},
    adaptor=LinearAdaptor,
    lr=2e-2,
    warmup_steps=10,
    ema_decay=0.97,
    remember_teachers=True,
)
view = ViewOptions(scale=(1, 1), ratio=(1, 1), flip=0)
data = ShardDataModule(data="scenes", batch_size=32, size=64, view=view, num_workers=0, val_samples=200)
history = []


class Remember(pl.Callback):
    def on_validation_end(self, trainer, module):
        history.append({name: float(trainer.callback_metrics[f"val/{name}/loss"]) for name in teachers})


trainer = pl.Trainer(
    max_steps=120, val_check_interval=30, check_val_every_n_epoch=None, num_sanity_val_steps=0, callbacks=[Remember()],
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, datamodule=data)
for step, losses in enumerate(history, 1):
    print(f"step {30 * step:3}", {name: round(value, 3) for name, value in losses.items()})""",
    """## The backbone

The export is a folder of timm's: agglom need not be installed to load it. With agglom it also answers in each teacher's
space, in the teacher's own units.""",
    """import timm

from agglom.callbacks import export_module
from agglom.teachers import manifest

export_module(model, Path("export"), manifest(model.frozen), size=64, step=trainer.global_step)
backbone = timm.create_model("local-dir:export", pretrained=True).eval()
exported = agglom.load("export")
for name, teacher in teachers.items():
    cosine = torch.cosine_similarity(exported.adaptors[name](images).spatial, teacher(images).spatial, dim=1)
    print(f"{name:5} cosine of the maps to the teacher's own: {cosine.mean():.2f}")""",
    """Words work through the adaptor for `clip`, since its own text tower fits:""",
    """logits = exported.zero_shot(images, list(index.classes), templates=index.extra.get("templates", ["{}"]))
for sample, row in zip(samples, logits):
    print(f"is {index.classes[sample['cls']]:12} said {index.classes[int(row.argmax())]}")""",
    """## What it kept

Probes fit small heads on frozen features, the same way for all, and say which share of the best teacher's number the
student has. So short a training keeps a part; the same network before training shows where it began.""",
    """from agglom.export import random_like
from agglom.probes import run_probes

models = {"student": exported, **teachers, "random": random_like(exported)}
report = run_probes(
    models, "scenes", ["knn", "linear", "segmentation"], "probes",
    student="student", teachers=list(teachers), random="random",
)
print(f"{'':14}" + "".join(f"{name:>9}" for name in models) + "     kept")
for probe, metric in (("knn", "top1"), ("linear", "top1"), ("segmentation", "miou")):
    scores = "".join(f"{100 * report['models'][name][probe][metric]:9.1f}" for name in models)
    print(f"{probe:14}{scores}{100 * report['retention'][probe]['value']:7.0f} %")""",
    """The same report as a page: `agglom report probes`. More: [concepts](concepts.md), [recipes](recipes.md),
[probes](probes.md).""",
]


def notebook() -> nbformat.NotebookNode:
    """The cells, not yet run: those that begin like prose are Markdown."""
    cells = []
    for number, text in enumerate(CELLS):
        code = re.match(r"(import|from|def|logits) ?", text)
        cells.append((new_code_cell if code else new_markdown_cell)(text, id=f"cell-{number}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def run(book: nbformat.NotebookNode, folder: Path, seconds: int = 600) -> nbformat.NotebookNode:
    """Run all cells in a folder; what a cell prints stays, but for progress and times of running.

    Raises:
        CellExecutionError: a cell failed.
    """
    NotebookClient(
        book, timeout=seconds, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    return book


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        made = run(notebook(), Path(name))
    nbformat.write(made, sys.argv[1] if len(sys.argv) > 1 else HERE / "tutorial.ipynb")
