"""A process detects its own stalls and those of other ranks. The tests simulate the clock. Other tests check the
effects of signals.

test_stop_and_stall.py tests real processes."""

import signal
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from m3ae_fast.process import heartbeats as heartbeats_module
from m3ae_fast.process import stop_request
from m3ae_fast.process.heartbeats import Heartbeats
from m3ae_fast.process.node_groups import HeartbeatGroup, heartbeat_groups, ranks_by_node
from m3ae_fast.process.stop_request import StopRequest


class Ended(Exception):
    """Raised instead of ending the process."""


class SimulatedRank:
    """A rank whose stalls are detected on a simulated clock. `at(seconds)` is called at each check. It may change
    `busy`, which states who computes or writes ("workers" or "self"), and may return a number of seconds for which the
    whole process is then suspended."""

    def __init__(self, monkeypatch, timeout: float, rank: int = 0, ranks: int = 1) -> None:
        self.now, self.busy, self.looks = 0.0, set(), 0
        self.store, self.stop = dist.HashStore(), StopRequest()
        group = HeartbeatGroup(self.store, [0] if rank else range(1, ranks))
        self.heartbeats = Heartbeats(rank, [group], self.store, self.stop)
        self.heartbeats.timeout = timeout
        monkeypatch.setattr(heartbeats_module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(heartbeats_module, "_Activity", lambda: self)
        monkeypatch.setattr(self.heartbeats, "_end_process", self.end)
        monkeypatch.setattr(self.heartbeats, "_end", self)

    def grown(self, children_alone: bool) -> bool:
        return bool(self.busy - ({"self"} if children_alone else set()))

    def end(self, what: str) -> None:
        raise Ended(what)

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        self.looks += 1
        self.now += self.at(self.now) or 0.0
        return self.is_set()

    def is_set(self) -> bool:
        return self.now > self.until

    def ended(self, until: float, at=lambda now: None) -> tuple[float, str] | None:
        """Return the time and the reason of the end of the process; None if it was still running after `until`
        seconds."""
        self.until, self.at = until, at
        try:
            self.heartbeats._detect_stalls()
        except Ended as end:
            return self.now, str(end)
        return None

    def beats(self, seconds: int, at=lambda now: None) -> int:
        """Return the number of heartbeats with progress that the rank sends in the next `seconds`."""
        self.until, self.at = self.now + seconds, at
        self.heartbeats._beat()
        return int(self.store.get("beat 0").split()[0])


@pytest.mark.parametrize("timeout", [0.5, 5.0, 600.0])
def test_idle_workers_end_the_run_after_the_timeout_and_not_before(monkeypatch, timeout):
    """The main thread waits for the workers. The CPU time that it uses meanwhile does not count as their activity."""
    simulated = SimulatedRank(monkeypatch, timeout)
    simulated.busy = {"self"}
    simulated.heartbeats.mark("waiting for its loader", loading=True)
    end, why = simulated.ended(10 * timeout)
    assert timeout < end < 1.3 * timeout and "its data-loader workers have been idle" in why
    assert simulated.looks >= 10


def test_active_workers_do_not_count_as_stalled(monkeypatch):
    simulated = SimulatedRank(monkeypatch, 60.0)
    simulated.busy = {"workers"}
    simulated.heartbeats.mark("waiting for its loader", loading=True)

    def at(now: float) -> None:
        if now > 1000:
            simulated.busy = set()

    end, _ = simulated.ended(5000, at)
    assert 1060 <= end < 1070  # one timeout after the workers became idle


def test_every_batch_resets_the_stall_timer(monkeypatch):
    simulated = SimulatedRank(monkeypatch, 60.0)

    def at(now: float) -> None:
        if now < 500 and now % 50 == 0:
            simulated.heartbeats.mark("waiting for its loader", loading=True)

    end, _ = simulated.ended(5000, at)
    assert 510 < end < 520


def test_workers_may_be_idle_while_a_batch_is_used(monkeypatch):
    """The batch may be used for a step or for a compilation that takes hours."""
    simulated = SimulatedRank(monkeypatch, 60.0)
    batches = simulated.heartbeats.watch([1, 2], "training")
    for _ in range(2):
        next(batches)
        assert simulated.ended(simulated.now + 5000) is None


def test_the_heartbeat_knows_the_activity_of_the_main_thread_throughout_a_batch(monkeypatch):
    simulated, seen = SimulatedRank(monkeypatch, 60.0), []

    def note() -> None:
        seen.append((simulated.heartbeats._doing, simulated.heartbeats._loading, simulated.heartbeats._marks))

    class Loader:
        def __iter__(self):
            note()
            for batch in "ab":
                note()
                yield batch
            note()

    for _ in simulated.heartbeats.watch(Loader(), "training"):
        note()
    note()
    waiting, training = ("waiting for its loader", True), ("training", False)
    assert [(doing, loading) for doing, loading, _ in seen] == [
        waiting, waiting, training, waiting, training, waiting, training
    ]  # fmt: skip
    marks = [mark for _, _, mark in seen]
    assert marks[1:] == sorted(set(marks))  # each mark shows progress


def test_a_process_that_was_suspended_does_not_report_a_stall(monkeypatch):
    simulated = SimulatedRank(monkeypatch, 60.0, ranks=2)
    simulated.heartbeats.mark("waiting for its loader", loading=True)
    end, _ = simulated.ended(2e5, lambda now: 1e5 if 30 <= now < 31 else None)
    assert 1e5 + 60 - 2 <= end < 1e5 + 70  # only seconds in which the process was not suspended count


@pytest.mark.parametrize(("rank", "others"), [(0, [1, 2, 3]), (1, [0]), (3, [0])])
def test_each_silent_rank_that_is_watched_is_named(monkeypatch, rank, others):
    """Rank 0 monitors all other ranks, and all of them monitor rank 0. The message does not name ranks whose heartbeats
    have been received in the meantime."""
    simulated = SimulatedRank(monkeypatch, 60.0, rank, ranks=4)
    end, why = simulated.ended(1000)
    assert 60 < end < 70 and f"no heartbeat from rank {', '.join(map(str, others))} (last activity: joining)" in why

    def heard(now: float) -> None:
        for other in others[:-1]:
            simulated.heartbeats._others[other].silent = 0.0

    simulated.heartbeats._others[others[-1]].beat = b"7 saving step 4"
    simulated.heartbeats.mark("step 5")
    _, why = simulated.ended(simulated.now + 1000, heard)
    assert f"from rank {others[-1]} (last activity: saving step 4)" in why


def test_a_rank_that_makes_progress_does_not_end_the_run_if_another_rank_is_silent(monkeypatch):
    """Another rank may be silent for long while this rank makes progress. If the other rank has stalled, a rank that
    waits for it reports the stall."""
    simulated = SimulatedRank(monkeypatch, 60.0, ranks=2)
    assert simulated.ended(1000, lambda now: simulated.heartbeats.mark("step")) is None


def test_a_rank_sends_heartbeats_only_while_it_is_active(monkeypatch):
    simulated = SimulatedRank(monkeypatch, 600.0, ranks=2)
    assert simulated.beats(50) <= 1
    assert simulated.beats(50, lambda now: simulated.heartbeats.mark("step")) > 45
    simulated.busy = {"self"}
    assert simulated.beats(50) > 45
    simulated.busy = set()
    with simulated.heartbeats.waiting():
        assert simulated.beats(50) > 45
        assert simulated.store.get("beat 0").endswith(b" step")
    assert simulated.beats(50) <= 1
    # at its end, the block `waiting` sets the activity to "starting"
    assert simulated.store.get("beat 0").endswith(b" starting")
    simulated.busy = {"self"}
    simulated.heartbeats.mark("waiting for its loader", loading=True)
    assert simulated.beats(50) <= 1
    simulated.busy = {"workers"}
    assert simulated.beats(50) > 45


def test_only_a_new_heartbeat_message_resets_the_silence_of_a_rank(monkeypatch):
    simulated = SimulatedRank(monkeypatch, 600.0, ranks=3)
    one, two = (simulated.heartbeats._others[other] for other in (1, 2))
    simulated.store.set("beat 1", "1 step 1")
    simulated.beats(5)
    assert one.beat == b"1 step 1" and two.beat == b""
    one.silent = two.silent = 7.0
    simulated.beats(5)
    assert (one.silent, two.silent) == (7.0, 7.0)
    simulated.store.set("beat 2", "4 step 1")
    simulated.beats(5)
    assert (one.silent, two.silent) == (7.0, 0.0) and not simulated.stop.requested
    simulated.store.set("beat 1", "2 step 2")
    simulated.store.set("stop", "SIGTERM")
    simulated.beats(5)
    assert one.silent == 0.0 and simulated.stop.reason == "requested by another rank"
    assert simulated.heartbeats.stop_requested()


def test_a_rank_keeps_its_own_stop_request_if_the_store_is_gone(monkeypatch):
    simulated = SimulatedRank(monkeypatch, 600.0, ranks=2)

    def gone(keys):
        raise RuntimeError("Connection reset by peer")

    simulated.heartbeats._store = SimpleNamespace(check=gone)
    assert not simulated.heartbeats.stop_requested()
    simulated.stop.request("SIGTERM")
    assert simulated.heartbeats.stop_requested()


def test_only_the_first_stop_request_returns_true(monkeypatch):
    simulated = SimulatedRank(monkeypatch, 600.0, ranks=2)
    assert not simulated.heartbeats.stop_requested()
    assert [simulated.heartbeats.request_stop("SIGTERM") for _ in range(3)] == [True, False, False]
    assert simulated.heartbeats.stop_requested()


def test_groups_have_two_levels_if_there_are_several_nodes_and_one_has_several_ranks():
    for nodes in ("a", "aaa", "abc"):
        assert ranks_by_node(nodes) == [[*range(len(nodes))]]
    assert ranks_by_node("aab") == [[0, 1], [2]] and ranks_by_node("abba") == [[0, 3], [1, 2]]


@pytest.mark.parametrize("nodes", ["a", "aaa", "abc", "aabb", "abab", "aabbbc", "abbaac"])
def test_every_rank_is_monitored_by_rank_0_or_by_a_leader_that_rank_0_monitors(nodes):
    """Leaders monitor the ranks of their node, and rank 0 monitors the leaders. Each monitored rank also monitors the
    rank that monitors it."""
    ports: dict[int, int] = {}
    leaders = [nodes.index(name) for name in dict.fromkeys(nodes)]
    store, groups = dist.TCPStore("127.0.0.1", 0, 1, is_master=True), {}

    def gather(rank: int, port: int) -> list[int]:
        ports[rank] = port
        return [ports.get(other, 0) for other in range(len(nodes))]

    for rank in (*leaders, *(rank for rank in range(len(nodes)) if rank not in leaders)):
        groups[rank] = heartbeat_groups(rank, nodes, store, partial(gather, rank), timedelta(seconds=20))
    hears = {rank: {other for group in groups[rank] for other in group.monitored} for rank in groups}
    for rank, others in hears.items():
        assert rank not in others and all(rank in hears[other] for other in others)
    for rank in range(1, len(nodes)):
        apart = len(leaders) not in (1, len(nodes))
        assert (nodes.index(nodes[rank]) if apart and rank not in leaders else 0) in hears[rank]
    for rank, own in groups.items():  # a message to a group reaches its members
        for number, group in enumerate(own):
            group.store.set(f"said {rank} {number}", "x")
    for rank, own in groups.items():
        for group in own:
            for other in group.monitored:
                number = next(number for number, theirs in enumerate(groups[other]) if rank in theirs.monitored)
                group.store.wait([f"said {other} {number}"], timedelta(seconds=20))


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("kind", ["computes", "writes"])
@pytest.mark.parametrize("who", ["itself", "child", "grandchild", "nobody"])
def test_activity_is_measured_over_the_process_and_its_descendants_or_only_the_descendants(
    monkeypatch, who, kind, alone
):
    now, used = [0.0], dict.fromkeys(("itself", "child", "grandchild"), 0)

    class Process:
        def __init__(self, name="itself"):
            self.name = name

        def children(self, recursive=False):
            return [Process("child"), *([Process("grandchild")] if recursive else [])]

        def cpu_times(self):
            return SimpleNamespace(user=used[self.name] if kind == "computes" else 0.0, system=0.0)

        def io_counters(self):
            return SimpleNamespace(write_chars=10**6 * used[self.name] if kind == "writes" else 0)

    monkeypatch.setattr(heartbeats_module, "psutil", SimpleNamespace(Process=Process, Error=psutil.Error))
    monkeypatch.setattr(heartbeats_module.time, "monotonic", lambda: now[0])
    activity = heartbeats_module._Activity()
    for _ in range(3):
        now[0] += 10.0
        assert not activity.grown(alone)
        now[0] += 10.0
        if who != "nobody":
            used[who] += 1  # a tenth of a core, or a megabyte
        assert activity.grown(alone) == (who != "nobody" and not (alone and who == "itself"))


def test_the_launcher_is_checked_a_few_times_per_second(monkeypatch):
    looks = []
    monkeypatch.setattr(stop_request, "launcher_chain", lambda: looks.append(1))
    with StopRequest() as stop:
        stop.listen()
        time.sleep(0.6)
    assert 2 <= len(looks) <= 10


def test_the_first_reason_to_stop_is_reported():
    stop = StopRequest()
    assert not stop.requested
    stop.request("SIGTERM")
    stop.request("requested by another rank")
    assert stop.requested and stop.reason == "SIGTERM"


def test_signal_handlers_are_restored_afterwards():
    def mine(*_) -> None:
        """Handle SIGUSR1 as a user's program might."""

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        expected = {number: signal.getsignal(number) for number in stop_request.SIGNALS}
        with StopRequest() as stop:
            assert signal.getsignal(signal.SIGUSR1) != mine
            stop.listen()
        assert {number: signal.getsignal(number) for number in stop_request.SIGNALS} == expected
    finally:
        signal.signal(signal.SIGUSR1, before)
