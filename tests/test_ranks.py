"""How ranks wait for each other."""

import contextlib
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
from m3ae_fast.process import program, ranks
from tests.helpers.ranks import run_ranks

TIMEOUT_S = 3.0  # of collectives, and of stalls


def main(argv):
    """Rank 1 is at work for longer than any timeout, or fails, while rank 0 waits; then both compute together."""
    if argv == ["standing by"]:
        return standing_by()
    ranks.TIMEOUT = timedelta(seconds=TIMEOUT_S)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with program.joined_program() as (joined, _, pulse, _):
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


def sockets(pid):
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the folder itself
            found |= {link for link in [os.readlink(file)] if link.startswith("socket:")}
    return found


def standing_by():
    """Say what CUDA is asked, and whether this rank and its fetcher have connections."""
    touched, before = [], sockets(os.getpid())
    begin, available = program.standby, torch.cuda.is_available
    program.standby = lambda: touched.append("fetcher") or begin()
    torch.cuda.is_available = lambda: touched.append("cuda") or available()
    with program.joined_program() as session:
        own, its = (len(sockets(pid) - before) > 0 for pid in (os.getpid(), session.fetcher.process.pid))
        print(touched[0], "cuda" in touched, own, its, session.fetcher.process.is_alive(), flush=True)
    return 0


def test_what_is_to_fetch_begins_before_connections_and_cuda(tmp_path):
    assert run_ranks(__name__, ["standing by"], 2, tmp_path / "log") == (0, "fetcher True True False True\n" * 2)


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
