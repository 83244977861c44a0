"""A tar as a stream of encoded samples. Nothing of it is ever written anywhere, whatever its members are called.

webdataset's own grouping drops a second file of the same name, links and unnamed files without a word; here they make
their sample a bad one, so that no picture meets another one's label.
"""

from __future__ import annotations

import re
import tarfile
from typing import IO, Any, Iterator

from webdataset.tariterators import base_plus_ext

from agglom.data.faults import Fault

MAX_BYTES = 1 << 30  # of one file in a tar: a header may claim anything, and a compressed tar may keep the promise
MAX_HEADER = 1 << 20  # of a file's long name and attributes
_ABOUT_THE_NEXT = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own notes


class ShardReader:
    """Iterates over the samples of an opened tar.

    A sample is a dict of extension -> bytes, `__key__`, `__url__`, `__fault__` (`Fault`) where something is wrong with
    it as a whole, and `__cut__` (`Fault`) where files of it may be lost. Files of a sample lie next to each other; a
    file name that comes again begins another sample.

    Args:
        stream: the tar, opened for reading bytes; plain or compressed.
        url: where it is from.

    Attributes:
        damage: what ended the tar before its time, or None. Reading never raises.
        complete: whether the mark that ends a tar was reached.
    """

    def __init__(self, stream: IO[bytes], url: str) -> None:
        self.stream, self.url = stream, url
        self.damage: Fault | None = None
        self.complete = False
        self._seen: set[str] = set()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        headers: Any = _Headers()  # tarfile wants a class and takes anything that has the method
        sample: dict[str, Any] | None = None
        within = False  # a file of the sample
        try:
            with tarfile.open(fileobj=self.stream, mode="r|*", tarinfo=headers) as tar:
                while (member := _next(tar)) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would remember them all
                    key, extension = _split(member)
                    if key is None:
                        continue
                    if sample is None or key != sample["__key__"] or extension in sample:
                        if sample is not None:
                            yield sample
                        sample = self._begin(key)
                    if fault := _refused(member):
                        sample["__fault__"] = fault
                        continue
                    within = True
                    sample[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
                    within = False
        except Exception as err:
            self.damage = _damage(err, headers.end)
            if sample is not None and within:
                sample.setdefault("__fault__", self.damage)
        else:
            self.complete = isinstance(headers.end, tarfile.EOFHeaderError)  # type: ignore[attr-defined]
            if isinstance(headers.end, _BROKEN):
                self.damage = _damage(headers.end, headers.end)
        if sample is not None:
            if self.damage:
                sample["__cut__"] = self.damage
            yield sample

    def _begin(self, key: str) -> dict[str, Any]:
        sample: dict[str, Any] = {"__key__": key, "__url__": self.url}
        if key in self._seen:
            sample["__fault__"] = Fault("duplicate key", "the key was there before in the same shard")
        self._seen.add(key)
        return sample


_BROKEN = (
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
    tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
    tarfile.SubsequentHeaderError,  # type: ignore[attr-defined]
)


class _Info(tarfile.TarInfo):
    """Long names and attributes are read before anybody sees them, so their size is bounded here."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _Info:
        info = super().frombuf(buf, encoding, errors)
        if info.type in _ABOUT_THE_NEXT and info.size > MAX_HEADER:
            raise tarfile.InvalidHeaderError(f"a header of {info.size} bytes")  # type: ignore[attr-defined]
        return info


class _Headers:
    """What tarfile reads headers with. It ends quietly at a damaged one; this remembers what ended it."""

    def __init__(self) -> None:
        self.end: Exception | None = None

    def fromtarfile(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return _Info.fromtarfile(tar)
        except tarfile.HeaderError as err:
            self.end = err
            raise


def _next(tar: Any) -> tarfile.TarInfo | None:
    """`tar.next()`, which spends years behind the end of a file where a header claims 2^60 bytes."""
    # opening has read the first header already, and next() hands that one out
    while tar.firstmember is None and (left := tar.offset - tar.fileobj.tell()) > 0:
        if not tar.fileobj.read(min(left, 1 << 20)):
            raise tarfile.ReadError("unexpected end of data")
    return tar.next()


def _split(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """Key and extension; no key for what isn't part of a sample. A link or device without an extension is its own."""
    if member.isdir() or _META.match(member.name):
        return None, ""
    key, extension = base_plus_ext(member.name)
    if key is None:
        return (None, "") if member.isreg() else (member.name, "")
    return (None, "") if extension.startswith("__") else (key, extension.lower())


def _refused(member: tarfile.TarInfo) -> Fault | None:
    name = member.name
    if not member.isreg():
        what = f"a link to {member.linkname!r}" if member.issym() or member.islnk() else "no plain file"
        return Fault("unsafe member", f"{name!r} is {what}; valid: plain files")
    if name.startswith("/") or ".." in name.split("/"):
        return Fault("unsafe member", f"name {name!r}; valid: relative names without ..")
    if member.size > MAX_BYTES:
        return Fault("too large", f"{name!r} of {member.size} bytes; valid: up to {MAX_BYTES}")
    return None


def _damage(err: Exception, end: Exception | None) -> Fault:
    said = " ".join(f"{type(err).__name__}: {getattr(err, 'strerror', None) or err}".split())
    text = str(err)
    if isinstance(end, tarfile.TruncatedHeaderError) or "unexpected end of data" in text:  # type: ignore[attr-defined]
        return Fault("truncated tar", f"the file ends early ({said})")
    if text == "empty file":
        return Fault("empty shard", "the file is empty")
    if isinstance(err, tarfile.TarError):
        return Fault("bad tar header", f"no tar from here on ({said})")
    return Fault("unreadable shard", said)
