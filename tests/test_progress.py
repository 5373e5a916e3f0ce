"""The reported progress and remaining time of long work, on a simulated clock."""

import re

import pytest

from m3ae_fast.base import progress as module
from m3ae_fast.base.progress import Lines, TimeLeft, track


class _Clock:
    """A clock that a test advances."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return _Clock()


def _printed(lines, clock, items, seconds):
    """Return the lines that are printed for `items` that take `seconds` each, by the time at which they are printed."""
    found, began = {}, clock.seconds
    for _ in range(items):
        clock.seconds += seconds
        if line := lines.advance(1):
            found[round(clock.seconds - began, 3)] = line
    return found


def test_progress_lines_begin_after_seconds_and_become_less_frequent(clock):
    found = _printed(Lines("encoding", 1000, now=clock), clock, 1000, 0.5)
    assert found[3.0] == ("encoding: 6 of 1,000, about 0:08:17 left", "")
    assert [*found] == [3, 6, 12, 24, 48, 96, 156, 216, 276, 336, 396, 456]
    assert found[456.0][0] == "encoding: 912 of 1,000, about 0:00:44 left"


def test_short_work_prints_no_progress(clock):
    assert _printed(Lines("encoding", 5, now=clock), clock, 5, 0.5) == {}
    assert _printed(Lines("encoding", 1, now=clock), clock, 1, 30.0) == {}, "it is over"


def test_the_estimated_speed_excludes_the_start_of_the_loader(clock):
    lines = Lines("encoding", 100, now=clock)
    clock.seconds += 2.8  # seconds until the first item
    assert lines.advance(1) is None
    clock.seconds += 0.3
    assert lines.advance(3) == ("encoding: 4 of 100, about 0:00:10 left", "")


def test_the_remaining_time_is_estimated_after_one_long_item(clock):
    lines = Lines("encoding", 3, now=clock)
    clock.seconds += 20
    assert lines.advance(1) == ("encoding: 1 of 3, about 0:00:40 left", "")


def test_without_a_total_no_remaining_time_is_printed(clock):
    lines = Lines("reading", None, now=clock)
    clock.seconds += 5
    assert lines.advance(1234) == ("reading: 1,234", "")


def test_the_remaining_time_of_a_task_is_estimated_from_its_first_part(clock):
    reported = []
    whole = TimeLeft(1000, report=reported.append, now=clock)
    found = _printed(Lines("clean", 10, whole, 100, now=clock), clock, 10, 1.0)
    assert found[3.0] == ("clean: 3 of 10, about 0:00:07 left", "0:01:37")  # 97 items
    assert reported == [pytest.approx(97)]
    assert whole.after(100) == ", about 0:01:30 left"
    assert whole.after(900 - 1) == ", about 0:00:01 left" and whole.after(1) == ""


def test_the_remaining_time_combines_the_current_part_with_earlier_parts(clock):
    whole = TimeLeft(30, now=clock)
    clock.seconds += 10
    whole.after(10)  # one second per item
    found = _printed(Lines("attacked", 10, whole, 10, now=clock), clock, 5, 3.0)
    assert found[3.0] == ("attacked: 1 of 10, about 0:00:27 left", "0:00:22")  # 13 s for 11 of 30


def test_progress_is_printed_in_lines_if_the_output_is_not_a_terminal(clock, monkeypatch, capsys):
    monkeypatch.setattr(module, "Lines", lambda *given: Lines(*given, now=clock))

    def items():
        for number in range(4):
            clock.seconds += 2
            yield number

    assert [*track(items(), "encoding", 4)] == [0, 1, 2, 3]
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"encoding: 2 of 4, about 0:00:04 left\n", err)
    whole = TimeLeft(8, now=clock)
    assert [*track(items(), "encoding", 4, whole=whole, part=4)] == [0, 1, 2, 3]
    assert capsys.readouterr().err == "encoding: 2 of 4, about 0:00:04 left; whole task: about 0:00:12 left\n"
    assert [*track(items(), "encoding", 4, show=False)] == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""


def test_only_the_main_rank_prints_progress(clock, monkeypatch, capsys):
    monkeypatch.setattr(module, "Lines", lambda *given: Lines(*given, now=clock))
    for rank in ("1", "0", ""):
        monkeypatch.setenv("RANK", rank)
        with module.progress("encoding", 4) as advance:
            clock.seconds += 5
            advance(1)
        assert bool(capsys.readouterr().err) == (rank != "1")
