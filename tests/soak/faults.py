"""Faults that are injected into a run: into its processes while they are running, and into its files between two
starts."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from m3ae_fast import checkpoint
from m3ae_fast.training.run_lock import LOCK_FILE

AWAKE_S = 1.0  # seconds after which a process handles signals
SUSPENDED_S = 12.0  # duration of a suspension, which is longer than `run.stall_timeout`
SMALL_FILE = 400_000  # bytes; a checkpoint is larger


@dataclass
class Running:
    """A running trainer: its launcher (the rank itself if there is only one), ranks and loader workers."""

    run_dir: Path
    launcher: int  # process id
    chance: random.Random

    def processes(self) -> list[psutil.Process]:
        """Return all running processes, including orphans."""
        mine = f"run.dir={self.run_dir}"
        return [p for p in psutil.process_iter(["cmdline"]) if mine in (p.info["cmdline"] or ())]

    def ranks(self) -> list[psutil.Process]:
        """Return the ranks that have been running long enough to handle signals."""
        found = [p for p in self.processes() if not any("torch.distributed.run" in word for word in p.info["cmdline"])]
        pids, ranks = {p.pid for p in found}, []
        for process in found:
            with contextlib.suppress(psutil.Error):
                if process.ppid() not in pids and time.time() - process.create_time() > AWAKE_S:
                    ranks.append(process)
        return ranks

    def workers(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return [child for rank in self.ranks() for child in rank.children()]
        return []


def _send(running: Running, processes: list[psutil.Process], number: int) -> bool:
    """Send a signal to one of the processes, chosen at random. Return False if there are none yet."""
    with contextlib.suppress(psutil.Error):
        if processes:
            running.chance.choice(processes).send_signal(number)
            return True
    return False


def _to_rank(number: int) -> Fault:
    return lambda running: _send(running, running.ranks(), number)


def _to_worker(number: int) -> Fault:
    return lambda running: _send(running, running.workers(), number)


def _to_all(number: int) -> Fault:
    """Return a fault that sends a signal to launcher, ranks and workers, as schedulers do."""

    def send(running: Running) -> bool:
        if not running.ranks():
            return False
        for process in running.processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        return True

    return send


def _to_launcher(number: int) -> Fault:
    def send(running: Running) -> bool:
        if not running.ranks():
            return False
        os.kill(running.launcher, number)
        return True

    return send


def _suspend(running: Running) -> bool:
    """Suspend all processes and resume them, as when a laptop or a virtual machine is suspended."""
    processes = running.processes() if running.ranks() else []
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        time.sleep(SUSPENDED_S if processes and number == signal.SIGSTOP else 0)
    return bool(processes)


def _freeze_rank(running: Running) -> bool:
    """Freeze one of several ranks forever. A single rank is not frozen, because no other rank could notice it."""
    ranks = running.ranks()
    return len(ranks) > 1 and _send(running, ranks, signal.SIGSTOP)


def _remove_lock(running: Running) -> bool:
    with contextlib.suppress(FileNotFoundError):
        (running.run_dir / LOCK_FILE).unlink()
        return True
    return False


FREEZE = "a rank is frozen"
Fault = Callable[[Running], bool]  # returns whether the fault was injected; otherwise, it is tried again
STOPS: dict[str, Fault] = {  # faults after which the trainer saves and exits with code 0
    "a rank gets SIGTERM": _to_rank(signal.SIGTERM),
    "a rank gets SIGINT": _to_rank(signal.SIGINT),
    "a rank gets SIGUSR1": _to_rank(signal.SIGUSR1),
}
FAULTS: dict[str, Fault] = STOPS | {
    "all processes get SIGTERM": _to_all(signal.SIGTERM),
    "all processes get SIGINT": _to_all(signal.SIGINT),
    "a rank is killed": _to_rank(signal.SIGKILL),
    "the launcher gets SIGTERM": _to_launcher(signal.SIGTERM),
    "the launcher is killed": _to_launcher(signal.SIGKILL),
    "a loader worker is killed": _to_worker(signal.SIGKILL),
    FREEZE: _freeze_rank,
    "a loader worker is frozen": _to_worker(signal.SIGSTOP),
    "all processes are suspended": _suspend,
    "the lock file is removed": _remove_lock,
}


def _damage(path: Path, chance: random.Random) -> bool:
    if not (path.is_file() and (size := path.stat().st_size)):
        return False
    with open(path, "r+b") as file:
        file.seek(chance.randrange(size))
        file.write(b"damaged")
        file.truncate(max(1, size - chance.choice((0, chance.randrange(size)))))
    return True


def _damage_checkpoint(run_dir: Path, chance: random.Random) -> bool:
    last = checkpoint.saved_steps(run_dir)[-1:]
    # "*.*" matches only files with a suffix, so the marks "good" and "failed" are not damaged
    return any([_damage(chance.choice(sorted(path.glob("*.*"))), chance) for path in last])


def _damage_cache(folder: str) -> Damage:
    return lambda run_dir, chance: any([_damage(path, chance) for path in (run_dir / "cache" / folder).glob("*")])


def _empty_cache(run_dir: Path, chance: random.Random) -> bool:
    shutil.rmtree(run_dir / "cache", ignore_errors=True)
    return True


Damage = Callable[[Path, random.Random], bool]  # returns whether there was anything to damage
DAMAGES: dict[str, Damage] = {
    "the last checkpoint is damaged": _damage_checkpoint,
    "the index of a shard is damaged": _damage_cache("index"),
    "the cached copy of a shard is damaged": _damage_cache("shards"),
    "the cache is deleted": _empty_cache,
}
FULL_DISK = "the disk is full"


def no_large_files() -> None:
    """Make all further writes of checkpoints and of cached shards fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE))
