"""Shard indexes: a small sidecar file per shard with the offsets of its samples, for random access.

A sidecar consists of one line of JSON (`Summary`) and a NumPy array (`table`). It is written next to the shard or, if
this is not possible, to the cache folder. It is created on first use and renewed when the shard's size or modification
time changes. The sidecar of a remote or compressed shard also contains checksums, so that later damage to its cached
copy is detected.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter

from m3ae_fast.base.atomic_file import put_in_place
from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.data.shard_names import INDEX_SUFFIX
from m3ae_fast.data.shard_store import ShardStore
from m3ae_fast.data.tar import Member, scan_tar
from m3ae_fast.images.suffixes import IMAGE_SUFFIXES, MASK_SUFFIX

Modality = Literal["any", "paired", "image", "text"]

VERSION = 8
_OTHER_SUFFIXES = ("txt", "json", "cls", MASK_SUFFIX)
_MOST_IGNORED = 20  # maximum number of suffixes in a summary
MISSING = -1
MAX_IMAGE_BYTES = 1 << 28
_MAX_KEY = 128  # maximum number of bytes of a stored key; only the end of a longer key is stored
_MAX_JSON = 1 << 20  # maximum number of bytes of a JSON member that are searched for a caption
_MAX_SUMMARY = 1 << 16  # maximum number of bytes of a summary
_MAX_HEADER = 1 << 17  # maximum number of bytes of NumPy's header
_OFFSETS = tuple(f"{part}_{what}" for part in ("image", "text", "cls", "json") for what in ("offset", "size"))
_CHECKSUMS = tuple(f"{part}_crc" for part in ("image", "text"))
_MAX_FILE = 1 << 60  # maximum number of bytes of a shard, and of any offset in it
_THREADS = 8
# The key is defined as in WebDataset: the path up to the first dot of the basename.
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^/.]+)[.]([^/]*)$", re.DOTALL)
_NOTHING = Member("", MISSING, 0)
_META = re.compile(r"^__[^/]*__($|/)")  # WebDataset skips these members


_Count = Annotated[int, Field(ge=0, le=_MAX_FILE)]


@dataclass(frozen=True)
class Summary:
    """The first line of a sidecar: counts and the state of a shard."""

    version: int
    size: _Count  # bytes of the tar
    mtime_ns: int
    samples: _Count  # samples with an image or a caption
    images: _Count
    captions: _Count
    paired: _Count  # samples with an image and a caption
    ignored: dict[str, _Count]  # numbers of ignored files by suffix; only the most frequent suffixes
    damage: str | None  # description of the damage to the tar; its readable part is indexed. None: no damage

    @property
    def modality(self) -> Modality:
        """Return the modality of the shard's samples; "any" if their modalities differ."""
        kinds: dict[Modality, int] = {
            "paired": self.paired,
            "image": self.images - self.paired,
            "text": self.captions - self.paired,
        }
        return next((kind for kind, count in kinds.items() if count == self.samples), "any")


_SUMMARY = TypeAdapter(Summary)


@dataclass(frozen=True)
class IndexedShard:
    """A shard with its summary and the path of its sidecar, which contains the table of samples."""

    shard: str
    summary: Summary
    sidecar: Path

    def table(self) -> np.ndarray:
        """Return the table of the samples: a structured array [samples]. For each of the members image, text (the
        caption), cls and json (which may contain a label), `NAME_offset` and `NAME_size` are the offset and the size in
        bytes; the offset is MISSING if there is no such member. `json` is true if the text is a JSON member, whose
        "caption" field is the caption. `image_crc` and `text_crc` are the CRC-32 of these members (0: unknown), and
        `key` is the key of the sample in UTF-8.

        Raises OSError if the sidecar cannot be read."""
        with open_regular(self.sidecar) as file:
            try:
                # memory-mapped, so that the processes of a node share it; sidecars are replaced, but never modified
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                return _parse_table(data, self.summary.samples)
            except Exception as error:  # NumPy's parser raises many kinds of errors for foreign headers
                reason = " ".join(str(error).split())[:200]
                raise OSError(f"its index {self.sidecar} is damaged ({reason}); delete that file") from None

    def separated(self) -> int:
        """Return the number of keys whose image and caption belong to different samples, because their files are not
        adjacent in the tar; 0 if the sidecar cannot be read."""
        if self.summary.paired in (self.summary.images, self.summary.captions):
            return 0
        try:
            table = self.table()
        except OSError:  # the sidecar is created again when samples are read
            return 0
        has_image, has_caption = (table[name] != MISSING for name in ("image_offset", "text_offset"))
        return len(np.intersect1d(table["key"][~has_caption], table["key"][~has_image]))

    def located(self) -> IndexedShard:
        """Return the shard with its sidecar. Raises UserError if the shard cannot be read."""
        return self

    def reindexed(self, store: ShardStore) -> IndexedShard:
        """Return a new entry for a shard whose sidecar or cached copy is damaged. Raises OSError if the shard has
        changed or cannot be read."""
        with store.lock(f"index-{store.name(self.shard)}"):
            made = _make(self.shard, _file(self.shard, store), store)
        if (made.summary.samples, made.summary.size) != (self.summary.samples, self.summary.size):
            raise OSError("the shard has changed since it was indexed")
        return made


def index_shards(
    shards: Sequence[str], store: ShardStore, progress: bool = False, lost: list[Skipped] | None = None
) -> list[IndexedShard]:
    """Return the entries of all shards in order. If a shard has no valid sidecar, one process per node indexes it while
    the other processes wait. Shards that cannot be read or downloaded are appended to `lost`; if `lost` is None,
    UserError is raised for the first such shard. UserError is also raised if an index cannot be written."""

    def find(shard: str) -> IndexedShard | Skipped:
        try:
            if entry := _load(shard, store):
                return entry
            path = _file(shard, store)  # may download the shard, so it is called before the lock is taken
            with store.lock(f"index-{store.name(shard)}"):
                return _load(shard, store) or _make(shard, path, store)
        except OSError as error:
            return Skipped(shard, "", f"cannot be read ({error.strerror or error})")

    found: list[IndexedShard] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = pool.map(find, shards)
        for entry in track(entries, "indexing shards", len(shards), show=progress):
            if isinstance(entry, IndexedShard):
                found.append(entry)
            elif lost is None:
                pool.shutdown(wait=False, cancel_futures=True)
                raise UserError(f"shard {entry}")
            else:
                lost.append(entry)
    return found


def _file(shard: str, store: ShardStore) -> Path:
    """Return the file to index. For a shard on a network file system, this is the original, because only headers are
    read."""
    return store.path(shard) if store.must_be_copied(shard) else Path(shard)


def _sidecars(shard: str, store: ShardStore) -> list[Path]:
    in_cache = store.cache_dir / "index" / (store.name(shard) + INDEX_SUFFIX)
    return [in_cache] if store.must_be_copied(shard) else [Path(shard + INDEX_SUFFIX), in_cache]


def _load(shard: str, store: ShardStore) -> IndexedShard | None:
    """Return the shard's entry if there is a valid sidecar, otherwise None. Raises OSError if the shard cannot be
    read."""
    status = None if store.must_be_copied(shard) else os.stat(shard)
    for sidecar in _sidecars(shard, store):
        try:
            with open_regular(sidecar) as file:
                summary = _SUMMARY.validate_json(os.pread(file.fileno(), _MAX_SUMMARY, 0).split(b"\n")[0], strict=True)
        except (OSError, ValueError):
            continue
        fits = status is None or (summary.size, summary.mtime_ns) == (status.st_size, status.st_mtime_ns)
        if fits and summary.version == VERSION:
            return IndexedShard(shard, summary, sidecar)
    return None


def _make(shard: str, path: Path, store: ShardStore) -> IndexedShard:
    """Index a shard and return its entry. `path`: the file that contains the shard. A damaged cached copy is downloaded
    again, once. Raises OSError if the shard cannot be read, and UserError if no sidecar can be written."""
    status, members, damage = os.stat(path), *scan_tar(path)
    if damage and store.must_be_copied(shard):
        path = store.refetch(shard)
        status, members, damage = os.stat(path), *scan_tar(path)
    with open_regular(path) as file:
        table, ignored = _tabulate(members, file.fileno(), store.must_be_copied(shard))
    has_image, has_caption = (table[name] != MISSING for name in ("image_offset", "text_offset"))
    images, captions, paired = (int(each.sum()) for each in (has_image, has_caption, has_image & has_caption))
    kinds = (len(table), images, captions, paired)
    summary = Summary(VERSION, status.st_size, status.st_mtime_ns, *kinds, ignored, damage)
    reason: str | None = None
    for sidecar in _sidecars(shard, store):
        try:
            _write(sidecar, summary, table)
            return IndexedShard(shard, summary, sidecar)
        except OSError as error:
            reason = error.strerror
    raise UserError(f"index {sidecar}: cannot be written ({reason}); set data.cache_dir to a writable folder")


def _write(sidecar: Path, summary: Summary, table: np.ndarray) -> None:
    handle, partial = tempfile.mkstemp(prefix=sidecar.name + ".", dir=sidecar.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(json.dumps(asdict(summary)).encode() + b"\n")
            np.save(file, table, allow_pickle=False)
        os.chmod(partial, 0o644)
        put_in_place(Path(partial), sidecar)
    except OSError:
        Path(partial).unlink(missing_ok=True)
        raise


def _tabulate(members: list[Member], fd: int, checked: bool) -> tuple[np.ndarray, dict[str, int]]:
    """Return the table, and the numbers of ignored files by suffix. If a sample has several images, all except one are
    ignored."""
    rows: list[tuple[Any, ...]] = []
    ignored: Counter[str] = Counter()
    for key, files in group(members):
        images = [suffix for suffix in IMAGE_SUFFIXES if suffix in files][:1]
        ignored.update(printable(suffix[:_MAX_KEY]) for suffix in files.keys() - {*images, *_OTHER_SUFFIXES})
        text, from_json = files.get("txt"), False
        if text is None and "json" in files and _has_caption(fd, files["json"]):
            text, from_json = files["json"], True
        if images or text:
            image = files[images[0]] if images else None
            parts = [member or _NOTHING for member in (image, text, *map(files.get, ("cls", "json")))]
            places = [number for part in parts for number in (part.offset, part.size)]
            sums = [_checksum(fd, part) if checked else 0 for part in parts[:2]]
            shown = printable(key[-_MAX_KEY:]).encode("utf-8", "replace")[-_MAX_KEY:]
            rows.append((*places, from_json, *sums, shown))
    table = np.array(rows, dtype=_row(max([1, *(len(row[-1]) for row in rows)])))
    return table, dict(ignored.most_common(_MOST_IGNORED))


def _row(width: int) -> np.dtype:
    """Return the dtype of a row of the table, with keys of `width` bytes."""
    sums = [(name, "<u4") for name in _CHECKSUMS]
    return np.dtype([*((name, "<i8") for name in _OFFSETS), ("json", "?"), *sums, ("key", f"S{width}")])


def _checksum(fd: int, member: Member) -> int:
    """Return the checksum of a member; 0 if it is missing or too large."""
    if member.offset == MISSING or member.size > MAX_IMAGE_BYTES:
        return 0
    return zlib.crc32(os.pread(fd, member.size, member.offset))


def _parse_table(data: memoryview, samples: int) -> np.ndarray:
    """Parse an untrusted array written by `np.save`. Raises ValueError or errors of NumPy."""
    file = io.BytesIO(data[: _MAX_SUMMARY + _MAX_HEADER])
    file.readline()
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it has an unknown version")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    width = dtype["key"].itemsize if dtype.names and "key" in dtype.names else 0
    rest = data[file.tell() :]
    fits = 0 < width <= _MAX_KEY and dtype == _row(width)
    if not fits or shape != (samples,) or len(rest) != samples * dtype.itemsize:
        raise ValueError("its table does not match its number of samples")
    table = np.frombuffer(rest, dtype)
    if any(((table[name] < low) | (table[name] > _MAX_FILE)).any() for name, low in zip(_OFFSETS, (MISSING, 0) * 4)):
        raise ValueError("it has impossible offsets or sizes")
    return table


def group(members: list[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield the key of each sample and its members by suffix.

    Consecutive members with the same key form a sample, as in WebDataset; a repeated suffix begins another sample.
    """
    key = ""
    files: dict[str, Member] = {}
    for member in members:
        match = _KEY_AND_SUFFIX.match(member.name)
        if match is None or _META.match(member.name):
            continue
        suffix = match[2].lower()
        if match[1] != key or suffix in files:
            if files:
                yield key, files
            key, files = match[1], {}
        files[suffix] = member
    if files:
        yield key, files


def _has_caption(fd: int, member: Member) -> bool:
    try:
        return caption_of(os.pread(fd, min(member.size, _MAX_JSON), member.offset)) is not None
    except ValueError:
        return False


def caption_of(data: bytes) -> str | None:
    """Return the "caption" text of a JSON member; None if there is none. Raises ValueError if the member is not JSON or
    the caption is not valid text."""
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    caption = content.get("caption") if isinstance(content, dict) else None
    if not isinstance(caption, str):
        return None
    caption.encode()  # raises ValueError for a lone surrogate, which is valid in JSON but not in text
    return caption


def printable(key: str) -> str:
    """Return the key with U+FFFD in place of each character that is not printable."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in key)
