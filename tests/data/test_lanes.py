"""The sample order with lanes: the samples, the ranks that read them, and their shards."""

import hashlib
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from m3ae_fast.config import DataConfig
from m3ae_fast.data import Share, lay_out
from m3ae_fast.data.lane_count import Layout
from m3ae_fast.data.order import LANE_BLOCK, Order
from m3ae_fast.data.rank_share import MicroBatches

WORLDS = (1, 2, 3, 8, 48, 63, 64, 100, 504, 512)
CORPORA = {"12 M": (1243, 9990), "400 M": (41_408, 9660), "2 B": (231_349, 9000)}  # number of shards, samples per shard


def layout(sizes, global_batch, **config):
    return lay_out(DataConfig(train=[{"shards": "none.tar"}], **config), sizes, global_batch)


def corpus(name):
    shards, samples = CORPORA[name]
    return np.random.default_rng(0).integers(int(samples * 0.95), int(samples * 1.05), shards)


def fetched(sizes, lanes, nodes):
    """Return the number of shards that all nodes download in an epoch, divided by the number of shards."""
    order, batch = Order([sizes], None, 2, 42, lanes), 4096
    total = 0
    for node in range(nodes):
        (positions,) = MicroBatches(range(1), Share(batch, rank=node, world=nodes), lanes)
        own = {position % lanes for position in positions}
        total += len(set(chain.from_iterable(order._lane(lane).sources[0].pieces.shards.tolist() for lane in own)))
    return total / len(sizes)


@pytest.mark.parametrize(("lanes", "nodes", "most"), [
    (64, 1, 1), (64, 8, 1.06), (64, 64, 1.06), (64, 48, 2.05), (64, 63, 2.05), (512, 48, 1.2), (512, 63, 1.2),
])  # fmt: skip
def test_few_shards_are_read_by_more_than_one_node(lanes, nodes, most):
    assert 1 <= fetched(corpus("400 M"), lanes, nodes) <= most


@pytest.mark.parametrize("nodes", [8, 64])
def test_few_shards_of_small_and_large_datasets_are_read_by_more_than_one_node(nodes):
    assert 1 <= fetched(corpus("12 M"), 64, nodes) <= 1.06
    assert 1 <= fetched(corpus("2 B"), 64, nodes) <= 1.06


@pytest.mark.parametrize(("sizes", "lanes"), [([5, 1, 0, 30, 7, 2], 3), ([1] * 9, 9), ([100], 7), ([13, 21, 34], 1)])
def test_a_lane_shows_each_of_its_samples_once_per_epoch(sizes, lanes):
    order = Order([sizes], None, 2, 5, lanes)
    owned = []
    for lane in range(lanes):
        length = order._lane(lane).samples
        epochs = [[order.locate((e * length + i) * lanes + lane) for i in range(length)] for e in range(3)]
        for number, places in enumerate(epochs):
            assert {place.epoch for place in places} == {number}
            assert sorted(place.sample for place in places) == sorted(place.sample for place in epochs[0])
        owned += [place.sample for place in epochs[0]]
        assert abs(length - sum(sizes) / lanes) < 1
        if length > 9:
            assert len({tuple(places) for places in epochs}) == 3
    assert sorted(owned) == list(range(sum(sizes)))


# 1: an epoch of a lane is shorter than a block; 10: it has several blocks, of which the last is incomplete
@pytest.mark.parametrize("scale", [1, 10])
def test_an_epoch_contains_every_sample_of_every_source_once(scale):
    """The sizes of the sources are multiples of the number of lanes."""
    sizes = [[scale * samples for samples in source] for source in ([40, 24], [8], [16, 16, 16])]
    order, total = Order(sizes, None, 2, 0, lanes=8), 120 * scale
    for epoch in range(3):
        found = [order.locate(position) for position in range(epoch * total, (epoch + 1) * total)]
        everything = Counter((source, n, epoch) for source, shards in enumerate(sizes) for n in range(sum(shards)))
        assert Counter((place.source, place.sample, place.epoch) for place in found) == everything


def test_source_weights_are_exact_in_every_lane():
    order = Order([[5000, 3000], [640]], [0.9, 0.1], 2, 0, lanes=16)
    for lane in range(16):
        places = [order.locate(index * 16 + lane) for index in range(3000)]
        small = [place for place in places if place.source == 1]
        assert len(small) == pytest.approx(300, abs=7)  # a tenth of 3,000 samples; the source is in its eighth epoch
        assert [place.epoch for place in small] == sorted(place.epoch for place in small)
        assert len(set(small)) == len(small)
    steps = [[order.locate(p).source for p in range(first, first + 512)] for first in range(0, 16_000, 512)]
    assert np.std([np.mean(step) for step in steps]) < 0.008  # random samples would have 0.013
    assert np.mean(steps) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(("batch", "lanes", "repeats"), [(4096, 64, 1), (4096, 64, 4), (600, 50, 3), (512, 1, 1)])
def test_the_samples_of_a_step_do_not_depend_on_the_ranks(batch, lanes, repeats):
    sizes = corpus("12 M")[:400]
    step = range(1000, 1001)
    everything = range(1000 * batch, 1001 * batch)
    whole = Order([sizes], None, 2, 1, lanes)
    known = [whole.locate(position // repeats) for position in everything]
    for world in filter(lambda world: world <= batch, WORLDS):
        found = []
        for rank in range(world):
            parts = list(MicroBatches(step, Share(batch, 3, rank, world), lanes, repeats))
            assert len(parts) == 3 and max(map(len, parts)) - min(map(len, parts)) <= 1
            own = list(chain.from_iterable(parts))
            assert len(own) in (batch // world, -(-batch // world))
            if rank == world // 2:  # a new order object, which has not computed other lanes
                order = Order([sizes], None, 2, 1, lanes)
                assert all(order.locate(p // repeats) == known[p - everything[0]] for p in own[:99])
            found += own
        assert sorted(found) == list(everything)


@pytest.mark.parametrize(("batch", "world", "parts"), [(12, 1, 1), (12, 5, 1), (13, 2, 3), (7, 7, 1), (64, 9, 2)])
def test_the_largest_micro_batch_has_the_expected_size(batch, world, parts):
    shares = [Share(batch, parts, rank, world) for rank in range(world)]
    largest = max(len(positions) for share in shares for positions in MicroBatches(range(2), share))
    assert {share.micro_batch for share in shares} == {largest}


@pytest.mark.parametrize(
    ("batch", "world", "lanes", "repeats"), [(12, 3, 4, 1), (10, 2, 5, 3), (8, 4, 2, 3), (9, 2, 1, 2), (64, 6, 16, 4)]
)
def test_the_lanes_of_ranks_are_those_that_they_read(batch, world, lanes, repeats):
    """If the number of views does not divide the batch, the lanes of a rank differ between steps."""
    for ranks in ([0], [world - 1], [0, 1]):
        shares = [MicroBatches(range(24), Share(batch, 1, rank, world), lanes, repeats) for rank in ranks]
        read = {position // repeats % lanes for share in shares for positions in share for position in positions}
        assert shares[0].lanes_of(ranks) == sorted(read)


def test_views_of_a_sample_stay_together():
    parts = MicroBatches(range(2), Share(48, 2, 1, 2), lanes=4, repeats=3)
    for positions in parts:
        assert positions == [p for first in positions[::3] for p in range(first, first + 3)]
        assert all(first % 3 == 0 for first in positions[::3])


def test_the_number_of_lanes_follows_from_batch_and_shards():
    shards = [[10] * 1000]
    assert layout(shards, 4096) == Layout(64, 2)
    assert layout(shards, 4096, lanes=512, shuffle_shards=600) == Layout(512, 2)
    assert layout(shards, 4095) == Layout(63, 3)
    assert layout(shards, 4093) == Layout(1, 128)  # a prime number
    assert layout([[10] * 7], 4096) == Layout(4, 32)  # no more lanes than shards
    assert layout([[10] * 100, [9]], 4096) == Layout(8, 16)  # each lane has a part of every source
    assert layout(shards, 4096, repeats=256) == Layout(16, 8)  # the samples are counted, and not their views
    assert layout(shards, 4096, repeats=3) == Layout(64, 2)
    assert layout(shards, 12, lanes=4, repeats=2) == Layout(3, 43)  # 6 samples per step


def test_a_layout_is_described_in_words():
    assert str(Layout(1, 16)) == "groups of 16 shards" and str(Layout(64, 2)) == "64 lanes, windows of 2 shards"


@pytest.mark.parametrize(("weights", "known"), [(None, "19498cea149f"), ((0.7, 0.3), "08c207e3ed42")])
def test_the_sample_order_in_lanes_equals_that_of_earlier_versions(weights, known):
    """If the order changed, a run that is resumed after an update of the program would see other samples."""
    order = Order([[50, 60, 90, 40] * 8, [70, 80] * 6], weights, 2, 7, lanes=6)
    places = [order.locate(position) for start in (0, 10_000, 10**7) for position in range(start, start + 600)]
    assert hashlib.sha256(np.array(places, "<i8").tobytes()).hexdigest()[:12] == known


def test_the_prefetch_schedule_predicts_positions_for_any_source_weights():
    """The positions are approximate, because the proportion of a source is exact only over whole blocks."""
    order, shards = Order([[300] * 20, [250] * 8], [0.9, 0.1], 2, 1, lanes=4), (300, 250)
    for lane in range(4):
        begun = {}
        for index in range(2000):
            place = order.locate(index * 4 + lane)
            begun.setdefault((place.source, place.sample // shards[place.source]), index)
        for need in chain.from_iterable(order.upcoming_windows([lane], 0, 40)):
            first = min(begun.get((need.source, shard), 2000) for shard in need.shards)
            assert need.wait == 0 if first < 10 else first == 2000 or abs(10 + need.wait - first) < 3 * LANE_BLOCK


def test_lanes_begin_their_shards_at_different_times():
    order = Order([[10] * 640], None, 8, 0, lanes=16)
    firsts = Counter(int(order._lane(lane).sources[0]._epoch(0)[1][1]) for lane in range(16))
    assert len(firsts) > 4 and set(firsts) <= set(range(1, 9))
    epochs = {int(order._lane(0).sources[0]._epoch(epoch)[1][1]) for epoch in range(9)}
    assert len(epochs) > 3  # the times also differ between epochs


def test_a_step_mixes_more_shards_than_without_lanes():
    """In a step of 4,096 samples without lanes, one in 16 pairs of samples comes from the same shard. With 64 lanes,
    128 shards are read at a time."""
    sizes = corpus("12 M")
    ends = np.cumsum(sizes)

    def same(order):
        samples = [order.locate(position).sample for position in range(500 * 4096, 501 * 4096)]
        count = np.bincount(np.searchsorted(ends, samples, side="right"))
        return (count * (count - 1)).sum() / 4096 / 4095

    assert same(Order([sizes], None, 16, 0)) > 0.05
    assert same(Order([sizes], None, 2, 0, lanes=64)) < 0.014


def test_a_small_dataset_is_shuffled_as_a_whole():
    """If the shards are sorted by class, the number of samples of each class in a step is as close to its expected
    value as in random samples, or closer."""
    order = Order([[1000] * 12], None, 16, 0, lanes=8)
    for step in (0, 20, 45):
        samples = np.array([order.locate(position).sample for position in range(step * 256, (step + 1) * 256)])
        classes = np.bincount(samples // 600, minlength=20)
        assert ((classes - 12.8) ** 2 / 12.8).sum() < 36  # 99th percentile of chi-squared with 19 degrees of freedom
