"""The measured pace of work and the time left, on a simulated clock."""

import pytest

from m3ae_fast.base.pace import Pace


class Worker:
    """A clock that advances with the work done."""

    def __init__(self, total=None, **settings):
        self.seconds = 100.0
        self.pace = Pace(total, now=lambda: self.seconds, **settings)

    def work(self, *durations, units=1.0, recent=float("inf")):
        for each in durations:
            self.seconds += each
            self.pace.advance(units, recent)


@pytest.mark.parametrize("first", [1, 2])
def test_the_pace_excludes_the_first_parts_of_the_work(first):
    """While no more than `first` parts are done, the pace is that of the latest part."""
    worker = Worker(100, first=first)
    for number in range(first):
        assert worker.pace.missing == first + 1 - number
        worker.work(30.0 - number, units=3)
        assert worker.pace.per_unit == pytest.approx((30.0 - number) / 3)
    worker.work(1.0, 2.0, units=3)
    assert (worker.pace.missing, worker.pace.parts, worker.pace.seconds) == (0, 2, 3.0)
    assert worker.pace.per_unit == 0.5 and worker.pace.left() == 0.5 * (100 - 3 * (first + 2))


def test_the_pace_excludes_pauses_but_the_time_left_includes_further_pauses():
    """The probe pauses every ten units and at the end. A pause that is not due does not count."""
    worker = Worker(100)
    worker.work(5.0, 1.0)
    for seconds, counts in ((20.0, True), (0.5, False)):
        with worker.pace.pause("probe", 0.1, counts):
            worker.seconds += seconds
    worker.work(3.0)
    worker.seconds += 1000
    worker.pace.skip()
    worker.work(2.0)
    assert worker.pace.per_unit == 2.0 and worker.pace.paused == 20.5
    assert worker.pace.left(50) == 50 * (2 + 0.1 * 20) + 20
    worker.work(*[2.0] * 96)
    assert worker.pace.done == 100 and worker.pace.left() == 20


def test_parts_without_units_have_no_pace_of_their_own():
    """If a part has no units, for example because no sample of a batch can be read, its time is added to that of the
    next units."""
    worker = Worker(20)
    worker.work(30.0)
    worker.work(1.0, units=0)
    assert worker.pace.describe_left() == ", about 0:09:30 left"
    worker.work(2.0, units=3)
    assert (worker.pace.done, worker.pace.per_unit) == (4, 1.0)


def test_recent_units_have_a_higher_weight_if_wanted():
    for recent, pace in ((float("inf"), 2.0), (10.0, 3.0)):
        worker = Worker()
        worker.work(*[1.0] * 101, *[3.0] * 100, recent=recent)
        assert worker.pace.per_unit == pytest.approx(pace, rel=0.01)


def test_the_time_left_is_reported_once_as_soon_as_it_is_reliable():
    reported = []
    worker = Worker(1000, report=reported.append)
    worker.work(60.0, 1.0, 1.0)
    assert reported == []
    worker.work(1.0, 5.0, 5.0)
    assert reported == [996.0]


def test_the_time_left_is_described_until_the_work_is_done():
    worker = Worker(1.0)
    assert worker.pace.describe_left() == ""
    worker.work(7.0, units=0.1)
    assert worker.pace.describe_left() == ", about 0:01:03 left"
    worker.work(*[7.0] * 9, units=0.1)  # in floating-point numbers, ten times 0.1 is less than 1
    assert worker.pace.describe_left() == ""
    worker = Worker()
    worker.work(1.0)
    assert worker.pace.describe_left() == ""
