"""Image sizes from file headers, so that work can be balanced between ranks before any image is decoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from m3ae_fast.base.atomic_file import atomic_write
from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.data.corpus import Corpus
from m3ae_fast.data.index import MAX_IMAGE_BYTES, MISSING, IndexedShard
from m3ae_fast.data.shard_names import INDEX_SUFFIX
from m3ae_fast.images.decoding import size_of

_HEAD = 1 << 14  # number of bytes that is sufficient for most headers
_MAX_SIDE = (1 << 31) - 1
_THREADS = 8


def measured(corpus: Corpus, *, progress: bool = False) -> Corpus:
    """Return the dataset with `Source.image_sizes` filled in. The dataset is returned unchanged if some of its shards
    are listed in a manifest or copied to the cache before they are read, because their image sizes are not known in
    advance.

    The sizes of a shard are cached in a file next to its index. The file is created on first use and renewed when the
    shard changes.
    """
    shards = [(number, shard) for number, source in enumerate(corpus.sources) for shard in source.indexed]
    if len(shards) < sum(len(source.shards) for source in corpus.sources):
        return corpus
    if any(corpus.store.is_staged(shard.shard) for _, shard in shards):
        return corpus
    found: list[list[np.ndarray]] = [[] for _ in corpus.sources]
    with ThreadPoolExecutor(_THREADS) as pool:
        each = pool.map(_sizes_of, [shard for _, shard in shards])
        for (number, _), sizes in zip(shards, track(each, "reading image sizes", len(shards), show=progress)):
            found[number].append(sizes)
    sources = [replace(source, image_sizes=np.concatenate(own)) for source, own in zip(corpus.sources, found)]
    return replace(corpus, sources=sources)


def _sizes_of(shard: IndexedShard) -> np.ndarray:
    """Return the height and width of each sample's image, int32 [samples, 2]; both are 0 if there is no image or its
    size is unknown."""
    path = shard.sidecar.with_name(shard.sidecar.name.removesuffix(INDEX_SUFFIX) + ".sizes" + INDEX_SUFFIX)
    identity = [shard.summary.size, shard.summary.mtime_ns]
    sizes = _kept(path, identity, shard.summary.samples)
    if sizes is None:
        sizes = _read(shard)
        with suppress(UserError), atomic_write(path) as partial, open(partial, "wb") as file:
            np.save(file, np.array([identity, *sizes.tolist()], dtype=np.int64))
    return sizes


def _kept(path: Path, identity: Sequence[int], samples: int) -> np.ndarray | None:
    """Return the cached sizes; None if the file belongs to another version of the shard or is damaged."""
    try:
        with open_regular(path) as file:
            rows = np.lib.format.read_array(file, allow_pickle=False)
    except Exception:  # NumPy's parser raises many kinds of errors for foreign headers
        return None
    fits = rows.dtype == np.int64 and rows.shape == (samples + 1, 2) and rows[0].tolist() == identity
    return rows[1:].astype(np.int32) if fits and (rows[1:] == np.clip(rows[1:], 0, _MAX_SIDE)).all() else None


def _read(shard: IndexedShard) -> np.ndarray:
    sizes = np.zeros((shard.summary.samples, 2), dtype=np.int32)
    # later, the samples of unreadable shards are counted as bad samples
    with suppress(OSError), open(shard.shard, "rb") as file:
        table = shard.table()
        for row in np.flatnonzero(table["image_offset"] != MISSING).tolist():
            offset, length = (int(table[name][row]) for name in ("image_offset", "image_size"))
            for most in sorted({min(length, _HEAD), min(length, MAX_IMAGE_BYTES)}):
                with suppress(BadSample):
                    sizes[row] = size_of(os.pread(file.fileno(), most, offset))
                    break
    return sizes
