"""Random access to the samples of a source."""

from __future__ import annotations

import hashlib
import io
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.wording import counted
from m3ae_fast.data.corpus import Source
from m3ae_fast.data.index import MAX_IMAGE_BYTES, MISSING, IndexedShard, caption_of, printable
from m3ae_fast.data.shard_store import ShardStore

T = TypeVar("T")
MAX_CAPTION_BYTES = 1 << 16  # longer text is truncated; a larger JSON member is an error
# maximum number of shards that are kept open: twice the default of data.shuffle_shards. Each shard has two open files.
_OPEN_SHARDS = 256
_RETRY_S = 60  # seconds until a failed shard is retried


class Raw(NamedTuple):
    """A sample's image and caption; None for a modality that the sample lacks or the run does not use."""

    image: bytes | None  # the bytes of the image file
    caption: str | None


class _Open(NamedTuple):
    file: io.FileIO  # closed when it is no longer referenced
    table: np.ndarray


class Reader:
    """Reader of a source's samples, which keeps recently used shards open."""

    def __init__(self, source: Source, store: ShardStore):
        self.source, self.store = source, store
        self._starts = np.concatenate(([0], np.cumsum(source.sizes)))
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._failed: dict[int, tuple[float, OSError]] = {}
        self._renewed: dict[int, float] = {}  # time of the last download, by shard

    def find(self, sample: int) -> tuple[int, int]:
        """Return the shard and row of a sample, given its number in file order."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def key(self, shard: int, row: int) -> str:
        """Return the sample's key. Raises OSError if the shard cannot be read, and BadSample if the shard does not
        contain this row."""
        table = self._get(shard).table
        if row >= len(table):
            raise BadSample(
                f"the shard has only {counted(len(table), 'sample')}, but its manifest states "
                f"{self.source.sizes[shard]}"
            )
        return printable(table["key"][row].decode("utf-8", "replace"))

    def read(self, shard: int, row: int) -> Raw:
        """Return the image bytes and the caption of a sample. A damaged cached shard is downloaded again, once. Raises
        BadSample if a member that the run uses is missing, truncated, too large or not text, and OSError if the shard
        cannot be read."""
        return self._whole(shard, lambda: self._read(shard, row))

    def _read(self, shard: int, row: int) -> Raw:
        file, table = self._get(shard)
        entry, modality = table[row], self.source.modalities[shard]
        image = caption = None
        if modality in ("paired", "image") or (modality == "any" and entry["image_offset"] != MISSING):
            image = _read(file.fileno(), entry, "image", MAX_IMAGE_BYTES, "image")
        wanted = modality in ("paired", "text") or (modality == "any" and entry["text_offset"] != MISSING)
        if wanted and (image is None or keeps_caption(entry["key"], self.source.caption_fraction)):
            caption = _read_caption(file.fileno(), entry)
        return Raw(image, caption)

    def _whole(self, shard: int, read: Callable[[], T]) -> T:
        """Return the result of `read`. If the cached shard is damaged, download it again and repeat the call."""
        try:
            return read()
        except _Damaged:
            self._renew(shard)
            return read()

    def _get(self, shard: int) -> _Open:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if shard in self._failed:
            when, error = self._failed[shard]
            if time.monotonic() - when < _RETRY_S:
                raise error
        try:
            entry = self._open_shard(self.source.shards[shard])
        except (OSError, UserError) as error:
            failure = OSError(f"the shard cannot be read ({error})")
            self._failed[shard] = time.monotonic(), failure
            raise failure from None
        self._close_removed()
        self._open[shard] = entry
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[shard]

    def _close_removed(self) -> None:
        """Close cached shards that have been evicted, to free their disk space."""
        for shard in [number for number, entry in self._open.items() if not os.fstat(entry.file.fileno()).st_nlink]:
            del self._open[shard]

    def _renew(self, shard: int) -> None:
        """Download a cached shard again, unless another process has done so, and close the old copy, so that the new
        one is opened on the next access. Raises OSError if the download fails, or if the last one was recent."""
        opened, name = self._open[shard], self.source.shards[shard].shard
        if time.monotonic() - self._renewed.get(shard, -_RETRY_S) < _RETRY_S:
            raise OSError(
                f"its cached copy {self.store.copy(name)} differs from the indexed shard, although it was downloaded "
                "again; if the shard was replaced, delete its index"
            )
        self._renewed[shard] = time.monotonic()
        if os.path.samestat(os.fstat(opened.file.fileno()), os.stat(self.store.path(name))):
            self.store.refetch(name)
        del self._open[shard]

    def _open_shard(self, indexed: IndexedShard) -> _Open:
        """Open a shard. Raises OSError or UserError if it cannot be read, or if it has changed since it was indexed."""
        path = self.store.path(indexed.shard, indexed.summary.size)
        indexed = indexed.located()
        if os.stat(path).st_size != indexed.summary.size:
            if not self.store.is_staged(indexed.shard):
                raise OSError("the shard has changed since it was indexed")
            path = self.store.refetch(indexed.shard)
            if os.stat(path).st_size != indexed.summary.size:
                raise OSError(
                    f"its cached copy {path} differs from the indexed shard; delete {indexed.sidecar} to index it again"
                )
        try:
            table = indexed.table()
        except OSError:
            table = indexed.reindexed(self.store).table()
        return _Open(open(path, "rb", buffering=0), table)

    def __reduce__(self):
        return Reader, (self.source, self.store)  # open files are not pickled


def keeps_caption(key: bytes, fraction: float) -> bool:
    """Return whether the pair with this key is among the `fraction` (0 to 1) of all pairs whose captions are used."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < fraction * 2**64


class _Damaged(OSError):
    """Raised if a member differs from its entry in the index."""


def _read(fd: int, entry: np.void, part: str, limit: int, what: str, most: int | None = None) -> bytes:
    """Return the first `most` bytes of a member, or all bytes if `most` is None."""
    offset, size, checksum = (int(entry[f"{part}_{name}"]) for name in ("offset", "size", "crc"))
    if offset == MISSING:
        raise BadSample(f"the sample has no {what}, which the `modality` of its source requires")
    wanted = size if most is None else min(size, most)
    if wanted > limit:
        raise BadSample(f"the {what} has {wanted} bytes, but at most {limit} are allowed")
    data = os.pread(fd, wanted, offset)
    if checksum and wanted == size and zlib.crc32(data) != checksum:
        raise _Damaged(f"the {what} does not match its checksum in the index; the shard has changed or is damaged")
    if len(data) != wanted:
        raise BadSample(f"the shard ends inside the {what}")
    return data


def _read_caption(fd: int, entry: np.void) -> str:
    if entry["json"]:
        try:
            caption = caption_of(_read(fd, entry, "text", MAX_CAPTION_BYTES, "json"))
        except ValueError:
            caption = None
        if caption is None:
            raise BadSample("the json has no caption")
        return caption
    data = _read(fd, entry, "text", MAX_CAPTION_BYTES, "caption", most=MAX_CAPTION_BYTES)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(data) < entry["text_size"] and error.start > len(data) - 4:
            return data[: error.start].decode("utf-8")  # truncated within a character
        raise BadSample("the caption is not UTF-8") from None
