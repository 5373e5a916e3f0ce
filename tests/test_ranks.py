"""Ranks that wait for each other."""

import errno
import hashlib
import os
import resource
import signal
import socket
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from m3ae_fast.base.errors import ErrorElsewhere, ErrorReport, UserError, exit_cleanly
from m3ae_fast.process import ranks
from m3ae_fast.process import session as program
from m3ae_fast.process.failure_messages import explain
from m3ae_fast.process.heartbeats import Heartbeats
from m3ae_fast.process.node_groups import HeartbeatGroup
from tests.helpers.ranks import await_ranks, fork_each, fork_ranks, run_ranks
from tests.helpers.threads import map_threads

pytestmark = pytest.mark.slow

TIMEOUT_S = 3.0  # timeout of collectives and of stalls


def main(argv):
    """Let rank 1 work for longer than any timeout, or fail, while rank 0 waits. Then, both ranks take part in a
    collective."""
    if argv[0] in PROGRAMS:
        return PROGRAMS[argv[0]](*argv[1:])
    ranks.TIMEOUT = timedelta(seconds=TIMEOUT_S)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with program.joined_program() as (joined, _, heartbeats):
        heartbeats.timeout = TIMEOUT_S
        assert joined.of_node == [0, 1]
        mine = joined.rank + 7
        assert joined.from_main(mine) == joined.broadcast(lambda: mine) == 7
        assert joined.gather(mine) == [7, 8] and joined.sum([mine, 0.5]) == [15, 1]
        assert joined.on_main(lambda: mine) == (7 if joined.is_main else None)
        if argv[0] != "fail":
            (first, code), (last, same) = sorted(joined.gather(joined.first_error(7 + joined.rank)))
            assert (first, last) == (False, True) and code == same and code in (7, 8)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256

        def work():
            until = time.monotonic() + 2 * TIMEOUT_S * (joined.rank == 1 and argv[0] != "made")
            while time.monotonic() < until:
                hashlib.sha256(bytes(1 << 20))
            if argv == ["fail"] and joined.rank == 1:
                raise UserError("rank 1 finds no shard")
            if argv[0] == "made":
                path = Path(argv[1])
                if joined.rank == 0:
                    path.touch()
                elif not path.exists():
                    raise UserError("rank 0 has made nothing yet")
            return joined.rank

        assert joined.main_first(work, heartbeats.waiting) == joined.rank
        total = torch.ones(1)
        dist.all_reduce(total)  # its timeout is TIMEOUT_S, which does not include the work above
        print(f"{total.item():g} ranks\n", end="", flush=True)  # a single write, because the ranks share the output
    return 0


def test_a_single_rank_starts_no_gloo_threads(monkeypatch):
    """A gloo thread that runs Python code while a loader worker is forked can crash that worker."""
    with program.joined_program() as (alone, *_):
        for name in ("broadcast_object_list", "all_gather_object", "all_reduce"):
            monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("a collective of one rank"))
        assert alone.from_main("a") == "a" and alone.gather(3) == [3] and alone.sum([True, 0.5]) == [1.0, 0.5]
        values = [1]
        wait = alone.start_sum(values)
        values[0] = 2
        assert wait() == [1.0] and alone.on_main(lambda: 4) == alone.together(lambda: 4) == 4


def test_tracebacks_of_a_single_rank_are_printed_unchanged():
    hook = sys.excepthook
    with program.joined_program():
        assert sys.excepthook is hook
    assert sys.excepthook is hook


def many_clients():
    """Create a store for many clients in a process whose limit of open files is low. `join_ranks` increases the
    limit."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with ranks.join_ranks():
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        clients = [socket.create_connection(("127.0.0.1", store.port)) for _ in range(300)]
        late = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=10))
        late.set("key", "heard")
        print(store.get("key").decode(), len(clients), flush=True)
    return 0


def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    with ranks.join_ranks():
        return 0


def stopped_unheard():
    """Stop rank 0 while rank 1 is slow to notice it: rank 1 exchanges heartbeats only every two seconds. When rank 0
    ends, the collective on rank 1 fails, but rank 1 raises this error only 1.5 seconds later."""
    if os.environ["RANK"] == "1":
        Heartbeats._interval = property(lambda _: 2.0)
    with program.joined_program() as (joined, *_):
        joined.gather(None)
        if joined.is_main:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        try:
            joined.from_main(None)
        except RuntimeError:
            time.sleep(1.5)
            raise
    return 0


def test_a_stopped_rank_0_keeps_the_store_until_the_others_have_ended(tmp_path):
    code, out = run_ranks(__name__, ["stopped unheard"], 2, tmp_path / "log")
    assert code == 0 and out == "stopped before the first step (SIGTERM); nothing to save\n", out


def test_a_store_of_300_clients_starts_under_a_low_limit_of_open_files(tmp_path):
    assert run_ranks(__name__, ["many clients"], 1, tmp_path / "log") == (0, "heard 300\n")


def test_a_hard_limit_of_open_files_that_is_too_low_is_reported_in_one_line(tmp_path):
    each = [{"RANK": "0", "WORLD_SIZE": "300", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}]
    ended = await_ranks(fork_each(__name__, ["few files"], each, tmp_path / "log"), tmp_path / "log")
    line = "error: rank 0 of 300 opens up to 1,400 files, but the limit is 256: raise it with `ulimit -n 1400` "
    assert ended[0] == 2 and ended[1].startswith(line) and ended[1].count("\n") == 1


def on_nodes(what, folder):
    """Run ranks that simulate nodes of two ranks each. `what`: with "stop", rank 3 asks the others to stop; with
    "stall", rank 3 stalls; with "killed RANK", this rank kills itself."""
    rank = int(os.environ["RANK"])
    ranks.node_name = lambda: f"node {rank // 2}"
    with program.joined_program() as (joined, stop, heartbeats):
        stop.listen()
        print(
            f"{rank}: {joined.of_node} {[list(group.monitored) for group in joined.heartbeat_groups]}\n",
            end="",
            flush=True,
        )
        check_sums(joined)
        heartbeats.timeout, heartbeats.folder = (3.0 if what == "stall" else 60.0), Path(folder)
        if rank == 3 and what == "stop":
            heartbeats.request_stop("enough")
        if rank == 3 and what == "stall":
            stall_here(heartbeats)
        if what == f"killed {rank}":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stall":
            with heartbeats.waiting():  # like a rank that waits for its GPU, which takes CPU time
                joined.gather(None)
        while what.startswith("killed"):
            joined.sum([1.0])
        while not stop.requested:
            time.sleep(0.01)
        joined.gather(None)  # so that no rank exits before the others have finished
    return 0


def check_sums(joined):
    """Check that two concurrent sums are bitwise equal to those of a single all-reduce over all ranks."""
    values = [float(joined.rank), 2.0**45 + joined.rank, float(torch.tensor(0.1 * joined.rank)), 1.0]
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=joined.control)
    first, second = joined.start_sum(values), joined.start_sum([2 * value for value in values])
    assert [first(), second()] == [total.tolist(), (2 * total).tolist()] and total[3] == joined.world
    assert joined.sum(range(1000)) == [joined.world * number for number in range(1000)]


def stall_here(heartbeats):
    heartbeats.timeout = 6.0  # longer than on the other ranks, so that one of them detects the stall first
    time.sleep(20)


def test_ranks_of_a_node_monitor_its_leader_and_receive_stop_requests(tmp_path):
    """The last of the three nodes has only one rank."""
    code, output = run_ranks(__name__, ["nodes", "stop", str(tmp_path)], 5, tmp_path / "log")
    assert code == 0 and sorted(output.splitlines()) == [
        "0: [0, 1] [[1], [2, 4]]",
        "1: [0, 1] [[0]]",
        "2: [2, 3] [[3], [0]]",
        "3: [2, 3] [[2]]",
        "4: [4] [[], [0]]",
    ]


@pytest.mark.parametrize("killed", [3, 0])
def test_a_killed_rank_ends_the_others_during_an_all_reduce(tmp_path, killed):
    """All other ranks end, on both nodes. They report the killed rank, and exit with the code that requests a restart.
    This is also the case if rank 0 is killed, although the store ends with it."""
    processes = fork_ranks(__name__, ["nodes", f"killed {killed}", str(tmp_path)], 4, tmp_path / "log")
    _, output = await_ranks(processes, tmp_path / "log")
    assert [p.exitcode for p in processes] == [-signal.SIGKILL if rank == killed else 75 for rank in range(4)]
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert len(errors) == 1 if killed else 1 <= len(errors) <= 3
    who = "another rank" if killed else "rank 0"
    assert set(errors) == {f"error: {who} {LOST}. --resume auto continues from the last checkpoint"}


def test_a_stall_writes_the_stack_traces_of_all_ranks(tmp_path):
    """The leader of the node notices the silent rank, and all ranks write their stack traces."""
    folder, log = tmp_path / "stall", tmp_path / "log"
    processes = fork_ranks(__name__, ["nodes", "stall", str(folder)], 4, log)
    for process in processes[:3]:
        process.join(60)
    processes[3].kill()
    assert 75 in [process.exitcode for process in processes[:3]]
    line = (
        "error: rank 2, starting: for 3 s, no heartbeat from rank 3 (last activity: starting); --resume auto continues "
        "from the last checkpoint"
    )
    assert f"{line}; {folder} contains the stack traces of all ranks that respond\n" in log.read_text()
    stacks = {path.name: path.read_text() for path in folder.iterdir()}
    assert sorted(stacks) == [f"rank-{rank}.txt" for rank in range(4)]
    assert all(("stall_here" in text) == (name == "rank-3.txt") for name, text in stacks.items())
    assert all("all_gather_object" in stacks[f"rank-{rank}.txt"] for rank in range(3))


LOST = "exited; see its output for the reason, unless it was killed or its node was lost"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"), LOST),
        (RuntimeError("[gloo/transport/tcp/pair.cc:529] Read error [10.0.0.1]:1: Connection reset by peer"), LOST),
        (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed"), LOST),
        (dist.DistNetworkError("sendBytes failed: Broken pipe"), LOST),
        (dist.DistNetworkError("failed to send 8 bytes"), LOST),
        (OSError("Broken pipe"), None),  # raised by the program itself
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a loader worker was killed"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "/dev/shm is full"),
        (torch.OutOfMemoryError("CUDA out of memory. Broken pipe"), "out of memory: lower train.micro_batch"),
        (UserError("as it is"), "as it is"),
    ],
)
def test_errors_that_a_user_can_fix_are_explained_and_other_errors_are_bugs(error, message):
    found = explain(error)
    assert found is None if message is None else message in str(found)
    assert message != LOST or (str(found).startswith("another rank") and found.exit_code == 75)


@pytest.mark.parametrize(("cores", "here", "threads"), [(8, 2, 4), (8, 1, 8), (2, 3, 1), (7, 2, 3)])
def test_the_ranks_of_a_node_share_its_cores(monkeypatch, cores, here, threads):
    """The cores of a node are divided among the ranks of this node. A number of threads that the user has set is
    kept."""
    found = []
    variables = {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(here)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(None, 0, 16)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "all_gather_object", lambda hosts, host, group: None)
    monkeypatch.setattr(ranks, "heartbeat_groups", lambda *_: [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    ranks._join()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    ranks._join()
    assert found == [threads]


@pytest.mark.parametrize(("rank", "each"), [(0, 4), (1, 3)])
def test_the_required_number_of_open_files_is_that_of_the_connections(monkeypatch, rank, each):
    for limit, enough in ((100 * each + 200, True), (100 * each + 199, False), (resource.RLIM_INFINITY, True)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        refused = pytest.raises(UserError, match=f"rank {rank} of 100 opens up to {100 * each + 200} files, but")
        with nullcontext() if enough else refused:
            ranks._require_files(rank, 100)


def test_counts_are_summed_exactly_and_the_first_reported_error_is_kept():
    with ranks.join_ranks() as alone:
        assert alone.sum([2**40 + 1, 0.1]) == [2**40 + 1, 0.1]
        other = replace(alone, rank=1)
        found = [each.first_error(code) for each, code in ((other, 75), (alone, 2), (other, 75))]
        assert found == [(True, 75), (False, 75), (True, 75)]


@pytest.fixture
def join(monkeypatch):
    """Return a function that lets programs join as rank 1 of two. `first`: whether it is the first rank to fail."""

    def pretend(first: bool) -> None:
        store = dist.HashStore()
        rank = SimpleNamespace(
            rank=1,
            world=2,
            is_main=False,
            store=store,
            heartbeat_groups=[HeartbeatGroup(store, [0])],
            first_error=lambda code: (first, code),
            record_end=lambda: None,
        )
        rank.main_has_ended = lambda: False
        monkeypatch.setattr(program, "join_ranks", lambda device: nullcontext(rank))

    return pretend


@pytest.mark.parametrize("error", [UserError("no shard"), RuntimeError("Connection closed by peer")])
def test_only_the_first_rank_with_an_error_prints_it_and_all_ranks_exit_with_its_code(join, error):
    join(first=True)
    with pytest.raises(UserError) as shown, program.joined_program():
        raise error
    join(first=False)
    with pytest.raises(ErrorElsewhere) as end, program.joined_program():
        raise error
    assert str(end.value) == str(shown.value)
    assert end.value.exit_code == shown.value.exit_code == (2 if isinstance(error, UserError) else 75)


def test_connection_errors_after_a_rank_has_left_are_not_reported(join):
    """After a stop has been requested, an error is not reported, because other ranks may have closed their connections.
    Without such a request, an unexpected error gives a traceback on every rank."""
    for first in (True, False):
        join(first)
        with program.joined_program() as session:
            session.heartbeats.request_stop("SIGTERM")
            raise RuntimeError("Connection closed by peer")
        join(first)
        with pytest.raises(RuntimeError, match="a bug"), program.joined_program():
            raise RuntimeError("a bug")


@pytest.mark.parametrize("failing", [set(), {0}, {1}, {2}, {1, 2}])
@pytest.mark.parametrize("way", ["on_main", "broadcast", "together", "main_first"])
def test_work_on_a_rank_returns_its_result_or_ends_all_ranks(way, failing):
    """Each rank is a thread here."""
    world, box, barrier = 3, [None] * 3, threading.Barrier(3, timeout=20)

    class Thread(ranks.Ranks):
        def gather(self, value):
            box[self.rank] = value
            barrier.wait()
            found = list(box)
            barrier.wait()
            return found

        def from_main(self, value):
            return self.gather(value)[0]

    def run(number):
        own = Thread(number, world, 0, torch.device("cpu"), None, [], [], None, None, [], None)

        def work():
            done.append(number)
            if number in failing:
                raise UserError(f"rank {number} cannot")
            return f"of {number}"

        try:
            return getattr(own, way)(work)
        except UserError as error:
            return str(error)

    done = []
    found = map_threads(run, range(world))
    alone = way in ("on_main", "broadcast")
    relevant = failing & {0} if alone else failing
    if relevant:
        assert found == [f"rank {min(relevant)} cannot"] * world
    else:
        assert found == {"on_main": ["of 0", None, None], "broadcast": ["of 0"] * 3}.get(way, ["of 0", "of 1", "of 2"])
    assert sorted(done) == ([0] if alone or (way == "main_first" and 0 in failing) else [0, 1, 2])
    assert done[0] == 0 or way == "together"


@pytest.mark.parametrize(("rank", "failing", "runs"), [(1, 0, False), (1, 1, True), (0, 1, True), (0, 0, True)])
def test_other_ranks_begin_only_after_the_main_rank_has_succeeded(rank, failing, runs):
    """A failure of one rank is raised on both ranks."""
    done, turns = [], []

    class OneOfTwo(ranks.Ranks):
        """One of two ranks. If `failing` is set, the other rank fails."""

        def gather(self, value):
            other = 1 - rank
            theirs = ErrorReport("no shard", True) if other == failing and len(turns) >= other else None
            turns.append(value)
            return [value, theirs] if rank == 0 else [theirs, value]

    def work():
        done.append(rank)
        if rank == failing:
            raise UserError("no shard")

    with pytest.raises(UserError, match="no shard"):
        OneOfTwo(rank, 2, 0, torch.device("cpu"), None, [], [], None, None, [], None).main_first(work)
    # a failure ends both ranks after the turn in which it occurs
    assert done == [rank] * runs and len(turns) == 1 + failing


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out.npz"), UserError),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a file of the program"), FileNotFoundError),
        (KeyError("a bug"), KeyError),
    ],
)
def test_a_disk_error_on_the_main_rank_is_a_user_error_on_all_ranks_and_a_bug_is_raised_unchanged(error, kind):
    def work():
        raise error

    with ranks.join_ranks() as joined:
        for way in (joined.on_main, joined.broadcast, joined.together, joined.main_first):
            with pytest.raises(kind, match=error.args[-1]) as raised:
                way(work)
            assert (raised.value is error) == (kind is not UserError)


def _raise(error):
    raise error


def test_a_rank_that_ends_because_of_a_bug_on_another_rank_prints_nothing(join, capsys):
    join(first=True)
    with pytest.raises(ErrorElsewhere, match="rank 0 has failed"), program.joined_program():
        raise ErrorElsewhere("rank 0 has failed (KeyError: 1); see its output for details")
    assert exit_cleanly(lambda: _raise(ErrorElsewhere("rank 0 has failed"))) == 2
    assert capsys.readouterr() == ("", "")


def test_a_rank_that_finishes_indexing_late_still_starts(tmp_path):
    assert run_ranks(__name__, ["late"], 2, tmp_path / "log") == (0, "2 ranks\n" * 2)


def test_other_ranks_find_the_files_of_rank_0(tmp_path):
    assert run_ranks(__name__, ["made", str(tmp_path / "made")], 2, tmp_path / "log") == (0, "2 ranks\n" * 2)


def test_a_failure_on_one_rank_ends_all_ranks_with_one_line(tmp_path):
    assert run_ranks(__name__, ["fail"], 2, tmp_path / "log") == (2, "error: rank 1 finds no shard\n")


def with_a_mistake(rank):
    """Let one rank find a user error that the others do not see. Meanwhile, rank 1 waits in a sum and rank 2
    computes."""
    ranks._OTHERS_S = 1.0
    with program.joined_program() as (joined, _, heartbeats):
        heartbeats.timeout = 3.0  # with heartbeats every 0.3 s
        joined.sum([1.0])
        if joined.rank == int(rank):
            raise UserError(f"rank {rank} finds no shard")
        if joined.rank == 2:
            time.sleep(1.5)
        joined.sum([1.0])
    return 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_user_error_on_one_rank_is_printed_once_and_all_ranks_exit_with_its_code(tmp_path, rank):
    """This is also the case for rank 0, which hosts the store, and for rank 2, which still computes when the store has
    ended."""
    processes = fork_ranks(__name__, ["mistake", str(rank)], 3, tmp_path / "log")
    output = await_ranks(processes, tmp_path / "log")[1]
    assert [line for line in output.splitlines() if "error" in line] == [f"error: rank {rank} finds no shard"]
    assert [process.exitcode for process in processes] == [2, 2, 2]


PROGRAMS = {
    "mistake": with_a_mistake,
    "many clients": many_clients,
    "stopped unheard": stopped_unheard,
    "few files": few_files,
    "nodes": on_nodes,
}
