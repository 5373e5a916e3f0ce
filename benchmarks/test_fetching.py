"""Benchmark of downloading: the fraction of the time that the quickstart waits for data if its shards are remote and
only half of them fit into the cache."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.alone import ENVIRONMENT
from benchmarks.shards import make_shards
from lab.soak.server import faulty_server
from m3ae_fast.data.manifest import KINDS, rows_of, write

ROOT = Path(__file__).parents[1]
SHARDS, PER, LANES, STEPS, WARM = 64, 64, 8, 60, 10
FITTING = 34  # number of shards that fit: those of two windows of each lane, and a few that are being downloaded
LATENCY_S, FAULTS = 0.05, 0.2
ROWS: list[results.Row] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    if ROWS:
        shards = f"{SHARDS} remote shards, of which {FITTING} fit on the disk"
        title = f"Training of the quickstart's model after step {WARM}, on {shards}"
        results.write("fetching", title, ROWS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, SHARDS, SHARDS * PER, (160, 200), vocab=2048, words=(8, 8))
    return folder


def train(folder: Path, source: str, shards: Path, *options: str) -> tuple[float, float]:
    """Train, and return samples/s and the fraction of the time that is spent waiting for data."""
    options += (
        f"run.dir={folder}",
        f"train.steps={STEPS}",
        f"train.log_every={WARM}",
        "train.pictures=0",
        "data.val=[]",
    )
    options += (f"data.lanes={LANES}", f"data.shuffle_shards={LANES}", f"data.tokenizer={shards}/vocab.txt")
    options += (f"data.train={json.dumps([{'shards': source}])}",)
    command = [sys.executable, str(ROOT / "m3ae_fast/train.py"), "--config", "configs/quickstart.json"]
    command += [word for option in options for word in ("--set", option)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | ENVIRONMENT)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    warm = [line for line in lines if "data_wait" in line and line["step"] > WARM]
    return tuple(statistics.median(line[name] for line in warm) for name in ("samples_per_s", "data_wait"))


def test_remote_shards_cause_little_data_wait(benchmark, shards, tmp_path):
    """The remote shards are compared with the same shards on a local disk."""
    sizes = [(PER, (shards / f"{number}.tar").stat().st_size, KINDS.index("paired")) for number in range(SHARDS)]
    cache_gb = FITTING * max(size for _, size, _ in sizes) / 1e9
    with faulty_server(shards, 0, FAULTS, LATENCY_S) as server:
        names = [f"{server.url}/{number}.tar" for number in range(SHARDS)]
        write(tmp_path / "far.npy", rows_of(names, sizes))
        cache = (f"data.cache_gb={cache_gb}", f"data.cache_dir={tmp_path / 'cache'}")
        near = train(tmp_path / "near", f"{shards}/{{0..{SHARDS - 1}}}.tar", shards)
        far = benchmark.pedantic(lambda: train(tmp_path / "far", str(tmp_path / "far.npy"), shards, *cache), rounds=1)
        gets, failures = sum(server.served.values()), sum(server.failures.values())
    remote = f"HTTP, {1e3 * LATENCY_S:.0f} ms latency, {FAULTS:.0%} faults"
    for where, (speed, share) in (("local disk", near), (remote, far)):
        ROWS.append({"shards from": where, "samples/s": speed, "time waiting for data": f"{share:.1%}"})
    ROWS[0] |= {"fetched shards": 0, "failed requests": 0}
    ROWS[1] |= {"fetched shards": gets, "failed requests": failures}
    assert far[1] < 0.02
