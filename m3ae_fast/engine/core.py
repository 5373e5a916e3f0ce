"""One optimiser step over micro-batches, on plain torch or on DeepSpeed, behind one small interface.

`state()` and `load_state()` speak of whole tensors by parameter name, so that a checkpoint knows nothing of ranks,
ZeRO stages or optimisers' layouts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from m3ae_fast.config import Config
from m3ae_fast.engine.distributed import Ranks
from m3ae_fast.engine.memory import keep_freed_memory
from m3ae_fast.engine.optim import build_adamw, clip_by_global_norm
from m3ae_fast.model.m3ae import M3AE, Losses
from m3ae_fast.model.packing import PackedBatch

MOMENTS = ("exp_avg", "exp_avg_sq")
State = dict[str, Tensor]  # "model/NAME", "exp_avg/NAME", "exp_avg_sq/NAME" -> float32 on the CPU


class Engine(Protocol):
    """One optimiser step over micro-batches, and whole-tensor state."""

    model: M3AE
    optimizer_name: str

    def step(self, batches: Sequence[PackedBatch], lr: float) -> tuple[list[Losses], Tensor]:
        """Forward, backward and update; gradients are summed over micro-batches and averaged over ranks.

        Returns the micro-batches' losses and the global gradient norm before clipping.
        """

    def evaluate(self, batch: PackedBatch) -> Losses:
        """Losses without gradients and dropout."""

    def state(self) -> State | None:
        """Whole tensors on rank 0, None elsewhere. Every rank must call it."""

    def load_state(self, step: int, get: Callable[[str], Tensor]) -> None:
        """Take over a state after `step` updates; `get` gives its tensors by name, on every rank in the same order."""


class TorchEngine:
    """Data parallel on torch alone: float32 weights, autocast for bf16."""

    def __init__(self, model: M3AE, config: Config, ranks: Ranks) -> None:
        self.model = model.to(ranks.device)
        self.config, self.ranks = config, ranks
        self.optimizer = build_adamw(self.model, config.optim)
        self.optimizer_name = name_of(self.optimizer)
        self.wrapped: nn.Module = self.model
        if ranks.world > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(
                self.model, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def step(self, batches: Sequence[PackedBatch], lr: float) -> tuple[list[Losses], Tensor]:
        self.model.train()
        results = []
        for i, batch in enumerate(batches):
            sync = contextlib.nullcontext()
            if self.ranks.world > 1 and i < len(batches) - 1:
                sync = self.wrapped.no_sync()
            with sync:
                with self._autocast():
                    losses = self.wrapped(batch)
                losses.loss.backward()
            results.append(losses)
        norm = clip_by_global_norm(list(self.model.parameters()), self.config.optim.clip_grad)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()  # to None; the fused Adams take no argument
        return results, norm

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> Losses:
        self.model.eval()
        with self._autocast():
            return self.model(batch)

    def _autocast(self) -> contextlib.AbstractContextManager:
        bf16 = self.config.train.precision == "bf16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def state(self) -> State | None:
        if not self.optimizer.state:
            prime(self.optimizer, 0)
        return collect(self.model, lambda p: p, lambda p, key: self.optimizer.state[p][key], self.ranks.is_main)

    def load_state(self, step: int, get: Callable[[str], Tensor]) -> None:
        prime(self.optimizer, step)
        for name, p in self.model.named_parameters():
            p.data.copy_(get(f"model/{name}"))
            for key in MOMENTS:
                self.optimizer.state[p][key].copy_(get(f"{key}/{name}"))


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """ "torch AdamW", "deepspeed FusedAdam", "apex FusedAdam"."""
    return f"{type(optimizer).__module__.partition('.')[0]} {type(optimizer).__name__}"


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def prime(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Make the optimiser allocate its state, as after `step` updates with all moments 0. Parameters stay."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params]
    set_lr(optimizer, 0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, grad in zip(params, grads):
        p.grad = grad
        state = optimizer.state[p]
        if "step" in state:
            state["step"] = torch.full_like(state["step"], step) if isinstance(state["step"], Tensor) else step
    for group, lr in zip(optimizer.param_groups, lrs):
        group["lr"] = lr
        if "step" in group:  # apex's and DeepSpeed's FusedAdam count here
            group["step"] = torch.full_like(group["step"], step) if isinstance(group["step"], Tensor) else step


def collect(
    model: nn.Module, weight: Callable[[Tensor], Tensor], moment: Callable[[Tensor, str], Tensor], keep: bool
) -> State | None:
    """Gather whole float32 tensors one by one; `keep` says whether this rank wants them."""
    state: State = {}
    for kind, name, tensor in _walk(model, weight, moment):
        if keep:
            state[f"{kind}/{name}"] = tensor.detach().to("cpu", torch.float32, copy=True)
    return state if keep else None


def _walk(model: nn.Module, weight: Callable, moment: Callable) -> Iterator[tuple[str, str, Tensor]]:
    for name, p in model.named_parameters():
        yield "model", name, weight(p)
        for key in MOMENTS:
            yield key, name, moment(p, key)


def build_engine(model: M3AE, config: Config, ranks: Ranks) -> Engine:
    """The engine that the config asks for."""
    if ranks.device.type == "cpu":
        keep_freed_memory()
    if config.deepspeed is None:
        return TorchEngine(model, config, ranks)
    from m3ae_fast.engine.zero import DeepSpeedEngine

    return DeepSpeedEngine(model, config, ranks)
