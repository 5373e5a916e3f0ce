"""Each node has a fetcher and a cache folder. The tests simulate several nodes, and a server that counts requests."""

import contextlib
import os
import signal
import time
from itertools import chain

import numpy as np
import psutil
import pytest

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import SourceConfig
from m3ae_fast.data import ShardStore
from m3ae_fast.data.fetcher import Fetcher
from m3ae_fast.data.manifest import KINDS, prepare, rows_of, write
from m3ae_fast.process.ranks import Node
from tests.data.test_manifest import together
from tests.helpers.shards import members, write_tar
from tests.helpers.waiting import until
from tests.soak.server import faulty_server

pytestmark = pytest.mark.slow

SHARDS, PER, BATCH, LANES = 96, 16, 32, 16
STEPS = SHARDS * PER // BATCH  # number of steps in an epoch


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    paths = [write_tar(folder / f"{i:02}.tar", members(range(i * PER, i * PER + PER), "text")) for i in range(SHARDS)]
    return folder, os.path.getsize(paths[0])


@pytest.fixture(params=[0.0])
def remote_shards(request, shards, tmp_path, monkeypatch):
    """Yield (list of one source, whose manifest names shards behind a URL; Counter of the served paths; bytes of a
    shard). The parameter is the fraction of requests that fail."""
    folder, size = shards
    monkeypatch.setattr("m3ae_fast.data.shard_store.retry_after", lambda *_: 0.01)
    with faulty_server(folder, 0, request.param) as server:
        names = [f"{server.url}/{i:02}.tar" for i in range(SHARDS)]
        write(tmp_path / "far.npy", rows_of(names, [(PER, size, KINDS.index("text"))] * SHARDS))
        yield [SourceConfig(shards=str(tmp_path / "far.npy"))], server.served, size
        assert bool(server.failures) == bool(request.param)


@pytest.fixture
def start(load, remote_shards, tmp_path):
    """Return a function start(number, world, cache_gb=..., ...), which returns the loader of a node with one rank."""

    def build(number, world, cache_gb=None, folder="node{}", **options):
        store = ShardStore(tmp_path / folder.format(number), cache_gb)
        options = {"steps": STEPS, "config": {"lanes": LANES, "shuffle_shards": LANES}} | options
        return load(remote_shards[0], global_batch=BATCH, rank=number, world=world, at=store, **options)

    return build


def bytes_in_cache(loader):
    copies = loader.dataset.corpus.store.cache_dir / "shards"
    found = 0
    for entry in os.scandir(copies):
        with contextlib.suppress(FileNotFoundError):
            found += entry.stat().st_size
    return found


def required_shards_are_cached(loader):
    """Return whether the shards that a node must have downloaded at this step are in its cache."""
    needs, steps = loader.companion.schedule, loader.companion._steps
    return all(needs.corpus.store.copy(shard.name).exists() for shard in needs.near(needs.span(steps)))


def epoch(loaders):
    """Return the keys of each step of some nodes, whose steps take longer than a download."""
    batches = [iter(loader) for loader in loaders]
    for _ in range(len(loaders[0])):
        until(lambda: all(map(required_shards_are_cached, loaders)))
        keys = list(chain.from_iterable(next(each).keys for each in batches))
        assert all(bytes_in_cache(loader) <= loader.dataset.corpus.store.limit for loader in loaders)
        yield sorted(keys)
    end(*loaders)


def end(*loaders):
    for loader in loaders:
        loader.companion.end()


@pytest.mark.parametrize("remote_shards", [0.0, 0.5], indirect=True)
def test_nodes_download_each_shard_once_within_their_disk_limit(start, remote_shards):
    _, requests, size = remote_shards
    loaders = [start(number, 4, 11 * size / 1e9) for number in range(4)]
    seen = list(chain.from_iterable(epoch(loaders)))
    assert len(seen) == len(set(seen)) == SHARDS * PER
    assert SHARDS <= sum(requests.values()) <= 1.05 * SHARDS
    assert max(map(bytes_in_cache, loaders)) > 6 * size


def test_the_first_shuffle_windows_are_downloaded_before_the_first_step(start, remote_shards):
    loader = start(0, 2)
    iter(loader)
    until(lambda: required_shards_are_cached(loader) and sum(remote_shards[1].values()) == LANES // 2)
    time.sleep(0.5)
    assert sum(remote_shards[1].values()) == LANES // 2
    end(loader)


def test_a_second_epoch_downloads_nothing_if_all_shards_fit_into_the_cache(start, remote_shards):
    _, requests, _ = remote_shards
    loader = start(1, 4, steps=3 * STEPS)
    steps = epoch([loader])
    for _ in range(STEPS):
        next(steps)
    assert sum(requests.values()) == 24
    assert len(list(steps)) == 2 * STEPS
    assert sum(requests.values()) == 24


def test_the_samples_are_the_same_after_the_loss_of_a_node(start, remote_shards):
    """The cached shards of the other nodes are lost too, which is the worst case."""
    _, requests, size = remote_shards
    known = list(epoch([start(0, 1, folder="whole")]))
    requests.clear()
    found = []
    for nodes, steps in ((4, range(STEPS // 2)), (3, range(STEPS // 2, STEPS))):
        options = {"folder": f"of{nodes}-{{}}", "start_step": steps.start, "steps": steps.stop}
        found += epoch([start(number, nodes, 16 * size / 1e9, **options) for number in range(nodes)])
    assert found == known
    assert sum(requests.values()) <= 1.3 * SHARDS


def test_no_sample_is_lost_if_the_fetcher_is_killed(start, remote_shards):
    _, requests, size = remote_shards
    loader = start(0, 2, 24 * size / 1e9, config={"lanes": LANES, "shuffle_shards": LANES, "workers": 1})
    batches = iter(loader)
    seen = list(next(batches).keys)
    os.kill(loader.companion.process.pid, signal.SIGKILL)
    loader.companion.process.join()
    for batch in batches:
        assert not batch.skipped and bytes_in_cache(loader) <= 24 * size
        seen += batch.keys
    assert len(seen) == len(set(seen)) == SHARDS * PER // 2
    assert sum(requests.values()) <= 1.05 * SHARDS / 2 + 4  # 4 were being downloaded when the fetcher died


def test_the_fetcher_exits_with_the_run(start, tmp_path):
    pids, other = os.pipe()
    child = os.fork()
    if not child:
        loader = start(0, 1)
        loader.companion.begin()
        os.write(other, loader.companion.process.pid.to_bytes(4, "little"))
        os._exit(0)
    os.waitpid(child, 0)
    pid = int.from_bytes(os.read(pids, 4), "little")
    until(lambda: not psutil.pid_exists(pid))
    assert not list((tmp_path / "node0/locks").glob("steps-*"))


def test_the_fetcher_ends_with_the_iterator(start, tmp_path):
    loader = start(0, 1)
    batches = iter(loader)
    next(batches)
    assert loader.companion.process.is_alive()
    del batches
    assert not loader.companion.process.is_alive() and not list((tmp_path / "node0/locks").glob("steps-*"))


def test_ranks_of_a_node_share_one_fetcher(start):
    """The fetcher waits for the slower rank."""
    loaders = [start(rank, 2, folder="same", node=Node("run", [0, 1])) for rank in (0, 1)]
    assert [loader.companion.schedule.lanes for loader in loaders] == [list(range(LANES))] * 2
    for loader in loaders:
        iter(loader)
    assert loaders[0].companion.process.is_alive() and loaders[1].companion.process is None
    batches = iter(loaders[0])
    for _ in range(3):
        next(batches)
    steps = loaders[1].companion._steps
    assert list(steps) == [3, 0]
    span = loaders[1].companion.schedule.span(steps)
    assert span.first == 0 and span.end > 3 * BATCH and not span.begun
    end(loaders[0])


def test_the_fetcher_also_indexes_downloaded_shards(start):
    needs = start(0, 4).companion.schedule
    store, span = needs.corpus.store, needs.span(np.zeros(1, np.int64))
    fetcher = Fetcher(needs)
    until(lambda: fetcher.update(span) or fetcher.wait() or not fetcher._busy)
    near = [shard.name for shard in needs.near(span)]
    assert len(near) == 4 and all(store.copy(name).exists() for name in near)
    assert len(list((store.cache_dir / "index").iterdir())) == 4


def test_a_failed_download_is_not_retried_continuously(start, remote_shards, tmp_path):
    rows = np.load(tmp_path / "far.npy")
    rows["name"] = np.char.replace(rows["name"], b".tar", b".gone")
    write(tmp_path / "far.npy", rows)
    needs = start(0, 4).companion.schedule
    fetcher = Fetcher(needs)
    for _ in range(3):
        fetcher.update(needs.span(np.zeros(1, np.int64)))
        until(lambda: fetcher.wait() or not fetcher._busy)
    assert sorted(remote_shards[1].values()) == [1] * 4


def test_a_cache_that_is_too_small_is_refused(start, remote_shards):
    with pytest.raises(
        UserError, match=r"data\.cache_gb 6\.144e-05: the shards that a node uses at once take 8\.19e-05 GB"
    ):
        start(0, 4, 3 * remote_shards[2] / 1e9)


def test_shards_downloaded_to_count_samples_are_reused_for_training(start, remote_shards, tmp_path):
    """Counting the samples and training for an epoch together request each shard once."""
    manifest, requests, _ = remote_shards
    names = [name.decode() for name in np.load(manifest[0].shards)["name"].tolist()]
    stores = [ShardStore(tmp_path / f"node{number}") for number in range(4)]
    work = lambda ranks, node: prepare(names, stores[node], ranks)  # noqa: E731
    assert together(4, 4, work) == [None] * 4
    assert sum(requests.values()) == SHARDS
    manifest[0] = SourceConfig(shards=names)
    seen = list(chain.from_iterable(epoch([start(number, 4) for number in range(4)])))
    assert len(seen) == len(set(seen)) == SHARDS * PER
    assert sum(requests.values()) <= 1.05 * SHARDS
