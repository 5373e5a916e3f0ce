"""Background threads of all ranks reach agreements during training. Here each rank is a thread of one process."""

import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from m3ae_fast.base.errors import ErrorElsewhere, RankLost, UserError
from m3ae_fast.process import agreement
from m3ae_fast.process.agreement import Agreement
from tests.helpers.threads import map_threads


def on_every_rank(world, work, store=None):
    """Return the result or the exception of `work(agreement of the rank)` for each rank."""
    store, leaving = store or dist.HashStore(), threading.Event()
    timer = threading.Timer(10, leaving.set)  # so that no test waits forever
    timer.start()

    def run(rank):
        try:
            return work(Agreement(rank, world, store, leaving))
        except Exception as error:
            return error

    found = map_threads(run, range(world))
    timer.cancel()
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_ranks_get_rank_0s_decision_on_the_reports_in_rank_order(world):
    store, judged = dist.HashStore(), []

    def judge(reports):
        judged.append(reports)
        return " ".join(reports)

    def work(own):
        time.sleep(0.01 * (own.world - own.rank))  # rank 0 reports last
        return [own.decide(f"{number}:{own.rank}", judge) for number in range(5)]

    expected = [[f"{number}:{rank}" for rank in range(world)] for number in range(5)]
    assert on_every_rank(world, work, store) == [[" ".join(reports) for reports in expected]] * world
    assert judged == expected
    assert store.num_keys() <= 1  # after many saves, only the last answer is left


@pytest.mark.parametrize("words", ["the disk is full", "said yes", "refused no"])
def test_a_rejection_is_raised_on_every_rank_and_does_not_affect_the_next_round(words):
    def judge(reports):
        if "bad" in reports:
            raise UserError(words)
        return words

    def work(own):
        with pytest.raises(UserError, match=f"^{words}$"):
            own.decide("bad" if own.rank == 1 else "good", judge)
        return own.decide("good", judge)

    assert on_every_rank(3, work) == [words] * 3


def test_a_bug_on_rank_0_is_raised_there_and_ends_the_others():
    def judge(reports):
        raise ZeroDivisionError("a bug")

    first, *others = on_every_rank(3, lambda own: own.decide("", judge))
    assert type(first) is ZeroDivisionError
    assert {type(error) for error in others} == {ErrorElsewhere}
    assert all("rank 0" in str(error) and "ZeroDivisionError: a bug" in str(error) for error in others)


def test_a_leaving_rank_waits_for_the_others_for_a_limited_time(monkeypatch):
    """The clock is simulated. A rank that does not leave keeps waiting, because another rank may have much to save."""
    now, leaving = [0.0], threading.Event()
    own = Agreement(1, 2, dist.HashStore(), leaving)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        now[0] += seconds
        if now[0] > 1000:
            leaving.set()

    monkeypatch.setattr(agreement, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    with pytest.raises(RankLost, match="another rank exited during a save"):
        own.decide("", None)
    assert 1000 + agreement._PATIENCE <= now[0] < 1001 + agreement._PATIENCE
    assert looks[0] < 0.01 and looks == sorted(looks) and looks[-1] <= 0.25 and len(looks) > 1000


@pytest.mark.parametrize("failing", [set(), {0}, {2}, {0, 1}, {1, 2}])
@pytest.mark.parametrize("bugs", [set(), {0, 1, 2}, {1}])
def test_an_error_of_any_rank_ends_all_of_them(failing, bugs):
    """A rank with a bug raises its own error. All other ranks raise the first user error or, if there is none, an error
    that names the first bug."""

    def work(own):
        def part():
            if own.rank in failing:
                raise (ZeroDivisionError if own.rank in bugs else UserError)(f"rank {own.rank} cannot")
            return own.rank

        with pytest.raises(Exception) if failing else nullcontext() as caught:
            return own.together(part)
        return type(caught.value), str(caught.value)

    mistakes, found = sorted(failing - bugs), on_every_rank(3, work)
    for rank in range(3):
        if not failing:
            assert found[rank] == rank
        elif rank in failing & bugs:
            assert found[rank] == (ZeroDivisionError, f"rank {rank} cannot")
        elif mistakes:
            assert found[rank] == (UserError, f"rank {mistakes[0]} cannot")
        else:
            assert found[rank][0] is ErrorElsewhere
            assert found[rank][1].startswith(f"rank {min(failing)} has failed (ZeroDivisionError: ")
