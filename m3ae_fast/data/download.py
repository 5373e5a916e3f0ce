"""Downloads of shards into files, with limits on idle time, transfer rate and total time, and a check that the result
is a tar."""

from __future__ import annotations

import contextlib
import email.utils
import gzip
import io
import os
import select
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from webdataset.gopen import Pipe, gopen

from m3ae_fast.base import s3_and_gs
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.data.tar import is_whole_tar

TIMEOUT_S = 60.0  # longest time without received data, in seconds
SLOWEST = 4096.0  # minimum number of bytes per second, averaged over SLOW_S; a slower transfer is an error
SLOW_S = 120.0
LONGEST_S = 4 * 3600.0  # limit for one attempt, in seconds
ATTEMPTS = 5
MAX_WAIT_S = 300.0  # longest wait between two attempts, even if the server requests more
RETRIED = {408, 425, 429}  # 4xx HTTP errors that are retried: timeout, too early, too many requests
_CHUNK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"


class NotFound(OSError):
    """Raised for a permanent failure, after which a retry would be pointless."""


def download(shard: str, out: BinaryIO) -> None:
    """Write the tar from a URL, a `pipe:` command or a file to `out`, which must be empty. Gzipped data are
    decompressed. Raises NotFound if the server rejects the request permanently, for example because the tar does not
    exist. Raises OSError for all other failures: a transfer that is too slow or incomplete, or data that are not a tar.
    After an HTTP error, the attribute `retry_after` of the OSError is the waiting time in seconds that the server
    requests (0: none)."""
    try:
        with _open(shard) as chunks:
            source = io.BufferedReader(_Stream(_paced(chunks)), _CHUNK)
            zipped = source.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC)
            shutil.copyfileobj(gzip.GzipFile(fileobj=source) if zipped else source, out, _CHUNK)
    except urllib.error.HTTPError as error:
        with error:
            if error.code < 500 and error.code not in RETRIED:
                raise NotFound(f"{error}") from error
            raise _with_wait(OSError(f"{error}"), error.headers.get("Retry-After")) from error
    except OSError:
        raise
    except Exception as error:  # URL handlers and decompressors raise many kinds of errors
        raise OSError(str(error)) from error
    out.flush()
    if not out.tell():
        raise OSError("the source sent no data")
    if not is_whole_tar(out.fileno(), out.tell()):
        raise OSError(
            f"the data are not a complete tar file: the first header or the end mark is missing ({_begin(out)})"
        )


def read_small(name: str, limit: int) -> bytes:
    """Return the content of a file or URL. Raises OSError if it cannot be read or has more than `limit` bytes."""
    data = b""
    try:
        with _open(name) as chunks:
            for chunk in _paced(chunks):
                data += chunk
                if len(data) > limit:
                    raise OSError(f"the file has more than {limit:,} bytes")
    except OSError:
        raise
    except Exception as error:  # as in `download`
        raise OSError(str(error)) from error
    return data


def retry_after(error: OSError, attempt: int) -> float:
    """Return the seconds to wait after the failure of attempt number `attempt`, counted from 0."""
    return min(MAX_WAIT_S, max(2.0**attempt, getattr(error, "retry_after", 0.0)))


def _with_wait(error: OSError, header: str | None) -> OSError:
    """Add the waiting time of a Retry-After header to the error. The header contains seconds or a date (RFC 9110)."""
    seconds = 0.0
    if header and header.strip().isascii() and header.strip().isdecimal():
        seconds = float(header[:9])
    elif header:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    error.retry_after = seconds  # type: ignore[attr-defined]
    return error


def _begin(out: BinaryIO) -> str:
    head = os.pread(out.fileno(), 60, 0)
    return f"{out.tell():,} bytes that begin with {head.decode('ascii', 'replace').split(chr(0))[0]!r}"


@contextmanager
def _open(shard: str) -> Iterator[Iterator[bytes]]:
    """Open a shard and yield an iterator over its bytes."""
    if shard.startswith(("http://", "https://")):  # gopen would require the program curl
        with urllib.request.urlopen(shard, timeout=TIMEOUT_S) as response:
            yield _of_http(response)
    elif "://" not in shard and not shard.startswith("pipe:"):
        with open_regular(shard) as file:
            yield iter(lambda: file.read(_CHUNK), b"")
    else:
        stored = shard.startswith(s3_and_gs.SCHEMES)
        source = _object(shard) if stored else gopen(shard)
        if not isinstance(source, Pipe):
            with source:
                yield iter(lambda: source.read(_CHUNK), b"")
            return
        try:
            yield _of_object(source) if stored else _of_command(source)
        except BaseException:
            source.proc.kill()  # otherwise, closing would wait for the process
            source.ignore_errors = True
            raise
        finally:
            source.close()  # raises an error if the command failed


def _object(url: str) -> Pipe:
    return Pipe(s3_and_gs.command(url), mode="rb", stderr=subprocess.PIPE, ignore_errors=True)


def _of_object(source: Pipe) -> Iterator[bytes]:
    yield from _of_command(source)
    if code := source.proc.wait():
        reason = source.proc.stderr.read().decode("utf-8", "replace").strip()
        raise NotFound(reason) if code == s3_and_gs.NOT_FOUND else OSError(reason)


def _of_http(response) -> Iterator[bytes]:
    promised, got = response.headers.get("Content-Length"), 0
    while chunk := response.read1(_CHUNK):
        got += len(chunk)
        yield chunk
    if promised is not None and got != int(promised):
        raise OSError(f"the transfer ended after {got:,} of {int(promised):,} bytes")


def _of_command(source: Pipe) -> Iterator[bytes]:
    fd = source.stream.fileno()
    ready = select.poll()  # select() fails for file descriptors above 1023
    ready.register(fd, select.POLLIN)
    silent = 0.0
    while silent < TIMEOUT_S:
        if not ready.poll(1000):
            silent += 1.0
            continue
        silent = 0.0
        if not (chunk := os.read(fd, _CHUNK)):
            return
        yield chunk
    raise OSError(f"no data arrived for {TIMEOUT_S:g} s")


def _paced(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the chunks. Raises OSError if the transfer is too slow or takes too long."""
    start = since = time.monotonic()
    got = 0
    for chunk in chunks:
        yield chunk
        got += len(chunk)
        now = time.monotonic()
        if now - start > LONGEST_S:
            raise OSError(f"the transfer took more than {LONGEST_S:g} s")
        if now - since > SLOW_S:
            if got < SLOWEST * (now - since):
                raise OSError(f"the transfer rate of {got / (now - since):.0f} bytes/s is below {SLOWEST:g}")
            since, got = now, 0


class _Stream(io.RawIOBase):
    """A readable file over an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while len(self._rest) < len(_GZIP_MAGIC) and (chunk := next(self._chunks, b"")):
            self._rest += chunk
        part, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)
