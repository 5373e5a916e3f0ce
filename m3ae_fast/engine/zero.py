"""DeepSpeed: ZeRO stages 0-3, offload and whatever else its config section asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from m3ae_fast.config import Config
from m3ae_fast.engine.core import MOMENTS, State, collect, name_of, prime, set_lr
from m3ae_fast.engine.distributed import Ranks
from m3ae_fast.engine.hardware import out_of_memory
from m3ae_fast.engine.optim import build_adamw
from m3ae_fast.errors import UserError
from m3ae_fast.model.m3ae import M3AE, Losses
from m3ae_fast.model.packing import PackedBatch


class DeepSpeedEngine:
    """The same interface as TorchEngine, run by deepspeed.initialize."""

    def __init__(self, model: M3AE, config: Config, ranks: Ranks) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.model, self.config, self.ranks = model, config, ranks
        self.stage = config.zero_stage
        deepspeed.init_distributed(init_method=None, dist_init_required=False)
        model.to(ranks.device)
        options = {"cpu_offload": config.offloads_optimizer, "partitioned": self.stage == 3}
        optimizer = build_adamw(model, config.optim, **options)
        self.optimizer_name = name_of(optimizer)
        section = deepspeed_config(config, ranks.world)
        try:
            self.ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=section)
        except Exception as error:  # asserts, missing packages, pydantic's errors: whatever its sections come upon
            if out_of_memory(error):
                raise
            raise UserError(
                f"config: DeepSpeed refuses the deepspeed section: {' '.join(str(error).split())}"
            ) from None

    def step(self, batches: Sequence[PackedBatch], lr: float) -> tuple[list[Losses], Tensor]:
        self.ds.train()
        set_lr(self.ds.optimizer, lr)
        results, norm = [], None
        for i, batch in enumerate(batches):
            losses = self.ds(batch)
            self.ds.backward(losses.loss, scale_wrt_gas=False)
            if self.stage == 0 and i == len(batches) - 1:  # DeepSpeed has no norm to tell at stage 0
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
            self.ds.step()
            results.append(losses)
        return results, torch.as_tensor(self.ds.get_global_grad_norm() if norm is None else norm)

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> Losses:
        self.ds.eval()
        return self.ds(batch)

    def state(self) -> State | None:
        if not self._inner.state:
            self._prime(0)
        self._link_moments()
        if self.stage == 0:
            return collect(self.model, lambda p: p, lambda p, key: self._inner.state[p][key], self.ranks.is_main)
        return collect(self.model, safe_get_full_fp32_param, safe_get_full_optimizer_state, self.ranks.is_main)

    def load_state(self, step: int, get: Callable[[str], Tensor]) -> None:
        self._prime(step)
        for name, p in self.model.named_parameters():
            self._set(p, get(f"model/{name}"), None)
            for key in MOMENTS:
                self._set(p, get(f"{key}/{name}"), key)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return getattr(self.ds.optimizer, "optimizer", self.ds.optimizer)

    def _prime(self, step: int) -> None:
        zero = self.ds.optimizer
        if self.stage < 3:
            prime(self._inner, step)
            self._link_moments()
            return
        # ZeRO-3 lends its inner optimiser one flat partition at a time
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            group = self._inner.param_groups[zero.sub_group_to_group_id[i]]
            group["params"] = [flat]
            prime(self._inner, step)
            group["params"] = []

    def _link_moments(self) -> None:
        """Let each weight know its part of the moments. DeepSpeed does so after its first step, but for the first
        parameter group alone."""
        if self.stage in (1, 2):
            self.ds.optimizer._hp_optimizer_states_linked = False
            self.ds.optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, p: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Write a whole float32 tensor into this rank's part of weight `p` (key None) or of its moment `key`."""
        if self.stage == 0:
            (p.data if key is None else self._inner.state[p][key]).copy_(value)
        elif self.stage < 3:
            if key is None:
                p.data.copy_(value)
                safe_set_full_fp32_param(p, value)
            else:
                safe_set_full_optimizer_state(p, value, key)
        else:
            # the whole-tensor setters reject a size that does not divide by the ranks: cut the part here
            part = p.ds_tensor.numel()
            flat = nn.functional.pad(value.flatten(), (0, part * self.ranks.world - value.numel()))
            mine = flat[part * self.ranks.rank :][:part]
            if key is None:
                p.ds_tensor.data.copy_(mine)
                safe_set_local_fp32_param(p, mine)
            else:
                safe_set_local_optimizer_state(p, mine, key)


def deepspeed_config(config: Config, world: int) -> dict:
    """The `deepspeed` section with what the rest of the config says filled in.

    Raises:
        UserError: it asks for timers that fail here.
    """
    section = dict(config.deepspeed)
    for key in ("wall_clock_breakdown", "flops_profiler"):
        asked = section.get(key)
        if asked.get("enabled") if isinstance(asked, dict) else asked:
            raise UserError(f"config: deepspeed.{key} does not work here; use --profile")
    micro = config.train.micro_batch or config.train.global_batch // world
    section["train_micro_batch_size_per_gpu"] = micro
    section["gradient_accumulation_steps"] = config.train.global_batch // (micro * world)
    section["gradient_clipping"] = config.optim.clip_grad or 0.0
    section["steps_per_print"] = section.get("steps_per_print") or 10**9  # the trainer reports
    section.setdefault("zero_allow_untested_optimizer", True)  # apex's FusedAdam
    if config.train.precision == "bf16":
        if config.zero_stage == 0:
            # DeepSpeed's own bf16 without ZeRO takes one optimiser step too many; autocast on float32 weights is right.
            # No module list: gradients are reduced in float32.
            section["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        else:
            section["bf16"] = {"enabled": True}
    return section
