"""Translation of the environment variables of SLURM's srun and of MPI launchers into those of torchrun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple
from zlib import crc32

from m3ae_fast.base.errors import UserError

_FIRST_PORT, _PORTS = 10_000, 20_000  # below the ports that operating systems assign to clients


class Launcher(NamedTuple):
    """Names of the environment variables that a launcher sets. If there are several alternative names, the first
    variable that is set is used."""

    name: str
    rank: str
    world: str
    local_rank: tuple[str, ...]
    local_world: tuple[str, ...]
    job: tuple[str, ...]  # variables that distinguish the runs on a node


LAUNCHERS = (
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",), (), ("SLURM_JOB_ID", "SLURM_STEP_ID")),
    Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    Launcher(
        "mpiexec",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
        ("PMI_JOBID", "PALS_APID"),
    ),
)
_HOSTS = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")


def adopt(environment: MutableMapping[str, str]) -> None:
    """Set torch's environment variables for distributed runs if srun or an MPI launcher has started several processes.
    Variables that are already set are kept. Raises UserError if WORLD_SIZE is 1 although the launcher has started
    several processes, or if the local rank or the address of rank 0 is unknown."""
    found = next((one for one in LAUNCHERS if environment.keys() >= {one.rank, one.world}), None)
    if found is None or environment[found.world] == "1":
        return
    if environment.get("WORLD_SIZE") == "1":
        raise UserError(
            f"{found.name} has started {environment[found.world]} processes, but WORLD_SIZE=1 makes each a separate "
            f"run: start `{found.name} python m3ae_fast/train.py` without WORLD_SIZE, or torchrun with --nnodes and "
            f"--rdzv-endpoint; if separate runs are intended, unset {found.world}"
        )
    if "WORLD_SIZE" not in environment and "RANK" not in environment:
        for name, value in _read(found, environment).items():
            environment.setdefault(name, value)


def alone() -> bool:
    """Return whether this process is the only rank. Raises UserError as `adopt` does."""
    return _adopted().get("WORLD_SIZE", "1") in ("", "1")


def is_first_rank() -> bool:
    """Return whether this process is rank 0, or the only one. Raises UserError as `adopt` does."""
    return _adopted().get("RANK", "0") == "0"


def _adopted() -> dict[str, str]:
    environment = dict(os.environ)
    adopt(environment)
    return environment


def _read(launcher: Launcher, environment: Mapping[str, str]) -> dict[str, str]:
    variables = {"RANK": environment[launcher.rank], "WORLD_SIZE": environment[launcher.world]}
    local_rank = _first(environment, ("LOCAL_RANK", *launcher.local_rank))
    if local_rank is None:
        raise UserError(
            f"{launcher.name} does not set the local rank of its processes ({', '.join(launcher.local_rank)}): "
            "set LOCAL_RANK"
        )
    local_world = _first(environment, launcher.local_world) or _of_step(environment) or "1"
    variables |= {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_world}
    hosts = _first(environment, _HOSTS)
    if hosts is None and local_world != variables["WORLD_SIZE"] and "MASTER_ADDR" not in environment:
        raise UserError(f"{launcher.name} does not provide the address of rank 0: set MASTER_ADDR to its host")
    variables["MASTER_ADDR"] = first_host(hosts) if hosts else "127.0.0.1"
    job = ".".join(environment.get(name, "") for name in launcher.job)
    variables["MASTER_PORT"] = str(_FIRST_PORT + crc32(job.encode()) % _PORTS)
    return variables


def first_host(nodes: str) -> str:
    """Return the first host of a list in SLURM's notation, such as gpu003 for `gpu[003-008,011],login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # the pattern also matches the empty string
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _of_step(environment: Mapping[str, str]) -> str | None:
    """Return the number of tasks on this node, from SLURM's list for all nodes, such as `8(x62),4`; None if there is no
    list."""
    counts: list[str] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [match[1]] * int(match[2] or 1)
    node = environment.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((environment[name] for name in names if name in environment), None)
