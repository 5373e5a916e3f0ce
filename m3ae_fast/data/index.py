"""What a shard holds and where: one small sidecar file a shard, so that any sample is read by itself.

A sidecar is one line of JSON (`Summary`) and a NumPy array (`table`), written beside the shard, or into the cache
folder where that is not possible. It is made on first use and again when the shard's size or modification time changes.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from m3ae_fast.data.shards import INDEX_SUFFIX, ShardStore
from m3ae_fast.data.tar import Member, scan_tar
from m3ae_fast.errors import UserError

Modality = Literal["any", "paired", "image", "text"]

VERSION = 2
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MISSING = -1
_MAX_KEY = 128  # bytes that messages show
_MAX_JSON = 1 << 20  # bytes
_THREADS = 8
_KEY_AND_SUFFIX = re.compile(
    r"^((?:.*/|)[^/.]+)[.]([^/]*)$", re.DOTALL
)  # WebDataset's: up to the first dot of the basename
_META = re.compile(r"^__[^/]*__($|/)")  # WebDataset skips these


@dataclass(frozen=True)
class Summary:
    """The first line of a sidecar."""

    version: int
    size: int  # bytes of the tar
    mtime_ns: int
    samples: int  # that have a picture or a caption
    images: int
    captions: int
    paired: int  # that have both
    damage: str | None  # what is wrong with the tar; its readable part is indexed

    @property
    def modality(self) -> Modality:
        """What the shard trains: `any` where its samples are of several kinds, and each trains what it has."""
        kinds: dict[Modality, int] = {
            "paired": self.paired,
            "image": self.images - self.paired,
            "text": self.captions - self.paired,
        }
        return next((kind for kind, count in kinds.items() if count == self.samples), "any")


@dataclass(frozen=True)
class IndexedShard:
    """A shard, its summary, and the sidecar that holds its table."""

    shard: str
    summary: Summary
    sidecar: Path

    def table(self) -> np.ndarray:
        """Structured array [samples]: `image_offset`, `image_size`, `text_offset`, `text_size`, `ids_offset`,
        `ids_size` in bytes (offset MISSING where there is none), `json` (the caption is the member's "caption" field)
        and `key` (UTF-8).

        Raises OSError where the sidecar cannot be read."""
        with open(self.sidecar, "rb") as file:
            file.readline()
            try:
                return np.load(file, allow_pickle=False)
            except (EOFError, ValueError):
                raise OSError(f"its index {self.sidecar} is damaged; delete that file") from None


def index_shards(shards: Sequence[str], store: ShardStore, progress: bool = False) -> list[IndexedShard]:
    """All shards in order, from their sidecars or indexed now: one process of a node does that, the others wait.

    Raises:
        UserError: a shard cannot be read or fetched.
    """
    found = {i: entry for i, shard in enumerate(shards) if (entry := _load(shard, store)) is not None}
    todo = [i for i in range(len(shards)) if i not in found]
    if todo:
        with store.lock("index"), ThreadPoolExecutor(_THREADS) as pool:
            made = pool.map(lambda i: _load(shards[i], store) or _make(shards[i], store), todo)
            found |= zip(todo, _bar(made, len(todo), progress))
    return [found[i] for i in range(len(shards))]


def _bar(entries: Iterator[IndexedShard], total: int, progress: bool) -> Iterable[IndexedShard]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    return track(entries, "indexing shards", total=total, console=console, transient=True, disable=hidden)


def _sidecars(shard: str, store: ShardStore) -> list[Path]:
    in_cache = store.cache_dir / "index" / (store.name(shard) + INDEX_SUFFIX)
    return [in_cache] if store.is_cached(shard) else [Path(shard + INDEX_SUFFIX), in_cache]


def _load(shard: str, store: ShardStore) -> IndexedShard | None:
    """The shard's entry if a sidecar fits it."""
    try:
        status = None if store.is_cached(shard) else os.stat(shard)
        sidecars = _sidecars(shard, store)
    except OSError as error:
        raise UserError(f"shard {shard}: cannot be read ({error.strerror})") from None
    for sidecar in sidecars:
        try:
            with open(sidecar, "rb") as file:
                summary = Summary(**json.loads(file.readline()))
        except (OSError, ValueError, TypeError):
            continue
        fits = status is None or (summary.size, summary.mtime_ns) == (status.st_size, status.st_mtime_ns)
        if fits and summary.version == VERSION:
            return IndexedShard(shard, summary, sidecar)
    return None


def _make(shard: str, store: ShardStore) -> IndexedShard:
    try:
        path = store.path(shard)
        status = os.stat(path)
        members, damage = scan_tar(path)
        with open(path, "rb") as file:
            table = _tabulate(members, file.fileno())
    except OSError as error:
        raise UserError(f"shard {shard}: cannot be read ({error.strerror or error})") from None
    has_image, has_caption = (table[name] != MISSING for name in ("image_offset", "text_offset"))
    summary = Summary(
        version=VERSION,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        samples=len(table),
        images=int(has_image.sum()),
        captions=int(has_caption.sum()),
        paired=int((has_image & has_caption).sum()),
        damage=damage,
    )
    reason: str | None = None
    for sidecar in _sidecars(shard, store):
        try:
            _write(sidecar, summary, table)
            return IndexedShard(shard, summary, sidecar)
        except OSError as error:
            reason = error.strerror
    raise UserError(f"index {sidecar}: cannot be written ({reason}); set data.cache_dir to a folder to write to")


def _write(sidecar: Path, summary: Summary, table: np.ndarray) -> None:
    handle, partial = tempfile.mkstemp(prefix=sidecar.name + ".", dir=sidecar.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(json.dumps(asdict(summary)).encode() + b"\n")
            np.save(file, table, allow_pickle=False)
        os.chmod(partial, 0o644)
        os.replace(partial, sidecar)
    except OSError:
        os.unlink(partial)
        raise


def _tabulate(members: list[Member], fd: int) -> np.ndarray:
    rows: list[tuple] = []
    for key, files in group(members):
        image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
        text, from_json = files.get("txt"), False
        if text is None and "json" in files and _has_caption(fd, files["json"]):
            text, from_json = files["json"], True
        if image or text:
            nothing = Member("", MISSING, 0)
            parts = (image or nothing, text or nothing, files.get("ids", nothing))
            rows.append((*(place for part in parts for place in (part.offset, part.size)), from_json, _clean(key)))
    width = max([1, *(len(row[-1]) for row in rows)])
    offsets = [(f"{part}_{place}", "<i8") for part in ("image", "text", "ids") for place in ("offset", "size")]
    return np.array(rows, dtype=[*offsets, ("json", "?"), ("key", f"S{width}")])


def group(members: list[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Key and members by suffix of each sample.

    Neighbours with the same key are a sample, as in WebDataset; a repeated suffix begins another one.
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
    """The "caption" text of a JSON member, None where there is none. Raises ValueError where it is no JSON."""
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    caption = content.get("caption") if isinstance(content, dict) else None
    if not isinstance(caption, str):
        return None
    caption.encode()  # JSON can hold half a surrogate pair, which is no text: a ValueError
    return caption


def _clean(key: str) -> bytes:
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in key[-_MAX_KEY:])
    return printable.encode("utf-8", "replace")[-_MAX_KEY:]
