import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from m3ae_fast.base.randomness import hash64
from m3ae_fast.data.order import BLOCK, FileOrder, Lane, Order, permutation


def places(order, positions):
    return [order.locate(position) for position in positions]


@pytest.mark.parametrize("sizes", [[[5]], [[1, 1, 1]], [[7, 3, 11, 2, 5]], [[700, 900], [31], [5, 1, 1500, 2]]])
@pytest.mark.parametrize("group", [1, 2, 3, 100])
def test_every_epoch_contains_each_sample_once(sizes, group):
    order = Order(sizes, None, group, seed=3)
    everything = {(source, n) for source, shards in enumerate(sizes) for n in range(sum(shards))}
    assert order.samples == len(everything)
    for epoch in (0, 1, 5):
        found = places(order, range(epoch * order.samples, (epoch + 1) * order.samples))
        assert {place.epoch for place in found} == {epoch}
        assert Counter((place.source, place.sample) for place in found) == Counter(everything)


def test_the_order_differs_between_epochs_and_seeds():
    def epoch(seed, number):
        return places(Order([[50, 50, 50]], None, 2, seed), range(number * 150, (number + 1) * 150))

    runs = [[place.sample for place in epoch(*run)] for run in ((0, 0), (0, 1), (1, 0))]
    for one in range(3):
        assert runs[one] != sorted(runs[one])
        for other in range(one):
            assert sum(a == b for a, b in zip(runs[one], runs[other])) < 10


def test_the_order_is_a_pure_function_of_the_position():
    make = lambda: Order([[30] * 9, [1000], [7, 8]], None, 4, seed=11)  # noqa: E731
    straight = places(make(), range(4000))
    positions = np.random.RandomState(0).permutation(4000)
    jumping = make()
    for position in positions[:800]:
        assert jumping.locate(int(position)) == straight[position]
    assert places(make(), [123_456_789_012]) == places(jumping, [123_456_789_012])


def test_the_order_equals_that_of_earlier_versions():
    """If the order changed, a run that is resumed after an update of the program would see other samples."""
    assert hash64(1, 2, 3) == 15020427595393229491
    assert permutation(8, 42).tolist() == [4, 6, 7, 1, 3, 5, 0, 2]
    long = permutation(300_000, 7).astype("<i8")  # so long that a changed bit of a hash changes the order
    assert hashlib.sha256(long.tobytes()).hexdigest()[:12] == "5f8447cbbcd9"
    order = Order([[5, 6], [4]], None, 2, 7)
    known = {0: (0, 0, 6), 1: (1, 0, 0), 2: (0, 0, 2), 14: (0, 0, 10), 15: (1, 1, 2), 16: (1, 1, 0)}
    assert {position: order.locate(position) for position in known} == known


def test_shard_groups_limit_the_number_of_open_shards():
    order = Order([[10] * 12], None, 3, seed=5)
    shards = [place.sample // 10 for place in places(order, range(120))]
    groups = [set(shards[i : i + 30]) for i in range(0, 120, 30)]
    assert all(len(group) == 3 for group in groups)
    assert set.union(*groups) == set(range(12))
    # the first window of the second epoch
    groups.append({place.sample // 10 for place in places(order, range(120, 150))})
    for first, end, known in ((0, 1, 1), (29, 30, 1), (29, 31, 2), (30, 31, 1), (65, 119, 2)):
        (needs,) = order.upcoming_windows([0], first, end)
        found = [(need.ahead, set(need.shards)) for need in needs]
        number = first // 30
        assert found[:3] == [(max(0, i - known + 1), groups[number + i]) for i in range(3)]
        assert len(found) == 4 + (first % 30 > 0) and {need.wait for need in order.upcoming_windows([0], 0, 1)[0]} == {
            0,
            29,
            59,
            89,
        }


@pytest.mark.parametrize("sizes", [[[30] * 20, [25] * 8], [[30] * 20]])
@pytest.mark.parametrize("batch", [40, 37])  # 40 is a multiple of the number of lanes, 37 is not
def test_upcoming_windows_are_sorted_and_cover_the_shards_that_are_read(sizes, batch):
    """Every shard that a step reads is listed as needed now, not only ahead of time. This also holds for the lanes of a
    single node and for weighted sources."""
    order = Order(sizes, [0.7, 0.3][: len(sizes)], 2, seed=1, lanes=4)
    shards = [np.repeat(np.arange(len(source)), source) for source in sizes]
    for first in range(0, 2400, batch):
        needs = [list(needs) for needs in order.upcoming_windows([1, 2], first, first + batch)]
        assert all([need.wait for need in each] == sorted(need.wait for need in each) for each in needs)
        live = {(need.source, shard) for each in needs for need in each if not need.ahead for shard in need.shards}
        read = places(order, [p for p in range(first, first + batch) if p % 4 in (1, 2)])
        assert {(place.source, shards[place.source][place.sample]) for place in read} <= live
        assert len(live) <= 2 * 2 * 2 * 2 * 2


@pytest.mark.parametrize("weights", [[3, 1], [1, 1], [0.001, 0.999], [5, 2.5, 1, 1e-9]])
def test_each_block_has_the_exact_proportions_of_the_sources(weights):
    order = Order([[4000], [500], [7000], [900]][: len(weights)], weights, 4, seed=0)
    shares = np.array(weights) / sum(weights)
    sources = [place.source for place in places(order, range(order.samples))]
    for start in range(0, len(sources) - BLOCK, BLOCK):
        count = np.bincount(sources[start : start + BLOCK], minlength=len(weights))
        assert np.abs(count - shares * BLOCK).max() <= 1.5
    total = np.bincount(sources, minlength=len(weights))
    assert np.abs(total - shares * len(sources)).max() <= 1


def test_a_weighted_source_repeats_its_samples_in_passes():
    order = Order([[10, 10], [3000]], [1, 1], 1, seed=0)
    seen = [(p.epoch, p.sample) for p in places(order, range(3 * order.samples)) if p.source == 0]
    assert len(seen) == pytest.approx(1.5 * order.samples, abs=3)
    for epoch in range(100):
        assert sorted(sample for e, sample in seen[epoch * 20 : epoch * 20 + 20] if e == epoch) == list(range(20))


def test_the_sample_count_of_each_source_never_decreases():
    """If the count of a source decreased, one of its samples would be read twice, or the count of a block would be
    negative."""
    lane = Lane([], [0.5, 0.3, 0.1, 0.0999, 0.0001], 50_000, seed=0)
    seats = [lane._seats(n) for n in range(3000)]
    assert all(int(s.sum()) == n for n, s in enumerate(seats))
    assert all(((b - a) >= 0).all() for a, b in pairwise(seats))


def test_file_order_is_the_order_of_the_files():
    order = FileOrder([[2, 3], [1], [4]])
    assert [(p.source, p.sample) for p in places(order, range(order.samples))] == [
        *((0, n) for n in range(5)),
        (1, 0),
        *((2, n) for n in range(4)),
    ]
    some = FileOrder([[2, 3], [1], [4]], 5)
    assert [(p.source, p.sample) for p in places(some, range(5))] == [(0, 0), (0, 2), (0, 4), (2, 0), (2, 2)]
    assert FileOrder([[2]], 5).samples == 2


@pytest.mark.parametrize("count", [1, 2, 3, 7, 11, 12, 13, 23, 24])
def test_a_subset_of_the_samples_is_evenly_spaced(count):
    """The gaps between samples differ by at most one, including the gap after the last sample."""
    sizes = [[5, 6], [1, 12]]
    order, starts = FileOrder(sizes, count), (0, 11)
    numbers = [starts[place.source] + place.sample for place in places(order, range(order.samples))]
    gaps = np.diff([*numbers, 24])
    assert numbers[0] == 0 and len(numbers) == count and set(gaps) <= {24 // count, -(-24 // count)}
