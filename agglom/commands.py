"""One function a command; the arguments are the command line's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Sequence

from agglom.errors import UserError, brief


def check(args: Sequence[str]) -> None:
    """Print every problem of the given YAML files; raises UserError with the count if there are any."""
    from agglom.checks import check_file

    if not args or "-h" in args or "--help" in args:
        print("usage: agglom check CONFIG.yaml [CONFIG.yaml ...]")
        return
    bad = 0
    for name in args:
        problems = check_file(name)
        for problem in problems:
            print(f"{name}: {problem}")
        bad += len(problems)
        if not problems:
            print(f"{name}: ok")
    if bad:
        raise UserError(f"{bad} problem{'s' * (bad > 1)} in {len(args)} file{'s' * (len(args) > 1)}")


def cache(
    config: str,
    out: str,
    views: int = 1,
    dtype: Literal["bf16", "fp16", "fp32", "int8"] = "bf16",
    pool: int = 1,
    teachers: str | None = None,
    batch: int = 64,
    device: str = "auto",
    dry_run: bool = False,
) -> None:
    """Run a configuration's teachers over its shards once, and keep what they say of each view.

    `agglom fit --config CONFIG --data.cache OUT` then trains from it. A killed run is continued by running it again;
    under torchrun or SLURM every process does its share of the shards.

    Args:
        config: YAML of the training, with `model.teachers` and `data`.
        out: folder of the cache.
        views: random views of each training image; other splits have the centred one.
        dtype: of what is stored; int8 has one scale a channel.
        pool: average so many by so many cells of each map into one, to save disk.
        teachers: names of the teachers to cache, separated by commas; left out: all.
        batch: views a forward pass.
        device: where the teachers run, such as cuda or cuda:1; auto: an accelerator where there is one.
        dry_run: only print what it will take, from a timed sample.
    """
    from agglom.cache.command import cache_teachers

    names = None if teachers is None else [name.strip() for name in teachers.split(",") if name.strip()]
    print(
        cache_teachers(
            config, Path(out), views=views, dtype=dtype, pool=pool, names=names, batch=batch, device=device, dry=dry_run
        )
    )


def probe(
    run: str | None = None,
    model: list[str] | None = None,
    data: str | None = None,
    probes: str = "knn,linear,zeroshot,retrieval,segmentation,fidelity,geometry",
    out: str | None = None,
    train: int | None = None,
    val: int | None = None,
    test: int | None = None,
    size: int | None = None,
    templates: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Evaluate frozen backbones: a run's student, its teachers and a random-init student, or any models.

    Args:
        run: run directory; its student, its teachers and a random-init student are evaluated.
        model: references instead of, or beside, a run (--model REF, once for each): timm:NAME, open_clip:NAME/TAG,
            tiny:NAME, or a path.
        data: shard folder; left out: the run's.
        probes: names, or package.module.Class of your own, separated by commas.
        out: folder for report.json, .md and .html; left out: RUN/probes.
        train: images of the train split to use; left out: all.
        val: images of the val split to use; left out: all.
        test: images of the test split to use; left out: all.
        size: pixels of a side that images are resized and cropped to; left out: they have one size already.
        templates: prompts of zero-shot classification: simple, full (80 of them), or a text file with one a line; left
            out: the data's own, or simple.
        seed: of the probes.
        device: where the models run, such as cuda or cuda:1; auto: an accelerator where there is one.
    """
    from agglom.probing import probe_models, probe_run

    names = [name.strip() for name in probes.split(",") if name.strip()]
    limits = {"train": train, "val": val, "test": test}
    how: dict[str, Any] = {"probes": names, "limits": limits, "size": size, "templates": templates, "seed": seed}
    how["device"] = device
    if run is not None:
        print(probe_run(run, extra=model or [], data=data, out=out, **how))
    elif model and data and out:
        print(probe_models(model, data=data, out=out, **how))
    else:
        raise UserError("give --run DIR, or --model REF with --data DIR and --out DIR")


def embed(
    model: str,
    data: str,
    out: str,
    split: str = "train",
    size: int | None = None,
    limit: int | None = None,
    adaptor: str | None = None,
    device: str = "auto",
) -> None:
    """Write a model's vectors of each image of a split, with keys and labels, as .npz or .parquet.

    A killed run is continued by running it again; under torchrun or SLURM every process does its share.

    Args:
        model: timm:NAME, open_clip:NAME/TAG, sam:NAME, tiny:NAME, or the path of an export or a run.
        data: shard folder.
        out: the file; .parquet needs pyarrow (pip install 'agglom[parquet]').
        split: of the data.
        size: pixels of a side that images are resized and cropped to; left out: they have one size already.
        limit: only the first so many images.
        adaptor: the teacher in whose space the vectors are; left out: the model's own.
        device: where the model runs, such as cuda or cuda:1; auto: an accelerator where there is one.
    """
    from agglom.probing import embed_model

    how: dict[str, Any] = {"split": split, "size": size, "limit": limit, "adaptor": adaptor, "device": device}
    if said := embed_model(model, data, out, **how):
        print(said)


def report(dirs: list[str]) -> None:
    """Write report.md and report.html again from report.json; several folders give a comparison.

    Args:
        dirs: folders with a report.json, or run directories.
    """
    from agglom.probes import write_comparison, write_report

    folders = [Path(d) / "probes" if (Path(d) / "probes").is_dir() else Path(d) for d in dirs]
    try:
        for folder in folders:
            print(write_report(folder))
        if len(folders) > 1:
            print(write_comparison(folders, folders[0]))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as err:
        said = f"{type(err).__name__}: {brief(err)}"
        raise UserError(f"{folder / 'report.json'}: lacks what a report has ({said}); probe again") from err


def export(
    ckpt: str,
    out: str,
    adaptors: str | None = None,
    onnx: bool = False,
    onnx_adaptors: str | None = None,
    int8: bool = False,
    pt2: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Write a checkpoint of a run as a folder that plain timm loads, with adaptors and model card.

    Args:
        ckpt: a checkpoint of a run directory, or the run directory (its newest).
        out: the folder to write.
        adaptors: names of the teachers whose adaptors are kept, separated by commas, or "none"; left out: all. The
            backbone is the same with and without.
        onnx: write backbone.onnx too, checked against torch (pip install 'agglom[onnx]').
        onnx_adaptors: teachers whose adaptors go into a second graph with the backbone, adaptors.onnx or adaptors.pt2,
            separated by commas.
        int8: write the ONNX files in int8 as well, and measure their features' cosine to fp32.
        pt2: write backbone.pt2 for torch.export.load, checked against torch.
        push_to_hub: name of a repository of the Hugging Face hub to upload the folder to, USER/NAME.
        private: of that repository, where it is made.
    """
    folder, source = Path(out), Path(ckpt)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "agglom.json").is_file():
        raise UserError(
            f"out: {out} holds something else than an export; valid: an export or a new folder; choose another"
        )
    if int8 and not onnx:
        raise UserError("int8: true without onnx; valid with --onnx; add it")
    if onnx_adaptors and not (onnx or pt2):
        raise UserError(f"onnx_adaptors: {onnx_adaptors} without onnx; valid with --onnx or --pt2; add one")
    if onnx:
        from agglom.graphs import check_packages

        check_packages()
    from agglom.runs import export_checkpoint

    kept = None if adaptors is None else [name for name in _names(adaptors) if name != "none"]
    print(export_checkpoint(source, folder, kept))
    run = source if source.is_dir() else source.parent.parent
    if onnx or pt2:
        from agglom.graphs import write_graphs

        chosen = _names(onnx_adaptors or "")
        for line in write_graphs(folder, onnx=onnx, int8=int8, pt2=pt2, adaptors=chosen, run=run):
            print(line)
    if push_to_hub is not None:
        from agglom.hub import push

        print(push(folder, push_to_hub, private=private, run=run))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def info(ref: str | None = None, pattern: str = "") -> None:
    """Say what a run, export or shard folder holds; without one, list teachers and students by name.

    Args:
        ref: a folder or a model reference.
        pattern: only names that contain it.
    """
    from agglom.info import describe, listing

    print(listing(pattern) if ref is None else describe(ref))


def demo(out: str = "runs/demo", data: str = "data/scenes", source: str | None = None) -> None:
    """The embedded default, end to end: scenes, three tiny teachers into one student, probes, report.

    Args:
        out: the run directory.
        data: folder for the scenes.
        source: folder with Fashion-MNIST's four idx files, where the package and the download are not wanted.
    """
    from agglom.demo import run_demo

    run_demo(Path(out), Path(data), source)
