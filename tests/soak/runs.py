"""Runs of a tiny model that are started again after each fault until they are complete, and their results."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import psutil

from m3ae_fast import checkpoint
from m3ae_fast.images.suffixes import IMAGE_SUFFIXES
from m3ae_fast.shards.tar_member import add_member
from tests.helpers.image_formats import CASES
from tests.helpers.ranks import free_port
from tests.soak.faults import AWAKE_S, DAMAGES, FAULTS, FREEZE, FULL_DISK, STOPS, Running, no_large_files

ROOT = Path(__file__).parents[2]
CLIPART = ROOT / "data/openclipart"
SCRIPT = str(ROOT / "m3ae_fast/train.py")
STEPS = 60
RUNS, STARTS = 12, 14  # maximum numbers of disturbed runs, and of starts of a run
LIMIT_S = 600.0  # time limit of a start in seconds
STARTING_S = 6.0  # seconds after the start of a trainer within which it does not take its first step yet
LEAVING_S = 40.0  # time limit in seconds for processes to exit after their launcher
CONFIG = {
    "run": {"stall_timeout": 10},
    "model": {
        "size": None, "emb_dim": 32, "depth": 2, "num_heads": 4, "dec_emb_dim": 32, "dec_depth": 2, "dec_num_heads": 4,
        "image_size": 32, "patch_size": 8, "text_length": 16, "vocab_size": 2048,
    },
    "data": {
        "train": [{"shards": "the server's"}, {"shards": "one with broken samples"}],
        "val": [{"shards": str(CLIPART / "val-0000.tar")}],
        "tokenizer": str(CLIPART / "tokenizer.json"),
        "workers": 2,
    },
    "optim": {"peak_lr": 2e-2, "warmup_epochs": 0, "clip_grad": 1.0},
    "train": {
        "global_batch": 16, "micro_batch": 8, "steps": STEPS, "precision": "fp32", "log_every": 1, "eval_every": 20,
        "eval_samples": 33, "save_every": 5, "keep": 2, "pictures": 0,
    },
    "deepspeed": None,
}  # fmt: skip
ODD_CAPTIONS = (  # unusual captions, some of which are invalid; none may affect other samples
    b"", b" \n", b"a\0cat\0", b"\0" * 64, b"\xff\xfe\x00a", b"cat " * 20_000, b"a" * 100_000,
    "\u202ec\u0301at \U0001f408".encode(),
)  # fmt: skip
_SPLIT = {"zero_optimization": {"stage": 3}}
# Number of ranks and the deepspeed section. With 33 held-out samples, evaluated 16 at a time, the second rank has no
# sample in the last batch.
LAYOUTS = {
    "1 rank": (1, None),
    "2 ranks": (2, None),
    "2 ranks with ZeRO-3": (2, _SPLIT),
}
_BITWISE = (
    "step",
    "loss",
    "image_loss",
    "text_loss",
    "grad_norm",
    "lr",
    "val_image_loss",
    "val_text_loss",
    "val_rankme",
)


@dataclass
class Outcome:
    """The logged values and the final weights of a run."""

    trajectory: list[list[float | None]]
    checksums: dict[str, str]  # checksums of the files of the last checkpoint's tensors


class Soak:
    """Runs of a tiny model under faults, and the same run without faults.

    Args:
        folder: folder for the runs.
        url: address of the server that provides train-0000.tar.
        layout: key of LAYOUTS.
        faults: names of the faults to inject, each once.
        seed: random seed of the times at which the faults are injected.
    """

    def __init__(self, folder: Path, url: str, layout: str, faults: Iterable[str], seed: int) -> None:
        self.folder, self.layout, self.faults, self.chance = folder, layout, [*faults], random.Random(seed)
        self.injected: list[str] = []
        self.wrong: list[str] = []  # descriptions of failures, one line each
        self._config = folder / "config.json"
        config = json.loads(json.dumps(CONFIG))
        config["data"]["train"][0]["shards"] = f"{url}/train-0000.tar"
        config["data"]["train"][1]["shards"] = str(_with_broken_samples(folder / "broken.tar"))
        self._config.write_text(json.dumps(config))

    def run(self) -> None:
        """Execute runs until each fault has been injected, and record how they differ from an undisturbed run."""
        expected = self._run_untouched()
        for number in range(RUNS):
            if self.faults:
                self._run_disturbed(f"disturbed-{number}", expected)

    def _run_disturbed(self, name: str, expected: Outcome) -> None:
        for _ in range(STARTS):
            fault = self._choose(self.folder / name)
            happened, code, out = self._start(name, fault)
            if fault:
                (self.injected if happened else self.faults).append(fault)
            self._check(name, fault if happened else None, code, out)
            if code == 0 and self._complete(name) and "--resume auto" not in out:
                break
        if not self._complete(name):
            self.wrong.append(f"{name}: not complete after {STARTS} starts; last: {out[-300:]!r}")
        elif self._outcome(name) != (expected.trajectory, expected.checksums):
            self.wrong.append(f"{name}: {self._difference(name, expected)}")

    def _run_untouched(self) -> Outcome:
        _, code, out = self._start("untouched", None)
        assert code == 0 and self._complete("untouched"), f"a run without faults failed:\n{out}"
        return Outcome(*self._outcome("untouched"))

    def _choose(self, run_dir: Path) -> str | None:
        """Return the name of the next fault that is possible now, or None. If the fault damages files, the damage is
        done at once."""
        for fault in self.faults:
            if fault not in DAMAGES or DAMAGES[fault](run_dir, self.chance):
                self.faults.remove(fault)
                return fault
        return None

    def _check(self, name: str, fault: str | None, code: int, out: str) -> None:
        if own := re.search(rf'  File "{ROOT}/m3ae_fast/.*', out, re.DOTALL):
            # only the first traceback is reported, because others are its consequences
            self.wrong.append(f"{name}: a traceback: {own[0].strip()[:1500]!r}")
        ranks, _ = LAYOUTS[self.layout]
        saves = fault in STOPS or (ranks == 1 and fault and fault.startswith("all processes get"))
        # the signal came after the end of the run, when its handlers had been removed
        struck_at_exit = code < 0 and self._complete(name)
        if code and not struck_at_exit and (saves or fault is None or fault == "all processes are suspended"):
            reason = "\n".join(re.findall(r"^error: .*", out, re.MULTILINE)) or out.strip()[-300:]
            self.wrong.append(f"{name}: exit code {code}: {reason!r}")
        if "remove the folder to" in out:  # follows the advice in the message
            shutil.rmtree(checkpoint.saved_steps(self.folder / name)[-1])

    def _start(self, name: str, fault: str | None) -> tuple[bool, int, str]:
        """Start the trainer and inject the fault: in a third of the cases during the start of the trainer, otherwise
        after a random number of steps.

        Return whether the fault was injected, the exit code, and the output.
        """
        run_dir, (ranks, deepspeed) = self.folder / name, LAYOUTS[self.layout]
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
        options = ["--set", f"run.dir={run_dir}", "--set", f"data.cache_dir={run_dir / 'cache'}", "--resume", "auto"]
        options += ["--set", f"deepspeed={json.dumps(deepspeed)}"]
        with open(self.folder / "log", "w+", encoding="utf-8", errors="replace") as log:
            process = subprocess.Popen(
                [sys.executable, *(launch if ranks > 1 else []), SCRIPT, "--config", str(self._config), *options],
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=no_large_files if fault == FULL_DISK else None,
            )
            running = Running(run_dir, process.pid, self.chance)
            happened = fault is not None and fault not in FAULTS
            early, now = fault != FREEZE and self.chance.random() < 1 / 3, time.monotonic()
            strike, limit = now + (self.chance.uniform(AWAKE_S, STARTING_S) if early else 0.0), now + LIMIT_S
            # soon after the first step of this start, so that steps are left for the other faults
            step = 0 if early else min(_step(run_dir) + self.chance.randint(1, STEPS // 8), STEPS - 1)
            while process.poll() is None and time.monotonic() < limit:
                if fault in FAULTS and not happened and time.monotonic() > strike and _step(run_dir) >= step:
                    happened = FAULTS[fault](running)
                time.sleep(0.05)
            if process.poll() is None:
                self.wrong.append(f"{name}: still running after {LIMIT_S:.0f} s")
                process.kill()
            self._check_exit(name, running)
            code = process.wait()
            log.seek(0)
            return happened, code, log.read()

    def _check_exit(self, name: str, running: Running) -> None:
        """Record a failure if processes other than frozen ones do not exit by themselves after their launcher."""
        left = running.processes()
        for process in left:
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_STOPPED:
                    process.send_signal(signal.SIGKILL)
        for orphan in psutil.wait_procs(left, timeout=LEAVING_S)[1]:
            self.wrong.append(f"{name}: process {orphan.pid} outlived its launcher")
            orphan.kill()

    def _complete(self, name: str) -> bool:
        saved = checkpoint.saved_steps(self.folder / name)
        return bool(saved) and checkpoint.step_of(saved[-1]) == STEPS

    def _outcome(self, name: str) -> tuple[list[list[float | None]], dict[str, str]]:
        """Return the losses, gradient norms and learning rates of all steps, and the checksums of the last
        checkpoint."""
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        trajectory = [[line.get(key) for key in _BITWISE] for line in lines]
        info = checkpoint.read_info(checkpoint.saved_steps(self.folder / name)[-1])
        return trajectory, info.sha256

    def _difference(self, name: str, expected: Outcome) -> str:
        """Return a description of the difference from the undisturbed run; "" if there is none."""
        trajectory, _ = self._outcome(name)
        for found, wanted in itertools.zip_longest(trajectory, expected.trajectory):
            if found != wanted:
                return f"logged {found} instead of {wanted}"
        return "the last checkpoint differs"


def _step(run_dir: Path) -> int:
    """Return the last logged step."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    return 0


def _with_broken_samples(path: Path) -> Path:
    """Write a shard with images of all kinds, unusual captions and truncated images (one in sixteen). The shard ends in
    the middle of its last sample."""
    odd = _odd_samples()
    with tarfile.open(CLIPART / "train-0001.tar") as source, tarfile.open(path, "w") as shard:
        for i, member in enumerate(source.getmembers()):
            data = cast("IO[bytes]", source.extractfile(member)).read()
            if member.name.endswith(".jpg") and i % 16 == 0:
                data = data[: len(data) // 2]
            add_member(shard, member.name, data)
            if i % 8 == 0:
                for name, part in next(odd, {}).items():
                    add_member(shard, name, part)
        assert next(odd, None) is None
    os.truncate(path, path.stat().st_size - 12_000)
    return path


def _odd_samples() -> Iterator[dict[str, bytes]]:
    """Yield unusual samples as members by suffix: images of different kinds with the unusual captions in turn."""
    suffixes = {"JPEG": "jpg", "TIFF": "tif", "JPEG 2000": "jp2"}
    for number, (case, caption) in enumerate(zip(CASES, itertools.cycle(ODD_CAPTIONS))):
        suffix = suffixes.get(case.fmt, case.fmt.lower())
        yield {
            f"odd-{number}.{suffix if suffix in IMAGE_SUFFIXES else 'jpg'}": case.make(),
            f"odd-{number}.txt": caption,
        }
