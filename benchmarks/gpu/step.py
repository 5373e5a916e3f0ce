"""Timing of whole training steps on this machine's GPUs: the trainer with its loader, with DeepSpeed and with plain
torch, on shards with captions of different lengths; and for comparison the hand-optimised baseline ("expert"), whose
batches are already on the GPU.

Run by `python -m benchmarks.gpu --step`.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.alone import ROOT, Alone
from benchmarks.gpu.plan import SIZES
from benchmarks.gpu.processes import Processes
from benchmarks.gpu.trace import breakdown, heaviest
from benchmarks.shards import make_shards
from m3ae_fast.base.hardware import peak_flops
from m3ae_fast.config import MaskingConfig, ModelConfig
from m3ae_fast.model.flops import reference_flops
from m3ae_fast.training.profiler import ACTIVE, TRACE_FILE, WAIT, WARMUP

WORDS = (8, 32)  # minimum and maximum number of words of a caption
LOG_EVERY = 5
START_UP_STEPS = WAIT + WARMUP + ACTIVE + 2 * LOG_EVERY  # steps after which compilation and profiling are complete
STEPS = START_UP_STEPS + 3 * LOG_EVERY
EXPERT_WARMUP, EXPERT_ROUNDS, EXPERT_BATCHES = 3, 10, 4


@dataclass(frozen=True)
class Case:
    """A config that is timed, with `batch` samples per GPU and a dataset of `samples` images."""

    name: str
    config: dict[str, Any]
    batch: int = 512
    samples: int = 2048
    recompute: bool = False  # recompute GELU and LayerNorm outputs although there is enough memory

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.model_validate(self.config["model"])


def shipped(names: Sequence[str] = SIZES) -> list[Case]:
    """Return the configs of the paper's sizes, the largest first, because time may run out."""
    return [Case(name, json.loads((ROOT / f"configs/{name}.json").read_text(encoding="utf-8"))) for name in names]


IMPLEMENTATIONS = {"deepspeed": "engine, DeepSpeed", "torch": "engine, torch", "expert": "expert"}
METRICS = "metrics.jsonl"
# tables made from a trace: title, and function that returns the rows
PROFILE: dict[str, tuple[str, Callable[[Path], list[results.Row]]]] = {
    "gpu-kernels": ("Kernels that take the most time of a step", heaviest),
    "gpu-profile": ("Time of a step by kind of kernel", breakdown),
}
PATIENCE = 5.0  # seconds for a trainer to end, which is less than the patience of a stage in the plan


def run(
    folder: Path | None = None,
    cases: Sequence[Case] | None = None,
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS.values()),
) -> int:
    """Time each case, and return the number of failed runs. After each run, the tables are printed and written to
    `folder` (None: the folder of this machine) as gpu-step.json and the files in `PROFILE`. A run that fails, usually
    for lack of memory, has no numbers. The log, metrics and trace of a run are stored in a folder next to the
    tables."""
    gpus, failed = max(1, torch.cuda.device_count()), 0
    steps: list[results.Row] = []
    profile: dict[str, list[results.Row]] = {table: [] for table in PROFILE}
    for case in shipped() if cases is None else cases:
        with tempfile.TemporaryDirectory() as temporary:
            shards = Path(temporary)
            model = case.model
            side = model.image_size * 5 // 4
            make_shards(shards, 4, case.samples, (side, side * 5 // 4), vocab=model.vocab_size, words=WORDS)
            for name in implementations:
                row: results.Row = {
                    "size": case.name,
                    "batch per GPU": case.batch,
                    "GPUs": gpus,
                    "implementation": name,
                }
                row |= dict.fromkeys(("samples/s", "reference MFU", "utilisation", "data wait", "peak GB"))
                kept = (folder or results.here()) / f"{case.name}-{case.batch}-{name.rpartition(' ')[2]}".lower()
                try:
                    if name == "expert":
                        row |= time_expert(case)
                    else:
                        row |= time_trainer(case, shards, kept, gpus, plain=name == "engine, torch")
                        which: results.Row = {"size": case.name, "implementation": name}
                        for table, rows in _profile(kept).items():
                            profile[table] += [which | part for part in rows]
                except Exception as error:  # any error, because the next run is not affected
                    failed += 1
                    print(f"{case.name}, {name}: {error or repr(error)}", flush=True)
                steps.append(row)
                path = results.save(
                    "gpu-step", "Training with the shipped configs, captions of 8 to 32 tokens", steps, folder
                )
                for table, rows in profile.items():
                    if rows:
                        path = results.save(table, PROFILE[table][0], rows, folder)
                print(results.markdown(path), flush=True)
    return failed


def _profile(kept: Path) -> dict[str, list[results.Row]]:
    """Return the rows of each table in `PROFILE`; empty if there is no readable trace."""
    try:
        return {table: read(kept / TRACE_FILE) for table, (_, read) in PROFILE.items()}
    except (OSError, EOFError, ValueError, LookupError) as error:
        print(f"{kept / TRACE_FILE}: no profile ({error or repr(error)})", flush=True)
        return {}


def time_trainer(case: Case, shards: Path, kept: Path, gpus: int, *, plain: bool) -> results.Row:
    """Run the trainer with --profile, store its log, metrics and trace in `kept`, and return `stable_medians`.
    `plain`: use plain torch instead of DeepSpeed. Raises RuntimeError if the trainer fails or logs nothing after its
    first steps."""
    run_dir = shards / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    config = {section: dict(values or {}) for section, values in case.config.items()}
    config["run"] = {"dir": str(run_dir)}
    config["data"] = {"train": [{"shards": f"{shards}/*.tar"}], "tokenizer": str(shards / "vocab.txt")}
    config["train"] |= {"global_batch": case.batch * gpus, "micro_batch": case.batch, "steps": STEPS, "epochs": None}
    config["train"] |= {"log_every": LOG_EVERY, "save_every": STEPS, "eval_every": None, "pictures": 0}
    config["deepspeed"] = None if plain else case.config.get("deepspeed") or {}
    file = shards / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    log = kept / "log.txt"
    kept.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    try:
        with Processes(PATIENCE) as processes:
            trainer = [*_trainer(gpus, case.recompute), "--config", str(file), "--profile"]
            code = processes.start(trainer, log, cwd=ROOT).wait()
    finally:  # time may run out here
        for name in (METRICS, TRACE_FILE):
            with suppress(OSError):
                shutil.copy(run_dir / name, kept)
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RuntimeError(f"{(lines or ['no output'])[-1]} (see {log})")
    return stable_medians(kept / METRICS)


def _trainer(gpus: int, recompute: bool) -> list[str]:
    """Return the command of the trainer. With `recompute`, the trainer is made to assume that there is not enough
    memory to keep all activations."""
    program = [str(ROOT / "m3ae_fast/train.py")]
    if recompute:
        code = "import sys; from m3ae_fast.engine import build; from m3ae_fast import train; "
        code += "build.lacking_for_activations = lambda *_: 'none is given'; sys.exit(train.main())"
        program = ["-c", code] if gpus == 1 else ["--no-python", sys.executable, "-c", code]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    return [sys.executable, *launcher, *program]


def stable_medians(metrics: Path) -> results.Row:
    """Return the medians of the metrics that were logged after the first START_UP_STEPS steps. Raises RuntimeError if
    there are none."""
    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else ())
    found = [line for line in lines if "samples_per_s" in line and line["step"] > START_UP_STEPS]
    if not found:
        raise RuntimeError(f"{metrics} has no line of a step after {START_UP_STEPS}")
    names = {
        "samples/s": "samples_per_s",
        "reference MFU": "mfu",
        "utilisation": "utilisation",
        "data wait": "data_wait",
    }
    row: results.Row = {column: statistics.median(line[name] for line in found) for column, name in names.items()}
    return row | {"peak GB": found[-1]["peak_memory_gb"]}


def time_expert(case: Case) -> results.Row:
    """Time the hand-optimised baseline on one GPU, and return its row. Raises RuntimeError if it fails."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Alone("expert", case.config["model"], case.batch, words=WORDS, batches=EXPERT_BATCHES) as process:
        for _ in range(EXPERT_WARMUP):
            process.step()
        speed = case.batch / statistics.median(process.step() for _ in range(EXPERT_ROUNDS))
        flops = reference_flops(case.model, MaskingConfig())
        mfu = speed * flops / peak_flops(device, torch.bfloat16)
        return {"samples/s": speed, "reference MFU": mfu, "peak GB": process.held_bytes() / 1e9}
