"""Benchmark of manifests and of the sample order for datasets of up to two billion samples: the time and the memory
needed to open a manifest and to find samples in it, in the main process and in a loader worker."""

import json
import multiprocessing
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import results
from m3ae_fast.config import SourceConfig
from m3ae_fast.data import Data, Layout, ShardStore, open_corpus
from m3ae_fast.data.fetcher import PrefetchSchedule
from m3ae_fast.data.fingerprint import fingerprint
from m3ae_fast.data.manifest import KINDS, rows_of, write
from m3ae_fast.data.order import Order
from m3ae_fast.data.reader import Reader

# number of shards, and samples per shard
CORPORA = {"CC12M": (1243, 9990), "LAION-400M": (41_408, 9660), "LAION-2B": (231_349, 9000)}
LANES, STEPS, ROWS_OF_STEP = 64, 20, 64
ROWS: list[results.Row] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    if ROWS:
        results.write("order", f"Manifest and sample order of {LANES} lanes", ROWS)


def resident() -> float:
    """Return the resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def private() -> float:
    """Return the memory of this process in MB that is not shared with other processes."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"Private_\w+:\s+(\d+)", text)) / 1e3


def opened(path: str, cache: str, out: str) -> None:
    """Open a manifest as a rank that reads all lanes, find samples there and in a forked worker, and write the
    measurements to `out`."""
    store, before, start = ShardStore(Path(cache)), resident(), time.process_time()
    corpus = open_corpus([SourceConfig(shards=path)], store)
    (source,) = corpus.sources
    order, reader = Order([source.sizes], None, 2, 42, LANES), Reader(source, store)
    found = {"open, s": time.process_time() - start, "MB": resident() - before}
    if os.fork():
        os.wait()
        start = time.process_time()
        fingerprint(Data(corpus, None, None), Layout(LANES, 2))
        PrefetchSchedule(corpus, order, range(LANES), 0, 1, 4096, 0).require_space()
        begin = {"remaining start-up, s": time.process_time() - start}
        Path(out).write_text(json.dumps(json.loads(Path(out).read_text()) | begin))
        return
    positions = range(10**6, 10**6 + STEPS * ROWS_OF_STEP * LANES)
    for position in positions:
        reader.find(order.locate(position).sample)
    start = time.process_time()
    for position in positions:
        order.locate(position)
    found["to find a sample, us"] = (time.process_time() - start) / len(positions) * 1e6
    Path(out).write_text(json.dumps(found | {"a worker's own MB": private()}))
    os._exit(0)


def test_order(benchmark, tmp_path):
    for name, (shards, samples) in CORPORA.items():
        sizes = np.random.default_rng(0).integers(int(samples * 0.95), int(samples * 1.05), shards)
        path, out = tmp_path / f"{name}.npy", tmp_path / name
        kind = KINDS.index("paired")
        write(
            path, rows_of([f"s3://bucket/{i:06d}.tar" for i in range(shards)], [(n, 0, kind) for n in sizes.tolist()])
        )

        def run(path=path, out=out) -> None:
            process = multiprocessing.get_context("spawn").Process(
                target=opened, args=(str(path), str(tmp_path / "cache"), str(out))
            )
            process.start()
            process.join()

        benchmark.pedantic(run, rounds=1) if name == "LAION-2B" else run()
        ROWS.append({"corpus": name, "shards": shards, **json.loads(out.read_text())})
    small, *_, large = ROWS
    assert large["open, s"] < 0.5 and large["MB"] < 50 and large["to find a sample, us"] < 10
    assert large["remaining start-up, s"] < 15
    assert large["a worker's own MB"] - small["a worker's own MB"] < 20
