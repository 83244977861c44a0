"""`agglom data ...`: one function a writer, and `verify`; the arguments are the command line's options."""

from __future__ import annotations

from pathlib import Path

from agglom.errors import UserError


def scenes(
    out: str,
    source: str | None = None,
    train: int = 20000,
    val: int = 2000,
    test: int = 4000,
    size: int = 64,
    seed: int = 0,
    plain: bool = False,
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
        plain: one garment a scene, on a canvas of one muted colour.
        workers: processes; left out: one a core.
    """
    from agglom.data.scenes import write_scenes

    counts = {"train": train, "val": val, "test": test}
    print(write_scenes(Path(out), source=source, **counts, size=size, seed=seed, plain=plain, workers=workers))


def imagefolder(
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


def coco(
    out: str,
    source: str | None = None,
    images: str | None = None,
    instances: str | None = None,
    captions: str | None = None,
    panoptic: str | None = None,
    masks: str | None = None,
    val: float = 0.0,
    test: float = 0.0,
    language: str | None = None,
    shard_size: int = 1000,
    licence: str = "unknown",
    overwrite: bool = False,
) -> None:
    """Write images in COCO's format into shards: boxes, masks, classes and captions, whatever the annotations have.

    Args:
        out: folder for the shards.
        source: folder in COCO's layout (train2017, val2017, annotations/instances_train2017.json, ...).
        images: instead of source: the folder of images, with any of the three files below.
        instances: JSON file of boxes and masks.
        captions: JSON file of captions; they are stored one a line.
        panoptic: JSON file of panoptic maps, which lie beside it in a folder of its name.
        masks: panoptic (things and stuff, 255 is void), instances (0 is background, class k is k + 1, 255 is crowd) or
            none; left out: the first of these that there is.
        val: share of the images for the val split, without source.
        test: share of the images for the test split, without source.
        language: of the captions, for example en; goes into the index.
        shard_size: images a shard; training needs at least as many shards as loader workers x ranks.
        licence: of the images, in words; goes into the index.
        overwrite: replace what is in `out`.
    """
    from agglom.data.coco import write_coco
    from agglom.data.writing import Writing

    print(
        write_coco(
            out,
            source=source,
            images=images,
            instances=instances,
            captions=captions,
            panoptic=panoptic,
            masks=masks,
            val_fraction=val,
            test_fraction=test,
            language=language,
            writing=Writing(shard_size=shard_size, licence=licence, overwrite=overwrite),
        )
    )


def ade(
    source: str,
    out: str,
    shard_size: int = 1000,
    licence: str = "unknown",
    overwrite: bool = False,
) -> None:
    """Write ADE20K's SceneParsing release into shards: masks of 150 classes, scenes as labels where they are told.

    Args:
        source: the folder with images/{training,validation} and annotations/{training,validation}.
        out: folder for the shards.
        shard_size: images a shard; training needs at least as many shards as loader workers x ranks.
        licence: of the images, in words; goes into the index.
        overwrite: replace what is in `out`.
    """
    from agglom.data.ade import write_ade
    from agglom.data.writing import Writing

    writing = Writing(shard_size=shard_size, licence=licence, overwrite=overwrite)
    print(write_ade(out, source=source, writing=writing))


def voc(
    source: str,
    out: str,
    image_set: str = "Segmentation",
    shard_size: int = 1000,
    licence: str = "unknown",
    overwrite: bool = False,
) -> None:
    """Write PASCAL VOC into shards: masks of 21 classes, boxes (difficult ones as iscrowd 1) and lists of labels.

    Args:
        source: the folder of the year (VOCdevkit/VOC2012).
        out: folder for the shards.
        image_set: Segmentation, or Main, which has more images and no masks.
        shard_size: images a shard; training needs at least as many shards as loader workers x ranks.
        licence: of the images, in words; goes into the index.
        overwrite: replace what is in `out`.
    """
    from agglom.data.voc import write_voc
    from agglom.data.writing import Writing

    writing = Writing(shard_size=shard_size, licence=licence, overwrite=overwrite)
    print(write_voc(out, source=source, image_set=image_set, writing=writing))


def csv(
    source: str,
    out: str,
    root: str | None = None,
    classes: str | None = None,
    seg_classes: str | None = None,
    val: float = 0.0,
    test: float = 0.0,
    language: str | None = None,
    shard_size: int = 1000,
    licence: str = "unknown",
    overwrite: bool = False,
) -> None:
    """Write the images of a table into shards: columns image and any of label, caption, mask, split.

    Args:
        source: the .csv or .tsv file; its first line names the columns. Several labels of a cell are separated by ;
        out: folder for the shards.
        root: folder that the paths are relative to; left out: the table's.
        classes: text file with the names of the labels, one a line; left out: those of the table, sorted.
        seg_classes: text file with the names of the mask's values, one a line, from 0 on.
        val: share of the images for the val split, without a column split.
        test: share of the images for the test split, without a column split.
        language: of the captions, for example en; goes into the index.
        shard_size: images a shard; training needs at least as many shards as loader workers x ranks.
        licence: of the images, in words; goes into the index.
        overwrite: replace what is in `out`.
    """
    from agglom.data.csv_table import write_csv
    from agglom.data.writing import Writing

    print(
        write_csv(
            out,
            source=source,
            root=root,
            classes=classes,
            seg_classes=seg_classes,
            val_fraction=val,
            test_fraction=test,
            language=language,
            writing=Writing(shard_size=shard_size, licence=licence, overwrite=overwrite),
        )
    )


def verify(data: str, clean: str | None = None, workers: int | None = None) -> None:
    """Read and decode all shards once and list every fault; exit code 2 where there are any, 0 where there are none.

    What it finds is what streams skip, count or refuse.

    Args:
        data: shard folder, or an address of one.
        clean: new folder for an index of what is good. Shards without a bad sample are linked into it (remote ones
            named by their address); the others are written anew there, without the bad ones. Nothing of `data` is
            changed.
        workers: processes; left out: one a core.
    """
    from agglom.data.verify import verify

    report = verify(data, clean=clean, workers=workers, tell=lambda finding: print(finding, flush=True))
    if report.findings:
        print()
        for kind, number in report.kinds.items():
            print(f"{number:7} {kind}")
    if report.cleaned:
        print(report.cleaned)
    read = f"{report.samples} samples in {report.shards} shards of {data}"
    if report.findings:
        faults = len(report.findings)
        raise UserError(f"{faults} fault{'s' * (faults > 1)} in {read}")
    print(f"no faults in {read}")
