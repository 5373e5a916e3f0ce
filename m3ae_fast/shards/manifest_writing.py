"""Writing of manifests, which contain the sample counts of many shards; see `data.manifest`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.base.untrusted_file import parse_json
from m3ae_fast.data.download import read_small
from m3ae_fast.data.index import index_shards
from m3ae_fast.data.manifest import KINDS, SUFFIX, UNREAD, count, part_of, rows_of, write
from m3ae_fast.data.shard_store import ShardStore, expand

_THREADS = 32
_MAX_BYTES = 1 << 26  # maximum number of bytes of a file with sample counts


class WrittenManifest(NamedTuple):
    """The result of writing a manifest."""

    path: Path
    shards: int
    samples: int
    unread: int  # number of shards that cannot be read
    notes: list[str]  # notes about unreadable shards


def manifest(
    shards: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    part: tuple[int, int] | None = None,
    stats: bool = False,
    sizes: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> WrittenManifest:
    """Count the samples of shards and write a manifest, which can be used as `shards` of a source in the config.

    Args:
        shards: paths, brace patterns, globs, URLs or pipe: commands.
        out: the .npy file to write.
        part: (i, n), with i from 1 to n, to count only the i-th of n parts of the shards. In this case, .part-... is
            added to the file name of `out`, before the suffix.
        stats: whether to use the counts in img2dataset's NAME_stats.json files instead of reading the shards.
        sizes: a sizes.json file or URL with the counts, which are used instead of reading the shards.
        cache_dir: cache folder for copies of remote shards; None: ~/.cache/m3ae_fast.

    Raises:
        UserError: an argument is invalid, no shard can be read, or `out` cannot be written.
    """
    path = Path(out)
    number, parts = part or (1, 1)
    if not 1 <= number <= parts:
        raise UserError(f"--part {number}/{parts}: must be I/N, such as 1/8, with I from 1 to N")
    if parts > 1:
        path = path.with_suffix(f".part-{number:04d}-of-{parts:04d}{SUFFIX}")
    names, store, notes = part_of(expand(shards), number - 1, parts), ShardStore(cache_dir), []
    if stats or sizes is not None:
        rows = _known(names, _stats if sizes is None else _sizes(os.fspath(sizes)), store)
    else:
        rows, lost = count(names, store, progress=True)
        notes = list(map(str, lost))
    write(path, rows)
    samples, unread = int(rows["samples"].sum(dtype=np.int64)), int((rows["kind"] == UNREAD).sum())
    return WrittenManifest(path, len(rows), samples, unread, notes)


def _known(names: Sequence[str], samples_of: Callable[[str], int], store: ShardStore) -> np.ndarray:
    """Return the manifest rows of shards with known counts. The modality is read from the first shard that is not empty
    and used for all shards."""
    with ThreadPoolExecutor(_THREADS) as pool:
        samples = list(track(pool.map(samples_of, names), "reading counts", len(names)))
    some = [name for name, found in zip(names, samples) if found][:1]
    kind = KINDS.index(index_shards(some, store)[0].summary.modality) if some else 0
    return rows_of(names, [(found, 0, kind) for found in samples])


def _stats(shard: str) -> int:
    """Return the number of samples in a shard according to img2dataset's statistics."""
    before, _, after = shard.rpartition(".tar")
    name = f"{before}_stats.json{after}"
    return _whole(_json(name).get("successes"), f"{name}: successes")


def _sizes(name: str) -> Callable[[str], int]:
    sizes = _json(name)
    return lambda shard: _whole(sizes.get(_file(shard)), f"{name}: {shard}")


def _file(shard: str) -> str:
    """Return the file name of the tar in a path, URL or command."""
    words = [word for word in shard.split() if ".tar" in word] or [shard]
    return words[-1].rpartition("/")[2]


def _json(name: str) -> dict[str, Any]:
    try:
        content = parse_json(read_small(name, _MAX_BYTES).decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: is not a JSON object")
    return content


def _whole(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise UserError(f"{what}: must be a number of samples, but is {value!r}")
    return value
