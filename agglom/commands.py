"""One function a command; the arguments are the command line's options."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from agglom.errors import UserError


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


def data_scenes(
    out: str,
    source: str | None = None,
    train: int = 20000,
    val: int = 2000,
    test: int = 4000,
    size: int = 64,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Write fashion scenes: Fashion-MNIST garments on cluttered canvases, with masks, boxes, classes and captions.

    Args:
        out: folder for the shards.
        source: folder with Fashion-MNIST's four idx files; left out: Debian's package, then torchvision's download.
        train: scenes of the train split.
        val: scenes of the val split.
        test: scenes of the test split.
        size: pixels of a side.
        seed: of the scenes; the same seed gives the same scenes for any number of workers.
        workers: processes; left out: one a core.
    """
    from agglom.data.scenes import write_scenes

    print(
        write_scenes(Path(out), source=source, train=train, val=val, test=test, size=size, seed=seed, workers=workers)
    )


def data_imagefolder(
    source: str,
    out: str,
    val: float = 0.0,
    test: float = 0.0,
    shard_size: int = 1000,
    licence: str = "unknown",
    overwrite: bool = False,
) -> None:
    """Write the images of a folder (one subfolder a class, or flat and without classes) into shards.

    Args:
        source: the folder.
        out: folder for the shards.
        val: share of the images for the val split.
        test: share of the images for the test split.
        shard_size: images a shard; training needs at least as many shards as loader workers x ranks.
        licence: of the images, in words; goes into the index.
        overwrite: replace what is in `out`.
    """
    from agglom.data.imagefolder import write_imagefolder

    print(
        write_imagefolder(
            Path(out),
            source=Path(source),
            val_fraction=val,
            test_fraction=test,
            shard_size=shard_size,
            licence=licence,
            overwrite=overwrite,
        )
    )


def probe(
    run: str | None = None,
    model: list[str] | None = None,
    data: str | None = None,
    probes: str = "knn,linear,segmentation,zeroshot",
    out: str | None = None,
    train: int | None = None,
    val: int | None = None,
    test: int | None = None,
    size: int | None = None,
    seed: int = 0,
) -> None:
    """Evaluate frozen backbones: a run's student, its teachers and a random-init student, or any models.

    Args:
        run: run directory; its student, its teachers and a random-init student are evaluated.
        model: references instead of, or beside, a run (repeat as --model+=REF): timm:NAME, open_clip:NAME/TAG,
            tiny:NAME, or a path.
        data: shard folder; left out: the run's.
        probes: names, separated by commas.
        out: folder for report.json, .md and .html; left out: RUN/probes.
        train: images of the train split to use; left out: all.
        val: images of the val split to use; left out: all.
        test: images of the test split to use; left out: all.
        size: pixels of a side that images are resized and cropped to; left out: they have one size already.
        seed: of the probes.
    """
    from agglom.probing import probe_models, probe_run

    names = [name.strip() for name in probes.split(",") if name.strip()]
    limits = {"train": train, "val": val, "test": test}
    if run is not None:
        print(probe_run(run, extra=model or [], data=data, probes=names, out=out, limits=limits, size=size, seed=seed))
    elif model and data and out:
        print(probe_models(model, data=data, probes=names, out=out, limits=limits, size=size, seed=seed))
    else:
        raise UserError("give --run DIR, or --model REF with --data DIR and --out DIR")


def report(dirs: list[str]) -> None:
    """Write report.md and report.html again from report.json; several folders give a comparison.

    Args:
        dirs: folders with a report.json, or run directories.
    """
    from agglom.probes import write_comparison, write_report

    folders = [Path(d) / "probes" if (Path(d) / "probes").is_dir() else Path(d) for d in dirs]
    for folder in folders:
        print(write_report(folder))
    if len(folders) > 1:
        print(write_comparison(folders, folders[0]))


def export(ckpt: str, out: str, adaptors: str | None = None) -> None:
    """Write a checkpoint of a run as a folder that plain timm loads, with adaptors and model card.

    Args:
        ckpt: a checkpoint of a run directory, or the run directory (its newest).
        out: the folder to write.
        adaptors: names of the teachers whose adaptors are kept, separated by commas, or "none"; left out: all. The
            backbone is the same with and without.
    """
    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "agglom.json").is_file():
        raise UserError(
            f"out: {out} holds something else than an export; valid: an export or a new folder; choose another"
        )
    from agglom.runs import export_checkpoint

    kept = None if adaptors is None else [name.strip() for name in adaptors.split(",") if name.strip() != "none"]
    print(export_checkpoint(Path(ckpt), Path(out), kept))


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
