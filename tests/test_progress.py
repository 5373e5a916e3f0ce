"""The reported progress and remaining time of long work, on a simulated clock."""

import re
from types import SimpleNamespace

import pytest

from m3ae_fast.base import pace
from m3ae_fast.base import progress as module
from m3ae_fast.base.pace import Pace
from m3ae_fast.base.progress import Lines, track


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
    found = _printed(Lines("encoding", Pace(1000, now=clock)), clock, 1000, 0.5)
    assert found[3.0] == "encoding: 6 of 1,000, about 0:08:17 left"
    assert [*found] == [3, 6, 12, 24, 48, 96, 156, 216, 276, 336, 396, 456]
    assert found[456.0] == "encoding: 912 of 1,000, about 0:00:44 left"


def test_short_work_prints_no_progress(clock):
    assert _printed(Lines("encoding", Pace(5, now=clock)), clock, 5, 0.5) == {}
    assert _printed(Lines("encoding", Pace(1, now=clock)), clock, 1, 30.0) == {}, "finished work has no remaining time"


def test_without_a_total_no_remaining_time_is_printed(clock):
    lines = Lines("reading", Pace(now=clock))
    clock.seconds += 5
    assert lines.advance(1234) == "reading: 1,234"


def test_progress_is_printed_in_lines_if_the_output_is_not_a_terminal(clock, monkeypatch, capsys):
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=clock))

    def items():
        for number in range(4):
            clock.seconds += 2
            yield number

    assert [*track(items(), "encoding", 4)] == [0, 1, 2, 3]
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"encoding: 2 of 4, about 0:00:04 left\n", err)
    whole = Pace(10)
    assert [*track(items(), "encoding", 4, whole=whole, part=8)] == [0, 1, 2, 3]
    assert capsys.readouterr().err == "encoding: 2 of 4, about 0:00:04 left; whole task: about 0:00:06 left\n"
    assert (whole.done, whole.describe_left()) == (8, ", about 0:00:02 left")
    assert [*track(items(), "encoding", 4, show=False)] == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""


def test_only_the_main_rank_prints_progress(clock, monkeypatch, capsys):
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=clock))
    for rank in ("1", "0", ""):
        monkeypatch.setenv("RANK", rank)
        with module.progress("encoding", 4) as advance:
            clock.seconds += 5
            advance(1)
        assert bool(capsys.readouterr().err) == (rank != "1")
