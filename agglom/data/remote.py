"""A remote file as a stream that survives its connection.

What broke off is opened again where it was, after a pause, up to four times in all; every megabyte that arrives earns
four new ones. A server that says nothing for 30 seconds counts as broken. So the slowest end of a shard that can't be
had comes after 4 x 30 s and 7 s of pauses.
"""

from __future__ import annotations

import errno
import io
import logging
import time
from http.client import HTTPResponse
from typing import IO, Any
from urllib import request
from urllib.error import HTTPError, URLError

log = logging.getLogger("agglom.data")

WAITS_S = (1.0, 2.0, 4.0)  # before the second, third and fourth try
TIMEOUT_S = 30.0  # of connecting, and of silence
PROGRESS = 1 << 20  # bytes after which all tries are left again
_PASSING = (408, 425, 429)  # of the statuses below 500: too slow, too early, too often
# trying again changes nothing
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError, TypeError)


class RemoteFile(io.RawIOBase):
    """Reads a remote file from beginning to end, of which the caller sees nothing but bytes.

    Args:
        address: http, https, or whatever fsspec has a backend for.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: it may not be read.
        OSError: it could not be opened, or read on, by any of the tries.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address
        self._at = self._mark = 0  # bytes read, and those before the last failure
        self._failures = 0
        self._size: int | None = None
        self._body: IO[bytes] | None = None
        self._try(0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._try(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _try(self, number: int) -> bytes:
        """Up to so many bytes; none at the end, and where none are asked for (which only opens)."""
        while True:
            try:
                if self._body is None:
                    self._open()
                assert self._body is not None
                data = self._body.read(number) if number else b""
                if number and not data and self._size is not None and self._at < self._size:
                    raise ConnectionError(f"ended after {self._at} of {self._size} bytes")
            except _FINAL:
                self._drop()
                raise
            except Exception as err:  # whatever a backend raises
                self._drop()
                self._wait(err)
                continue
            self._at += len(data)
            return data

    def _wait(self, err: Exception) -> None:
        if self._at - self._mark >= PROGRESS:
            self._failures = 0
        self._mark = self._at
        said = " ".join(str(err).split()) or type(err).__name__
        if self._failures == len(WAITS_S):
            raise OSError(errno.EIO, f"no more after {len(WAITS_S) + 1} tries, last: {said}", self.address) from err
        pause = WAITS_S[self._failures]
        self._failures += 1
        log.warning("%s: %s; trying again in %g s", self.address, said, pause)
        time.sleep(pause)

    def _open(self) -> None:
        if not self.address.startswith(("http://", "https://")):
            import fsspec

            self._body = fsspec.open(self.address, "rb", **_options(self.address)).open()
            self._body.seek(self._at)
            return
        response = _request(self.address, self._at)
        self._body = response
        skip = 0 if response.status == 206 else self._at  # it may not know of ranges
        size = None if response.length is None else response.length + self._at - skip
        if self._at and size != self._size:
            raise ValueError(f"{self.address}: another file since it was opened: {size} bytes, not {self._size}")
        self._size = size
        while skip:
            if not (data := response.read(min(skip, 1 << 16))):
                raise ConnectionError("ended where it was read before")
            skip -= len(data)

    def _drop(self) -> None:
        body, self._body = self._body, None
        try:
            if body is not None:
                body.close()
        except Exception:  # noqa: BLE001  it was broken anyway
            log.debug("%s: could not be closed", self.address, exc_info=True)


def _request(address: str, start: int) -> HTTPResponse:
    headers = {"User-Agent": "agglom", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return _opener().open(request.Request(address, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as err:
        err.close()
        said = f"HTTP {err.code} {err.reason}"
        if err.code in (404, 410):
            raise FileNotFoundError(errno.ENOENT, said, address) from err
        if err.code < 500 and err.code not in _PASSING:
            raise PermissionError(errno.EACCES, said, address) from err
        raise OSError(errno.EIO, said, address) from err
    except URLError as err:
        import ssl

        if isinstance(err.reason, ssl.SSLCertVerificationError):
            raise PermissionError(errno.EACCES, str(err.reason), address) from err
        raise


def _opener() -> request.OpenerDirector:
    """urllib's own without files, FTP and `data:`, so that a server can't redirect there."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _options(address: str) -> dict[str, Any]:
    """Timeouts, as each backend calls them; Hugging Face's has its own (HF_HUB_DOWNLOAD_TIMEOUT, 10 s)."""
    if address.startswith("s3://"):
        return {"config_kwargs": {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S}}
    return {"requests_timeout": TIMEOUT_S} if address.startswith("gs://") else {}
