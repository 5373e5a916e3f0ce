"""Checkpoints of engines on several ranks: run by test_checkpoint_parts.py.

    python -m torch.distributed.run --nproc-per-node 4 -m tests.helpers.checkpoint_cases save|load|die ...

save DIR: trains a small net with each engine, saves it, and writes the expected state, which is checked with DeepSpeed.
load DIR: loads each checkpoint into the same engine and into a different one, and compares.
die DIR RANK WHERE: saves step 1; then a rank kills itself while step 2 is saved.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from m3ae_fast import checkpoint
from m3ae_fast.checkpoint import resuming, state_files, writing
from m3ae_fast.checkpoint.host_copy import Staging
from m3ae_fast.config import DeepSpeedConfig, OptimConfig
from m3ae_fast.data import Share
from m3ae_fast.engine.deepspeed_engine import DeepSpeedEngine
from m3ae_fast.engine.fragments import Fragments, cut
from m3ae_fast.engine.interface import ModelEngine
from m3ae_fast.engine.parameter_groups import parameter_groups
from m3ae_fast.engine.torch_engine import TorchEngine
from m3ae_fast.process.agreement import Agreement
from m3ae_fast.process.ranks import Ranks, join_ranks
from tests.helpers import threads

STAGES = (None, 0, 1, 2, 3)
STEPS = 2
EMA = 0.5
CONFIG = {"train": {"ema": EMA}}
Losses = namedtuple("Losses", "loss")


class Net(nn.Module):
    """A net whose parameter sizes are not multiples of the number of ranks; some have fewer elements than there are
    ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(37, 53), nn.LayerNorm(53), nn.Linear(53, 3)

    def forward(self, batch: Tensor, counts: Any = None) -> Any:
        out = self.b(self.norm(torch.relu(self.a(batch.to(self.a.weight.dtype)))))
        return Losses(out.float().square().mean()) if self.training else out.float()


def build(zero: int | None, ranks: Ranks, seed: int) -> ModelEngine:
    """Return an engine in bf16. From stage 1 on, its saved weights differ from the weights that matmuls use."""
    torch.manual_seed(seed)
    net, optim = Net(), OptimConfig()
    groups = parameter_groups(net, 0.05)
    if zero is None:
        return TorchEngine(net, groups, optim, torch.bfloat16, ranks, EMA)
    config = DeepSpeedConfig.model_validate({"zero_optimization": {"stage": zero}})
    share = Share(4 * ranks.world, world=ranks.world)
    return DeepSpeedEngine(net, groups, config, optim, torch.bfloat16, ranks, share, EMA)


def probe(engine: ModelEngine) -> Tensor:
    return engine.evaluate(torch.linspace(-1, 1, 37)[None])


def state_checked_with_deepspeed(engine: ModelEngine) -> dict[str, Tensor]:
    """Return the state according to `engine.whole`. From stage 1 on, it must equal the state according to DeepSpeed's
    own functions."""
    kinds = {kind for each in engine.kinds.values() for kind in each}
    found = {f"{k}/{name}": t for k in ("model", *sorted(kinds)) for name, t in engine.whole(k).items()}
    if not isinstance(engine, DeepSpeedEngine) or engine.zero.stage == 0:
        return found
    if engine.zero.stage < 3:  # DeepSpeed links moments to parameters only after a step, and only of its first group
        engine.ds.optimizer._hp_optimizer_states_linked = False
        engine.ds.optimizer._lazy_init_hp_params_optimizer_state()
    for name, p in engine.model.named_parameters():
        for kind in engine.kinds[name]:
            assert torch.equal(safe_get_full_optimizer_state(p, kind), found[f"{kind}/{name}"]), (name, kind)
        assert torch.equal(safe_get_full_fp32_param(p), found[f"model/{name}"]), name
    return found


def agreement(ranks: Ranks) -> Agreement:
    return ranks.agreement(threading.Event())


def copy_made_during_a_step(engine: ModelEngine) -> Fragments:
    """Return a copy of the state, which is made while the next step runs, before its update."""
    staging = Staging()

    def copy() -> Fragments:
        time.sleep(0.05)
        return staging.copy(engine.fragments)

    engine.before_update = staging.wait
    staging.begin(torch.device("cpu"))
    copied = threads.start(copy)
    engine.step([torch.randn(4, 37)], None, 1e-2)
    return copied.result(threads.LIMIT_S)


def save(ranks: Ranks, folder: Path) -> None:
    agreed = agreement(ranks)
    for zero in STAGES:
        engine = build(zero, ranks, 0)
        for step in range(STEPS):
            torch.manual_seed(10 * step + ranks.rank)
            engine.step([torch.randn(4, 37)], None, 1e-2)
        expected = {name: tensor.clone() for name, tensor in state_checked_with_deepspeed(engine).items()}
        outputs = probe(engine)
        part = copy_made_during_a_step(engine)
        total = sum(tensor.numel() for tensor in expected.values())
        held = sum(len(piece.data) for piece in part.values())
        assert held <= 1.3 * total / ranks.world, (zero, ranks.rank, held, total)
        if ranks.is_main:
            save_file(expected | {"outputs": outputs}, folder / f"{zero}.safetensors")
        info = checkpoint.Info(STEPS, 0, 42, CONFIG, {})
        checkpoint.save(folder / f"{zero}", part, info, 1, ranks=agreed)
    ranks.gather(None)


def load(ranks: Ranks, folder: Path) -> None:
    for number, saved in enumerate(STAGES):
        expected = load_file(folder / f"{saved}.safetensors")
        outputs = expected.pop("outputs")
        for zero in (saved, STAGES[number - 1]):
            engine = build(zero, ranks, 1)
            path = checkpoint.locate(folder / f"{saved}")
            read = resuming.open_checkpoint(path, checkpoint.read_info(path), engine.model, ranks, engine.kinds)
            taken = []

            def noting(name: str, start: int, count: int, read=read, taken=taken) -> Tensor:
                taken.append(count)
                return read(name, start, count)

            engine.load_state(STEPS, noting)
            found, what = state_checked_with_deepspeed(engine), f"{saved} -> {zero} on {ranks.world}"
            assert found.keys() == expected.keys(), what
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), f"{what}: {name}"
            if zero == saved:  # the weights that matmuls use must be equal too
                assert torch.equal(probe(engine), outputs), what
            if zero == 3:
                total = sum(tensor.numel() for tensor in expected.values())
                assert ranks.sum([sum(taken)]) == [total], what


def die(ranks: Ranks, folder: Path, rank: int, where: str) -> None:
    agreed = agreement(ranks)
    module = state_files if hasattr(state_files, where) else writing

    def kill_self(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for step in (1, 2):
        if (ranks.rank, step) == (rank, 2):
            setattr(module, where, kill_self)
        tensors = {"model/w": torch.arange(1000.0) + step}
        part = cut(tensors, ranks.rank, ranks.world)
        checkpoint.save(folder, part, checkpoint.Info(step, 0, 42, {}, {}), 1, ranks=agreed)


def main(argv: list[str] | None = None) -> int:
    what, folder, *rest = argv or sys.argv[1:]
    logging.disable(logging.WARNING)
    with join_ranks() as ranks:
        torch.set_num_threads(1)
        if what == "die":
            die(ranks, Path(folder), int(rest[0]), rest[1])
        else:
            {"save": save, "load": load}[what](ranks, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
