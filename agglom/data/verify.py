"""Every fault of a shard folder, before a run meets it; and a folder without them.

A sample is good where a stream of all of its split's fields would take it: both ask `agglom.data.samples`.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

from agglom.data.addresses import is_remote, open_read
from agglom.data.faults import Fault, printable
from agglom.data.index import INDEX_NAME, Index, ShardInfo, read_index, write_index
from agglom.data.processes import spread
from agglom.data.reading import ShardReader
from agglom.data.samples import sample_faults
from agglom.data.shards import write_encoded
from agglom.data.streams import unreadable
from agglom.errors import UserError

CUT = ("truncated tar", "bad tar header", "unreadable shard")  # what comes after is lost


class Finding(NamedTuple):
    """A fault and where it is; `key` is None for one of the whole shard."""

    split: str
    shard: str
    key: str | None
    kind: str
    detail: str

    def __str__(self) -> str:
        where = self.shard if self.key is None else f"{self.shard}: sample {self.key}"
        return printable(f"{where}: {self.kind} ({self.detail})")


class Report(NamedTuple):
    """What `verify` found.

    Attributes:
        samples, shards: how many were read.
        findings: all faults, in the order of the index.
        cleaned: index of the cleaned folder, if one was asked for.
    """

    samples: int
    shards: int
    findings: list[Finding]
    cleaned: Path | None

    @property
    def kinds(self) -> dict[str, int]:
        """How many faults of each kind, the most frequent first."""
        return dict(Counter(finding.kind for finding in self.findings).most_common())


class Checked(NamedTuple):
    """A shard that was read: its faults, and of each of its samples the key and whether it is good."""

    findings: list[Finding]
    keys: list[str]
    good: list[bool]


def verify(
    root: str | Path,
    *,
    clean: str | Path | None = None,
    workers: int | None = None,
    tell: Callable[[Finding], object] = lambda finding: None,
) -> Report:
    """Read and decode everything once, each shard as a stream. Keys are kept, about 150 bytes a sample of a split.

    Args:
        root: shard folder or address.
        clean: a new folder, for an index of what is good. Shards without a bad sample stay where they are and are
            linked into it (remote ones named by their address); the others are written anew without the bad ones.
        workers: processes; None: one a core.
        tell: called with each fault when it is found.

    Raises:
        UserError: no index or a broken one; `clean` can't be written, or nothing good is left to go into it.
    """
    index = read_index(root, check_files=False)
    out = None if clean is None else _new_folder(Path(clean), index)
    findings: list[Finding] = []
    kept: dict[str, list[ShardInfo]] = {split: [] for split in index.splits}
    samples, jobs = 0, _jobs(index)
    seen: dict[str, dict[str, str]] = {split: {} for split in index.splits}  # key -> the shard that has it
    for (split, shard, again), checked in zip(jobs, _check_all(index, jobs, workers), strict=True):
        found = list(checked.findings)
        for place, key in enumerate(checked.keys):
            if not again and seen[split].setdefault(key, shard.file) != shard.file:
                detail = f"the key was there before in {seen[split][key]}"
                found.append(Finding(split, shard.file, key, "duplicate key", detail))
                checked.good[place] = False
        for finding in found:
            tell(finding)
        findings += found
        samples += len(checked.keys)
        if out is not None and any(checked.good):
            kept[split].append(_keep(index, shard, checked, out, {info.file for s in kept.values() for info in s}))
    if out is None:
        return Report(samples, len(jobs), findings, None)
    if not any(kept.values()):
        raise UserError(f"clean: nothing good is left of {index.root}; write the shards again")
    removed = sum(index.counts.values()) - sum(info.count for infos in kept.values() for info in infos)
    path = write_index(
        out,
        kept,
        fields=index.fields,
        classes=index.classes,
        seg_classes=index.seg_classes,
        language=index.language,
        licence=index.licence,
        source=index.source,
        extra={**index.extra, "verify": {"of": index.root, "removed": removed}},
    )
    return Report(samples, len(jobs), findings, path)


Job = tuple[str, ShardInfo, bool]  # split, shard, whether the split had it before


def _jobs(index: Index) -> list[Job]:
    jobs: list[Job] = []
    for split, shards in index.splits.items():
        names: set[str] = set()
        for shard in shards:
            jobs.append((split, shard, shard.file in names))
            names.add(shard.file)
    return jobs


def _check_all(index: Index, jobs: list[Job], workers: int | None) -> Iterator[Checked]:
    if workers is not None and workers < 1:
        raise UserError(f"workers: {workers}; valid: 1 or more")
    check = partial(_check, index=replace(index, splits={}, extra={}))
    return spread(check, jobs, workers)


def _check(job: Job, *, index: Index) -> Checked:
    split, shard, again = job
    if again:
        return Checked([Finding(split, shard.file, None, "listed twice", "named before in the same split")], [], [])
    url = index.url(shard)
    faults: list[list[Fault]] = []  # of each sample
    keys: list[str] = []
    strange = 0  # samples that an index may count or not
    damage, complete = None, True
    try:
        with open_read(url) as stream:
            reader = ShardReader(stream, url)
            for raw in reader:
                keys.append(raw["__key__"])
                faults.append(sample_faults(raw, index.fields[split], index))
                strange += "__fault__" in raw
            damage, complete = reader.damage, reader.complete
    except Exception as err:  # open, network, exit status of a pipe
        damage = unreadable(err)
    good = [not some for some in faults]
    if damage is None and not len(keys) - strange <= shard.count <= len(keys):
        if complete or len(keys) > shard.count:
            damage = Fault("wrong count", "the tar itself is whole")
        else:
            damage = Fault("truncated tar", "the file ends where another one of the tar might begin")
    if damage and damage.kind in CUT and faults:  # what its last sample lacks is no fault of its own
        faults[-1] = [fault for fault in faults[-1] if fault.kind not in ("missing field", damage.kind)]
    findings = [
        Finding(split, shard.file, key, *fault) for key, some in zip(keys, faults, strict=True) for fault in some
    ]
    if damage:
        said = f"{damage.detail}; {len(keys)} samples, the index says {shard.count}"
        findings.append(Finding(split, shard.file, None, damage.kind, said))
    return Checked(findings, keys, good)


def _new_folder(out: Path, index: Index) -> Path:
    if (out / INDEX_NAME).exists():
        raise UserError(f"clean: {out} holds shards already; choose a new folder")
    if not is_remote(index.root) and out.resolve() == Path(index.root.removeprefix("file://")).resolve():
        raise UserError(f"clean: {out} is the folder itself; choose a new one")
    return out


def _keep(index: Index, shard: ShardInfo, checked: Checked, out: Path, taken: set[str]) -> ShardInfo:
    """The shard where it is, or without its bad samples in the new folder."""
    url = index.url(shard)
    whole = all(checked.good) and not any(finding.kind in CUT for finding in checked.findings)
    if whole and is_remote(url) and not url.startswith("pipe:"):
        return ShardInfo(url, len(checked.keys))
    name = shard.file.rpartition("/")[2]  # feature caches know it by this
    name = name if name not in taken else shard.file.replace("/", "_").replace(":", "_")
    if whole and not is_remote(url):
        _link(url.removeprefix("file://"), out / name)
        return ShardInfo(name, len(checked.keys))
    return write_encoded(out / name, _good_samples(url, checked), format=tarfile.PAX_FORMAT)


def _link(shard: str, name: Path) -> None:
    """A second name of a shard: an index names nothing outside of its folder."""
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(os.path.realpath(shard), name)
        except FileExistsError:
            raise
        except OSError:  # on another disk, or where there are no such links
            os.symlink(os.path.realpath(shard), name)
    except OSError as err:
        raise UserError(f"{name}: can't be written ({err.strerror or err}); choose another --clean") from err


def _good_samples(url: str, checked: Checked) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    try:
        with open_read(url) as stream:
            for raw, good in zip(ShardReader(stream, url), checked.good, strict=False):
                if good:
                    yield raw["__key__"], [(name, data) for name, data in raw.items() if not name.startswith("__")]
    except OSError as err:
        raise UserError(f"{url}: can't be read again ({err.strerror or err}); verify once more") from err
