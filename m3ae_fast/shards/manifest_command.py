"""manifest: what many shards hold, in one file that a run opens at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.base.untrusted_file import parse_json
from m3ae_fast.data.download import read_small
from m3ae_fast.data.index import index_shards
from m3ae_fast.data.manifest import KINDS, SUFFIX, UNREAD, count, part_of, rows_of, write
from m3ae_fast.data.shards import ShardStore, expand

_THREADS = 32
_MAX_BYTES = 1 << 26  # of a file of counts


def run(args: argparse.Namespace) -> None:
    number, parts = _part(args.part)
    out = args.out if parts == 1 else args.out.with_suffix(f".part-{number + 1:04d}-of-{parts:04d}{SUFFIX}")
    names, store = part_of(expand(args.shards), number, parts), ShardStore(args.cache_dir)
    if args.stats or args.sizes:
        rows = _known(names, _sizes(args.sizes) if args.sizes else _stats, store)
    else:
        rows, lost = count(names, store, progress=True)
        for item in lost:
            print(f"note: {item}")
    write(out, rows)
    unread = int((rows["kind"] == UNREAD).sum())
    print(f"{out}: {len(rows):,} shards with {int(rows['samples'].sum(dtype=np.int64)):,} samples, {unread:,} not read")


def _part(text: str | None) -> tuple[int, int]:
    """Return a part's number, from 0, and how many there are."""
    if text is None:
        return 0, 1
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise UserError(f"--part {text}: must be I/N, such as 1/8, with I from 1 to N")
    return int(number) - 1, int(parts)


def _known(names: Sequence[str], samples_of: Callable[[str], int], store: ShardStore) -> np.ndarray:
    """Return the rows of shards whose counts are known, all of the first one's kind."""
    with ThreadPoolExecutor(_THREADS) as pool:
        samples = list(track(pool.map(samples_of, names), "reading counts", len(names)))
    some = [name for name, found in zip(names, samples) if found][:1]
    kind = KINDS.index(index_shards(some, store)[0].summary.modality) if some else 0
    return rows_of(names, [(found, 0, kind) for found in samples])


def _stats(shard: str) -> int:
    """Return the samples that img2dataset says it wrote into a shard."""
    before, _, after = shard.rpartition(".tar")
    name = f"{before}_stats.json{after}"
    return _whole(_json(name).get("successes"), f"{name}: successes")


def _sizes(name: str) -> Callable[[str], int]:
    sizes = _json(name)
    return lambda shard: _whole(sizes.get(_file(shard)), f"{name}: {shard}")


def _file(shard: str) -> str:
    """Return the name of the tar in a path, a URL or a command."""
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
        raise UserError(f"{what}: says {value!r}, not a number of samples")
    return value
