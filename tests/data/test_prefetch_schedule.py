"""The shards that a node requires, and the times at which it requires them, compared with counts by hand. No shard is
downloaded."""

import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from m3ae_fast.base.errors import UserError
from m3ae_fast.data import fetcher as fetcher_module
from m3ae_fast.data.fetcher import CONNECTIONS, Fetcher, FetcherOfNode
from m3ae_fast.data.order import Order
from m3ae_fast.data.prefetch_schedule import PrefetchSchedule, Span
from m3ae_fast.data.shard_store import CacheSpace
from m3ae_fast.process.ranks import Node


class Store:
    """An empty cache, into which nothing can be downloaded."""

    def __init__(self, folder, limit=math.inf, largest=0, used=0):
        self.cache_dir, self.limit, self.largest, self.used = folder, limit, largest, used
        self.asked, self.kept, self.staging = [], [], False

    def space(self):
        return CacheSpace(self.limit, self.used, self.largest)

    def is_staged(self, shard):
        return True

    def copy(self, name):
        return Path("/nowhere", name)

    def keep(self, names):
        self.kept.append(names)

    def fetch_ahead(self, name, size):
        self.asked.append(name)
        return False


@pytest.fixture
def needs(tmp_path):
    """Return a function needs(size=..., ...), which returns the schedule of 12 shards with 10 samples each; two shards
    are shuffled together. `store`: see `Store`."""

    def build(size=5, start=0, stop=12, positions=10.0, ahead=0, lanes=1, **store):
        entries = [SimpleNamespace(shard=f"{i}.tar", summary=SimpleNamespace(size=size)) for i in range(12)]
        corpus = SimpleNamespace(store=Store(tmp_path, **store), sources=[SimpleNamespace(shards=entries)])
        order = Order([[10] * 12], None, 2, 0, lanes)
        return PrefetchSchedule(corpus, order, range(lanes), start, stop, positions, ahead)

    return build


def test_the_span_begins_at_the_slowest_rank_and_ends_where_the_fastest_rank_has_prefetched(needs):
    built = needs(start=10, stop=20, positions=2.5, ahead=3)
    for steps, span in (
        ([0, 0], Span(25, 35, False)),  # no rank has begun; the end is (10 + 1 + 3) * 2.5
        ([10, 14], Span(25, 45, False)),
        ([11, 14], Span(27, 45, True)),  # step 11 begins at 27.5, within position 27
        ([13, 13], Span(32, 43, True)),  # the end is (13 + 1 + 3) * 2.5 = 42.5, rounded up
        ([12, 18], Span(30, 50, True)),  # the run ends
    ):
        assert built.span(np.array(steps)) == span


def test_the_following_windows_are_downloaded_after_the_first_step_but_not_beyond_the_end_of_the_run(needs):
    whole = needs()
    windows = [[f"{shard}.tar" for shard in need.shards] for need in whole.order.upcoming_windows([0], 0, 1)[0]]

    def near(built, span):
        return [shard.name for shard in built.near(span)]

    assert [near(whole, Span(0, 10, begun)) for begun in (False, True)] == [windows[0], windows[0] + windows[1]]
    found = near(whole, Span(15, 25, True))
    assert sorted(found[:4]) == sorted(windows[0] + windows[1]) and found[4:] == windows[2]  # two windows are in use
    assert near(needs(stop=2), Span(0, 10, True)) == windows[0]  # the run ends with the window
    assert near(needs(stop=3), Span(0, 10, True)) == windows[0] + windows[1]


def test_a_shard_of_unknown_size_counts_as_the_largest_copy(needs):
    span = Span(15, 25, True)  # contains six shards
    for size, largest, limit, fit in ((5, 0, 20, 4), (5, 90, 19, 3), (0, 10, 39, 3), (0, 0, 39, 6), (0, 10, 9, 0)):
        assert len(needs(size, largest=largest, limit=limit).near(span)) == fit


def test_the_cache_must_hold_one_shuffle_window_of_each_lane(needs):
    assert (needs(5).in_use(), needs(5).owned()) == (10, 60)
    assert 4 * 5 <= needs(5, lanes=4).in_use() <= 4 * 10 and needs(5, lanes=4).owned() == 60
    needs(5, limit=10).require_space()
    with pytest.raises(UserError, match=r"or lower data\.shuffle_shards"):
        needs(5, limit=9).require_space()


def test_ranks_report_steps_rather_than_micro_batches(needs, tmp_path):
    """The second rank of the node does not start a fetcher, and reports its step in its own element of the shared
    array."""
    (tmp_path / "locks").mkdir()
    fetching = FetcherOfNode(needs(start=7), Node("run", [4, 5]), 5, accumulation=3)
    fetching.begin()
    assert list(fetching._steps) == [0, 7]
    assert [int(fetching._steps[1]) for _ in fetching.watch(iter(range(7)))] == [7, 7, 8, 8, 8, 9, 9]
    assert fetching._steps[0] == 0


def test_a_failed_download_is_retried_after_a_while(needs, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(fetcher_module, "_CHECK_S", 0.001)
    monkeypatch.setattr(fetcher_module, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))
    built = needs()
    fetcher, asked = Fetcher(built), built.corpus.store.asked
    for now, times in ((0.0, 1), (30.0, 1), (59.0, 1), (61.0, 2), (119.0, 2), (125.0, 3)):
        clock[0] = now
        fetcher.update(Span(0, 10, False))
        while fetcher._busy:
            fetcher.wait()
        assert sorted(asked) == sorted([shard.name for shard in built.near(Span(0, 10, False))] * times)


@pytest.mark.parametrize("used", [0, 1])
def test_the_order_of_eviction_is_set_only_if_further_downloads_might_exceed_the_limit(needs, used):
    """The order is stored as the modification times of the copies. It is not set again while the same shards are
    required."""
    built = needs(limit=7 * CONNECTIONS, largest=7, used=used)
    fetcher = Fetcher(built)
    for span in (Span(0, 10, False), Span(1, 11, False)):
        fetcher.update(span)
    kept = built.corpus.store.kept
    assert len(kept) == used and all(names == [shard.name for shard in built.next(span)] for names in kept)
    fetcher._pool.shutdown()
