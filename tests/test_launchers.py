"""The processes that srun, mpirun or mpiexec start form one run, according to the launcher's environment variables."""

import json
import os
from pathlib import Path
from zlib import crc32

import pytest

from m3ae_fast.base.errors import UserError
from m3ae_fast.process.launchers import adopt, alone, first_host
from tests.helpers import ranks as helper

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "502",
    "SLURM_LOCALID": "6",
    "SLURM_NODEID": "62",
    "SLURM_STEP_NUM_TASKS": "508",
    "SLURM_STEP_TASKS_PER_NODE": "8(x62),6(x2)",
    "SLURM_STEP_NODELIST": "gpu[003-065,070],login1",
}
OMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-a-1@1",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1", "MASTER_ADDR": "head"}
WORDS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def adopted(environment):
    environment = dict(environment)
    adopt(environment)
    return environment


@pytest.mark.parametrize(("environment", "expected"), [
    (SLURM, ("502", "508", "6", "6", "gpu003")),
    (SLURM | PMI, ("502", "508", "6", "6", "head")),  # srun --mpi=pmi2; variables that the user has set are kept
    (SLURM | {"SLURM_NODEID": "64"}, ("502", "508", "6", "1", "gpu003")),  # the 64 nodes have the ids 0 to 63
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x62),4,2"}, ("502", "508", "6", "4", "gpu003")),
    # the nodes of the job are ignored, because those of the step are known
    (SLURM | {"SLURM_JOB_NODELIST": "login1,gpu[003-065]"}, ("502", "508", "6", "6", "gpu003")),
    (OMPI, ("3", "4", "3", "4", "127.0.0.1")),
    (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "SLURM_NODELIST": "b1,b2"}, ("3", "4", "3", "2", "b1")),
    # mpirun starts its daemons with srun, one per node
    (OMPI | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "0"}, ("3", "4", "3", "4", "127.0.0.1")),
    (PMI, ("1", "2", "0", "1", "head")),
])  # fmt: skip
def test_environment_variables_of_launchers_are_recognised(environment, expected):
    assert tuple(adopted(environment)[word] for word in WORDS) == expected


def test_torchs_own_variables_take_precedence():
    torchrun = SLURM | {"RANK": "1", "WORLD_SIZE": "2"}
    assert adopted(torchrun) == torchrun
    for name in ("RANK", "WORLD_SIZE"):
        some = {key: value for key, value in torchrun.items() if key != name}
        assert adopted(some) == some
    alone = {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}  # a shell that was started by srun
    assert adopted(alone) == alone
    script = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NUM_TASKS"}  # sbatch, without srun
    assert adopted(script) == script
    assert adopted({}) == {}


def test_jobs_on_the_same_node_use_different_ports():
    jobs = [SLURM, SLURM | {"SLURM_STEP_ID": "1"}, SLURM | {"SLURM_JOB_ID": "4712"}]
    ports = [int(adopted(job)["MASTER_PORT"]) for job in jobs]
    assert ports[0] == 10_000 + crc32(b"4711.0") % 20_000  # the same in every process
    assert len(set(ports)) == 3 and all(10_000 <= port < 30_000 for port in ports)
    assert {adopted(SLURM | {"SLURM_PROCID": str(rank)})["MASTER_PORT"] for rank in range(4)} == {str(ports[0])}


@pytest.mark.parametrize(("nodes", "first"), [
    ("node7", "node7"), ("a,b", "a"), ("n[1-4]", "n1"), ("n[007,9-12]-ib,m", "n007-ib"), ("r[1-2]n[05-8],x", "r1n05"),
])  # fmt: skip
def test_the_first_host_of_a_node_list_is_found(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("environment", [SLURM, OMPI, PMI])
def test_separate_runs_of_one_rank_that_a_launcher_started_as_one_run_are_refused(environment):
    with pytest.raises(UserError, match="WORLD_SIZE=1 makes each a separate run: start `"):
        adopt(environment | {"RANK": "0", "WORLD_SIZE": "1"})


def test_the_error_names_variables_that_a_launcher_does_not_set():
    with pytest.raises(UserError, match=r"mpiexec .*: set LOCAL_RANK"):
        adopt({"PMI_RANK": "1", "PMI_SIZE": "2"})
    with pytest.raises(UserError, match="the address of rank 0: set MASTER_ADDR"):
        adopt(OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


def main(argv):
    """Write the rank, the local rank and the ranks per node of each process to a file."""
    from m3ae_fast.process.ranks import join_ranks

    with join_ranks() as ranks:
        everybody = ranks.gather([ranks.rank, ranks.local_rank, os.environ["LOCAL_WORLD_SIZE"]])
        if ranks.is_main:
            Path(argv[0]).write_text(json.dumps(everybody))
    return 0


def test_processes_started_by_srun_form_one_run(tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    slurm = SLURM | {
        "SLURM_JOB_ID": str(os.getpid()),  # the port depends on it
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "localhost",
    }
    found = [slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    code, output = helper.await_ranks(helper.fork_each(__name__, [str(out)], found, log), log)
    assert code == 0, output
    assert json.loads(out.read_text()) == [[0, 0, "2"], [1, 1, "2"]]


@pytest.mark.parametrize(("world_size", "one"), [(None, True), ("", True), ("1", True), ("2", False)])
def test_an_empty_number_of_ranks_means_one_rank(monkeypatch, world_size, one):
    monkeypatch.setattr(os, "environ", {} if world_size is None else {"WORLD_SIZE": world_size})
    assert alone() is one
