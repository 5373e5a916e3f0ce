"""How ranks wait for each other."""

import hashlib
import os
import resource
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from m3ae_fast.errors import UserError
from m3ae_fast.process import ranks
from m3ae_fast.process.failures import explain
from m3ae_fast.process.program import joined_program
from tests.helpers.ranks import run_ranks

TIMEOUT_S = 3.0  # of collectives, and of stalls


def main(argv):
    """Rank 1 is at work for longer than any timeout, or fails, while rank 0 waits; then both compute together."""
    ranks.TIMEOUT = timedelta(seconds=TIMEOUT_S)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with joined_program() as (joined, _, pulse):
        pulse.timeout = TIMEOUT_S
        assert joined.of_node == [0, 1]
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

        assert joined.main_first(work, pulse.waiting) == joined.rank
        total = torch.ones(1)
        dist.all_reduce(total)  # in the group that has the short timeout
        print(f"{total.item():g} ranks\n", end="", flush=True)  # in one piece: the ranks share the output
    return 0


LOST = "another rank has ended; its output says why"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"), LOST),
        (RuntimeError("[gloo/transport/tcp/pair.cc:529] Read error [10.0.0.1]:1: Connection reset by peer"), LOST),
        (dist.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed"), LOST),
        (dist.DistNetworkError("sendBytes failed: Broken pipe"), LOST),
        (dist.DistNetworkError("failed to send 8 bytes"), LOST),
        (OSError("Broken pipe"), None),  # that of a program's own
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a loader worker was killed"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "/dev/shm is full"),
        (torch.OutOfMemoryError("CUDA out of memory. Broken pipe"), "out of memory: lower train.micro_batch"),
        (UserError("as it is"), "as it is"),
    ],
)
def test_what_a_user_can_mend_is_told_and_the_rest_is_a_bug(error, told):
    found = explain(error)
    assert found is None if told is None else str(found).startswith(told)


@pytest.mark.parametrize(("cores", "here", "threads"), [(8, 2, 4), (8, 1, 8), (2, 3, 1), (7, 2, 3)])
def test_the_ranks_of_a_node_share_its_cores(monkeypatch, cores, here, threads):
    """Not those of all nodes; what the user sets stays."""
    found = []
    variables = {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(here)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_connect", lambda *_: (None, None, None))
    monkeypatch.setattr(dist, "all_gather_object", lambda hosts, host, group: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    ranks._join()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    ranks._join()
    assert found == [threads]


def test_a_node_is_of_the_ranks_on_one_machine():
    hosts = ["a", "a", "b", "a", "b"]
    nodes = [ranks.Ranks(rank, 5, 0, torch.device("cpu"), None, hosts, None, None).of_node for rank in range(5)]
    assert nodes == [[0, 1, 3], [0, 1, 3], [2, 4], [0, 1, 3], [2, 4]]


def test_what_the_disk_refuses_the_main_rank_is_a_line_for_all(tmp_path):
    def read():
        return (tmp_path / "nothing").read_text()

    with ranks.join_ranks() as joined:
        for way in (joined.on_main, joined.broadcast, joined.main_first):
            with pytest.raises(UserError, match=r"No such file .*nothing"):
                way(read)


def test_a_rank_that_is_late_in_indexing_still_starts(tmp_path):
    assert run_ranks(__name__, ["late"], 2, tmp_path / "log") == (0, "2 ranks\n" * 2)


def test_the_others_find_what_rank_0_made(tmp_path):
    assert run_ranks(__name__, ["made", str(tmp_path / "made")], 2, tmp_path / "log") == (0, "2 ranks\n" * 2)


def test_what_one_rank_cannot_do_ends_all_with_one_line(tmp_path):
    assert run_ranks(__name__, ["fail"], 2, tmp_path / "log") == (2, "error: rank 1 finds no shard\n")
