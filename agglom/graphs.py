"""An export as a graph: ONNX, ONNX in int8, and torch.export's .pt2, each checked against the student in torch.

A graph takes images (B, 3, H, W) in [0, 1], float32, and normalises them itself. It answers with `summary` and `map`,
and with `NAME_summary` and `NAME_map` of each adaptor in it.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Sequence, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglom.errors import UserError, brief, nearest
from agglom.features import resize

if TYPE_CHECKING:
    from agglom.export import Exported

OPSET = 20  # the first with GELU
BOUND = 1e-4  # largest difference from torch, in units of an output's own standard deviation where that is above 1
WHOLE = 1.8e9  # bytes of weights above which ONNX keeps them in a file of their own (protobuf ends at 2 GiB)
PICTURES = 64  # images that int8 is measured on
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Answers = Callable[[Tensor], Sequence[Tensor]]


class Graph(nn.Module):
    """The student and some of its adaptors as one function of images.

    Attributes:
        names: of its outputs.
        native: (height, width) that the student was trained at.
        stride: pixels that a cell of the map covers.
        free: whether other sizes are possible.
    """

    def __init__(self, exported: Exported, adaptors: Sequence[str]) -> None:
        super().__init__()
        self.student = exported.student
        self.heads = nn.ModuleDict({name: exported.heads[name] for name in adaptors})
        self.names = ["summary", "map"]
        for name in adaptors:
            dims = exported.adaptors[name].adaptor.teacher
            self.names += [f"{name}_summary"] * (dims.summary is not None) + [f"{name}_map"] * (
                dims.spatial is not None
            )
        height, width = exported.input.size or exported.about["input"]["size"]
        self.native, self.stride, self.free = (height, width), exported.input.stride, exported.input.size is None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        heads = [cast(Any, head) for head in self.heads.values()]
        wanted = {tap for head in heads for tap in head.taps}
        features = self.student(images, tuple(tap for tap in self.student.tap_names if tap in wanted))
        out = [features.summary.flatten(1), features.spatial]
        out += [x for head in heads for x in head(features) if x is not None]
        return tuple(out)

    def other(self) -> tuple[int, int]:
        """A size that is neither square nor the native one."""
        return self.native[0] + self.stride, self.native[1] + 2 * self.stride

    def sizes(self) -> list[tuple[int, int]]:
        """What to check it at: the native size, and where it is free a larger and a very small one."""
        return [self.native, *([self.other(), (self.stride, 2 * self.stride)] if self.free else [])]

    def said(self) -> str:
        """What may vary, in words."""
        pixels = f"any multiple of {self.stride}" if self.free else " x ".join(map(str, self.native))
        return f"any batch, {pixels} pixels"


def write_graphs(
    folder: Path,
    *,
    onnx: bool = False,
    int8: bool = False,
    pt2: bool = False,
    adaptors: Sequence[str] = (),
    run: Path | None = None,
) -> list[str]:
    """Write graphs into an export folder, and what was measured into its agglom.json and model card.

    `backbone.*` holds the student, `adaptors.*` the student with the chosen adaptors.

    Args:
        folder: the export.
        onnx: write .onnx.
        int8: write .int8.onnx as well, with weights in int8 and activations quantised as they come.
        pt2: write torch.export's .pt2.
        adaptors: teachers whose adaptors go into a second graph.
        run: the run directory that the export came from, for the card.

    Returns:
        a line about each file.

    Raises:
        UserError: a package is missing, an unknown adaptor, a model that can't be traced, or a graph that answers
            otherwise than torch (whose file is not kept).
    """
    from agglom.export import load, note

    if onnx:
        check_packages()
    exported = load(folder)
    for name in adaptors:
        if name not in exported.heads:
            raise UserError(f"onnx_adaptors: {name!r}; {nearest(name, exported.heads)}; take some of them")
    said: dict[str, str] = {}
    for title, names in {"backbone": [], **({"adaptors": adaptors} if adaptors else {})}.items():
        graph = Graph(exported, names).eval()
        program = trace(graph)
        if onnx:
            path = folder / f"{title}.onnx"
            said[path.name] = write_onnx(path, graph, program)
            if int8:
                small = folder / f"{title}.int8.onnx"
                said[small.name] = write_int8(path, small, graph, *pictures(exported))
        if pt2:
            path = folder / f"{title}.pt2"
            said[path.name] = write_pt2(path, graph, program)
    note(folder, run, formats=said)
    return [f"{name}: {line}" for name, line in said.items()]


def check_packages() -> None:
    """Whether ONNX files can be written and run.

    Raises:
        UserError: a package is missing.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"onnx: {', '.join(missing)} not installed; valid with all of them; pip install 'agglom[onnx]'")


def trace(graph: Graph) -> Any:
    """The graph as an ExportedProgram; its size is free where the student's is, and tracing allows it.

    Raises:
        UserError: it can't be traced.
    """
    batch, height, width = (torch.export.Dim(name, min=1) for name in ("batch", "rows", "columns"))
    free = {0: batch, 2: graph.stride * height, 3: graph.stride * width}
    try:
        if graph.free:
            try:
                return _trace(graph, graph.other(), free)
            except Exception:  # code that branches on the size (Swin's windows): the trained one is left
                graph.free = False
        return _trace(graph, graph.native, {0: batch})
    except Exception as err:
        raise UserError(f"onnx, pt2: the student can't be traced ({brief(err)}); export it without them") from err


def _trace(graph: Graph, size: tuple[int, int], dynamic: dict[int, Any]) -> Any:
    with quiet(), torch.no_grad():
        return torch.export.export(graph, (torch.rand(2, 3, *size),), dynamic_shapes={"images": dynamic})


def write_onnx(path: Path, graph: Graph, program: Any) -> str:
    """Write and check an ONNX file; returns what there is to say of it."""
    axes = {0: "batch", **({2: "height", 3: "width"} if graph.free else {})}
    with quiet():
        made = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=graph.names,
            dynamic_shapes={"images": axes},  # names alone; what is dynamic, the program says
            verbose=False,
        )
    assert made is not None
    made.model.metadata_props["agglom"] = "images: RGB in [0, 1], float32; the graph normalises them"
    size = sum(tensor.nbytes for tensor in graph.state_dict().values())
    made.save(str(path), external_data=size > WHOLE)
    worst = compare(graph, onnx_session(path), path)
    return f"ONNX, opset {OPSET}, {graph.said()}; at most {worst:.1e} from torch in fp32"


def write_int8(source: Path, path: Path, graph: Graph, images: Tensor, what: str) -> str:
    """Quantise an ONNX file dynamically and measure the cosine of its features to torch's."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        # unsigned weights: convolutions have no kernel for signed ones on CPUs
        quantize_dynamic(source, path, weight_type=QuantType.QUInt8, per_channel=False)
    run, cosines = onnx_session(path), dict.fromkeys(graph.names, 0.0)
    for part in images.split(16):
        with torch.no_grad():
            expected = graph(part)
        for name, got, wanted in zip(graph.names, run(part), expected, strict=True):
            cosines[name] += F.cosine_similarity(got, wanted, dim=1).mean().item() * len(part) / len(images)
    share = path.stat().st_size / source.stat().st_size
    found = ", ".join(f"{name} {value:.4f}" for name, value in cosines.items())
    return f"ONNX in int8, {share:.0%} of the bytes; mean cosine to fp32 on {len(images)} {what}: {found}"


def write_pt2(path: Path, graph: Graph, program: Any) -> str:
    """Write and check a .pt2 file; returns what there is to say of it."""
    try:
        _save(program, path)
    except Exception as err:  # not all arithmetic of free sizes has a place in the format (TensorFlow's padding)
        path.unlink(missing_ok=True)
        if not graph.free:
            raise UserError(f"pt2: the graph can't be saved ({brief(err)}); export it without") from err
        graph = copy.copy(graph)
        graph.free = False
        _save(trace(graph), path)
    loaded = torch.export.load(path).module()
    worst = compare(graph, loaded, path)
    return f"torch.export, {graph.said()}; at most {worst:.1e} from torch in fp32"


def _save(program: Any, path: Path) -> None:
    program.example_inputs = None  # the one thing in the file that would be pickled
    torch.export.save(program, path)


def compare(graph: Graph, run: Answers, path: Path) -> float:
    """The largest absolute difference between a file's answers and the graph's, over batches and sizes.

    Raises:
        UserError: it is above `BOUND`; the file is removed.
    """
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    for height, width in graph.sizes():
        for count in (1, 3):
            images = torch.rand(count, 3, height, width, generator=generator)
            with torch.no_grad():
                expected = graph(images)
            for name, got, wanted in zip(graph.names, run(images), expected, strict=True):
                off = (got - wanted).abs().max().item() if got.shape == wanted.shape else math.inf
                bound = BOUND * max(1.0, wanted.std().item() if wanted.numel() > 1 else 1.0)
                if not off <= bound:
                    path.unlink(missing_ok=True)
                    raise UserError(
                        f"{path.name}: {name} is {off:.1e} from torch at {height} x {width} pixels; valid: up to "
                        f"{bound:.1e}; not kept: use the timm folder"
                    )
                worst = max(worst, off)
    return worst


def onnx_session(path: Path) -> Answers:
    """An ONNX file on the CPU, as a function of images."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]

    return run


def pictures(exported: Exported) -> tuple[Tensor, str]:
    """Images of the training's data at the native size, and what they are; noise where the data are gone."""
    from agglom.data import eval_stream, read_index

    native = Graph(exported, ()).native
    try:
        index = read_index(exported.about["data"]["address"])
        split = next(name for name in ("val", "test", "train") if index.counts.get(name))
        rows = list(eval_stream(index, split, limit=PICTURES, rank=0, world_size=1))
    except (KeyError, UserError, OSError):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(PICTURES, 3, *native, generator=generator), "images of noise, for want of the data"
    shown = [resize(torch.as_tensor(row["image"])[None].float() / 255, native, "bilinear") for row in rows]
    return torch.cat(shown), f"{split} images"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of tracers, which nobody who exports can act on."""
    names = ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir", "root")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
