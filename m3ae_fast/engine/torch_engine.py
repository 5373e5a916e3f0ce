"""Data-parallel training with plain torch: float32 weights with autocast for bf16 or, as with ZeRO, bf16 weights with
float32 master weights."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import OptimConfig
from m3ae_fast.engine.fragments import Fragments, cut
from m3ae_fast.engine.interface import Read
from m3ae_fast.engine.optimizer import (
    build_optimizer,
    clip_by_global_norm,
    collect,
    name_of,
    prime,
    set_lr,
    state_kinds,
    tensors_of,
)
from m3ae_fast.process.ranks import Ranks


class TorchEngine:
    """An engine that trains with plain torch, and with DistributedDataParallel if there are several ranks.
    `engine.interface.ModelEngine` describes its methods."""

    memory = ""
    name = "plain torch"

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict],
        optim: OptimConfig,
        dtype: torch.dtype,
        ranks: Ranks,
        ema: float | None = None,
        masters: bool = False,
    ) -> None:
        """Move the model to the ranks' device and create its optimiser.

        Args:
            model: the module to train.
            groups: the optimiser's parameter groups, which contain all parameters; see `build_optimizer`.
            optim: settings of the optimiser.
            dtype: dtype of matmuls.
            ranks: the ranks of the run.
            ema: decay of the weights' moving average; None: no average.
            masters: whether the weights have `dtype` and are rounded from float32 master weights, which the optimiser
                updates. This requires a single rank. If False, the weights are float32, and autocast is used.
        """
        self.model = model.to(ranks.device)
        self.before_update: Callable[[], None] = lambda: None
        self.clip_grad, self.dtype, self.ranks = optim.clip_grad, dtype, ranks
        self.kinds = state_kinds(model, groups, ema)
        # the float32 tensors that the optimiser updates, by parameter
        self._masters: dict[nn.Parameter, Tensor] = {p: p for p in model.parameters()}
        self._rounds = masters and dtype != torch.float32
        if self._rounds:
            for p in self._masters:  # the masters do not include buffers, which remain in float32
                p.data = p.data.to(dtype)
                p.grad_dtype = torch.float32  # gradients of micro-batches are summed in float32
                self._masters[p] = p.detach().float()
            groups = [group | {"params": [self._masters[p] for p in group["params"]]} for group in groups]
        self.optimizer = build_optimizer(groups, optim, dtype, ema)
        self.optimizer_name = name_of(self.optimizer)
        self.ddp: nn.parallel.DistributedDataParallel | None = None
        if ranks.world > 1:
            ddp = nn.parallel.DistributedDataParallel
            old, new = "broadcast_buffers", "forward_sync_buffers"  # torch 2.13 has renamed this argument
            sync = new if new in inspect.signature(ddp).parameters else old
            options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
            self.ddp = ddp(self.model, **options)

    def step(self, batches: Sequence[PackedBatch], counts: Any, lr: float) -> tuple[list[Any], Tensor]:
        if not self.model.training:  # `train` visits all modules, which takes time
            self.model.train()
        results = []
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last or self.ddp is None else self.ddp.no_sync():
                with self._autocast():
                    losses = (self.ddp or self.model)(batch, counts)
                losses.loss.backward()
            results.append(losses)
        for p, master in self._masters.items():
            p.grad, master.grad = None, p.grad  # if `p` is its own master, its gradient is kept
        norm = clip_by_global_norm(self._masters.values(), self.clip_grad)
        set_lr(self.optimizer, lr)
        self.before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()  # sets gradients to None; apex's FusedAdam has no argument for that
        self._round()
        return results, norm

    @torch.no_grad()
    def _round(self) -> None:
        """Set the weights to the rounded master weights."""
        if self._rounds:
            torch._foreach_copy_(list(self._masters), list(self._masters.values()))

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> Any:
        self.model.eval()
        with self._autocast():
            return self.model(batch)

    def _autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.dtype == torch.bfloat16 and not self._rounds
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=enabled)

    def fragments(self) -> Fragments:
        if not self.optimizer.state:
            prime(self.optimizer, 0)
        tensors = {name: self._whole(p, kind) for name, p, kind in tensors_of(self.model, self.kinds)}
        return cut(tensors, self.ranks.rank, self.ranks.world)

    def whole(self, kind: str) -> dict[str, Tensor]:
        return collect(self.model, kind, self.kinds, self._whole)

    def _whole(self, p: nn.Parameter, kind: str) -> Tensor:
        master = self._masters[p]
        return master if kind == "model" else self.optimizer.state[master][kind]

    def load_state(self, step: int, read: Read) -> None:
        prime(self.optimizer, step)
        for name, p, kind in tensors_of(self.model, self.kinds):
            self._whole(p, kind).data.copy_(read(name, 0, p.numel()).view_as(p))
        self._round()
