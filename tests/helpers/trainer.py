"""A tiny config, overrides for a short run of `pretrain`, and functions to run the trainer in separate processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.ranks import Process, environment, fork_ranks, free_port, run_ranks

ROOT = Path(__file__).parents[2]
CLIPART = ROOT / "data/openclipart"
TINY = {
    "model": {
        "size": None,
        "emb_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "dec_emb_dim": 32,
        "dec_depth": 2,
        "dec_num_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "text_length": 16,
        "vocab_size": 2048,
    },
    "data": {
        "train": [{"shards": str(CLIPART / "train-0000.tar")}],
        "val": [{"shards": str(CLIPART / "val-0000.tar")}],
        "tokenizer": str(CLIPART / "tokenizer.json"),
        "workers": 1,
    },
    "optim": {"peak_lr": 2e-2, "warmup_epochs": 0, "clip_grad": 1.0},
    "train": {
        "global_batch": 16,
        "micro_batch": 4,
        "steps": 6,
        "precision": "fp32",
        "log_every": 1,
        "eval_samples": 8,
        "pictures": 0,
    },
    "deepspeed": None,
}
# overrides with which `pretrain` trains a tiny model for two steps
SHORT = ["train.steps=2", "train.global_batch=4", "model.size=null", "model.emb_dim=16", "model.depth=1",
         "model.num_heads=2", "model.dec_emb_dim=16", "model.dec_depth=1", "model.dec_num_heads=2"]  # fmt: skip


class Trainer:
    """Runs m3ae_fast/train.py with the tiny config. Each run has its own folder below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "tiny.json"
        self.config.write_text(json.dumps(TINY))

    def arguments(self, run: str, *options: str) -> list[str]:
        return ["--config", str(self.config), "--set", f"run.dir={self.folder / run}", *options]

    def command(self, run: str, *options: str, ranks: int = 1, launcher: str = "torchrun") -> list[str]:
        script = [str(ROOT / "m3ae_fast/train.py"), *self.arguments(run, *options)]
        if launcher == "deepspeed":
            port = f"--master_port={free_port()}"
            return [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), port, *script]
        if ranks == 1:
            return [sys.executable, *script]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        return [*torchrun, "--master-port", str(free_port()), *script]

    def start(self, run: str, *options: str, **kwargs) -> subprocess.Popen:
        """Start the trainer in new processes as users do, through a launcher if there are several ranks."""
        return subprocess.Popen(
            self.command(run, *options, **kwargs),
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def launch(self, run: str, *options: str, code: int = 0, **kwargs) -> str:
        """Run the trainer in new processes as users do, require the exit code `code`, and return the output."""
        process = self.start(run, *options, **kwargs)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == code, out
        return out

    def fork(self, run: str, *options: str) -> Process:
        """Start a rank in a forked process, in its own session. Its output is written to `log(run)`."""
        (process,) = fork_ranks("m3ae_fast.train", self.arguments(run, *options), 1, self.log(run))
        return process

    def __call__(self, run: str, *options: str, code: int = 0, ranks: int = 1) -> str:
        """Run the trainer in forked processes, require the exit code `code`, and return the output."""
        self.log(run).unlink(missing_ok=True)
        found, out = run_ranks("m3ae_fast.train", self.arguments(run, *options), ranks, self.log(run))
        assert found == code, out
        return out

    def log(self, run: str) -> Path:
        return self.folder / f"{run}.log"

    def lines(self, run: str, *names: str) -> list[tuple]:
        """Return the step and the named values of each logged line that contains all of these values."""
        lines = map(json.loads, (self.folder / run / "metrics.jsonl").read_text().splitlines())
        return [tuple(line[name] for name in ("step", *names)) for line in lines if line.keys() >= set(names)]

    def losses(self, run: str) -> list[tuple]:
        return self.lines(run, "loss", "image_loss", "text_loss", "grad_norm")

    def checkpoints(self, run: str) -> list[str]:
        return sorted(path.name for path in (self.folder / run / "checkpoints").iterdir())


def zero(stage: int | None) -> list[str]:
    """Return the --set option for plain torch (None) or a ZeRO stage."""
    section = None if stage is None else {"zero_optimization": {"stage": stage}}
    return ["--set", f"deepspeed={json.dumps(section)}"]
