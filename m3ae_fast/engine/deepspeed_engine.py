"""Training with DeepSpeed: ZeRO stages 0 to 3, and offloading."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    # without this variable, DeepSpeed looks for other devices and warns if there are none
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_module,
)
from torch import Tensor, nn

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.memory import out_of_memory
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import DeepSpeedConfig, OptimConfig
from m3ae_fast.data import Share
from m3ae_fast.engine.fragments import Fragment, Fragments, cut
from m3ae_fast.engine.interface import Read
from m3ae_fast.engine.muon import Muon
from m3ae_fast.engine.optimizer import build_optimizer, collect, name_of, prime, set_lr, state_kinds, tensors_of
from m3ae_fast.model.transformer import MLP, Attention
from m3ae_fast.process.ranks import Ranks

# Names of the attributes that hold the flat buffers of weights and of master weights: in ZeRO's optimiser for stages 1
# and 2, and in the BF16_Optimizer, which DeepSpeed may use instead at stage 1.
_BUFFERS = ("bit16_groups_flat", "single_partition_of_fp32_groups")
_BF16_BUFFERS = ("bf16_groups_flat", "fp32_groups_flat_partition")
PERSISTENT = 100_000  # at stage 3, weight tensors with at most this many elements are kept on every rank


class Place(NamedTuple):
    """Location of the part of a weight that this rank updates at stages 1 and 2."""

    start: int  # index of the part's first element in the flattened weight
    master: Tensor  # float32, flat: this rank's partition of many weights, which the optimiser updates
    offset: int  # index of the part's first element in `master` and in its moments
    elements: int


class DeepSpeedEngine:
    """An engine that trains with DeepSpeed; `engine.interface.ModelEngine` describes its methods."""

    memory = ""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict],
        config: DeepSpeedConfig,
        optim: OptimConfig,
        dtype: torch.dtype,
        ranks: Ranks,
        share: Share,
        ema: float | None = None,
    ) -> None:
        """Move the model to the ranks' device and initialise DeepSpeed.

        Args:
            model: the module to train.
            groups: the optimiser's parameter groups, which contain all parameters; see `build_optimizer`.
            config: the `deepspeed` section.
            optim: settings of the optimiser.
            dtype: dtype of matmuls.
            ranks: the ranks of the run.
            share: split of each step's batch into micro-batches.
            ema: decay of the weights' moving average; None: no average.

        Raises:
            UserError: DeepSpeed rejects its section, or its version lacks an attribute that is used here.
        """
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.model, self.ranks = model, ranks
        self.before_update: Callable[[], None] = lambda: None
        self.zero = config.zero_optimization
        self.name = f"DeepSpeed ZeRO stage {self.zero.stage}"
        # Without this replacement, DeepSpeed would compile an extension for inference on every new machine.
        _replace("deepspeed.comm.torch", "build_shm_op", lambda: None)
        _read_no_norms()
        deepspeed.init_distributed(init_method=None, dist_init_required=False)
        model.to(ranks.device)
        for module in model.modules():
            if isinstance(module, MLP | Attention):
                # DeepSpeed then adds no hooks to the module's layers, whose parameters the module may read itself
                set_z3_leaf_module(module, True)
        self.kinds = state_kinds(model, groups, ema)
        optimizer = build_optimizer(
            groups, optim, dtype, ema, on_cpu=self.zero.offloads_optimizer, partitioned=self.zero.stage == 3
        )
        self.optimizer_name = name_of(optimizer)
        section = deepspeed_section(config, optim, dtype, share)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints the memory of the machine
                self.ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=section)
        except Exception as error:  # an invalid section raises many kinds of errors: assertions, imports, validation
            if out_of_memory(error):
                raise
            reason = " ".join(str(error).split())
            raise UserError(f"config: DeepSpeed rejects the deepspeed section: {reason}") from None
        # Stage 0 in bf16 sets this variable for the whole process. If it remained set, an engine of another stage that
        # is built later would disregard communication_data_type.
        _replace("deepspeed.runtime.torch_autocast", "TORCH_AUTOCAST_INITIALIZED", False)
        self._places: dict[nn.Parameter, Place] = {}
        if self.zero.stage in (1, 2):
            names = _BF16_BUFFERS if hasattr(self.ds.optimizer, _BF16_BUFFERS[0]) else _BUFFERS
            flats, masters = (_private(self.ds.optimizer, name) for name in names)
            starts = _starts(model, flats)
            self._places = {p: _place(p, first, masters[i], ranks.rank) for p, (i, first) in starts.items()}
            if isinstance(optimizer, Muon):  # Muon's group is the first one
                firsts: dict[Tensor, int] = {p: first for p, (i, first) in starts.items() if i == 0}
                optimizer.shard(masters[0], ranks.rank * len(masters[0]), firsts, self._gathered)
            if names == _BUFFERS and not self.zero.offloads_optimizer:
                _wait_for_one_stream(self.ds.optimizer)

    def step(self, batches: Sequence[PackedBatch], counts: Any, lr: float) -> tuple[list[Any], Tensor]:
        if not self.model.training:  # `train` visits all modules, which takes time
            self.ds.train()
        set_lr(self.ds.optimizer, lr)
        results, norm = [], None
        for i, batch in enumerate(batches):
            losses = self.ds(batch, counts)
            # DeepSpeed registers hooks on the model's output, which tell its optimiser when to reduce gradients. If
            # `backward` received the output itself, these hooks would also divide its gradient by the number of
            # micro-batches.
            self.ds.backward(losses.loss * 1.0, scale_wrt_gas=False)
            if i == len(batches) - 1:
                self.before_update()
                if self.zero.stage == 0:  # at this stage, DeepSpeed does not report the norm
                    grads = [p.grad for p in self.model.parameters() if p.grad is not None]
                    norm = torch.nn.utils.get_total_norm(grads)
            self.ds.step()
            results.append(losses)
        return results, _valid_norm(torch.as_tensor(self.ds.get_global_grad_norm() if norm is None else norm))

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> Any:
        self.ds.eval()
        return self.ds(batch)

    def fragments(self) -> Fragments:
        if not self._inner.state:
            self._prime(0)
        if self.zero.stage == 0:
            tensors = {name: self._full(p, kind) for name, p, kind in tensors_of(self.model, self.kinds)}
            return cut(tensors, self.ranks.rank, self.ranks.world)
        return {name: self._own(p, kind) for name, p, kind in tensors_of(self.model, self.kinds)}

    def whole(self, kind: str) -> dict[str, Tensor]:
        return collect(self.model, kind, self.kinds, self._full if self.zero.stage == 0 else self._joined)

    def _full(self, p: nn.Parameter, kind: str) -> Tensor:
        """Return the complete weight `p` (kind "model") or its complete moment `kind`. At stage 0, every rank has both;
        at stages 1 and 2, every rank has the weight."""
        return p if kind == "model" else self._inner.state[p][kind]

    def _joined(self, p: nn.Parameter, kind: str) -> Tensor:
        """Return the complete tensor, assembled from the results of `_own` on all ranks. Every rank must call it."""
        own = self._own(p, kind)
        full = torch.zeros(math.prod(own.shape), device=self.ranks.device)
        full[own.start : own.start + len(own.data)] = own.data
        dist.all_reduce(full)
        return full.view(own.shape)

    def _gathered(self, part: Tensor) -> Tensor:
        """Return the concatenation of the parts of all ranks, which have equal lengths. Every rank must call it."""
        whole = part.new_empty(self.ranks.world * len(part))
        dist.all_gather(list(whole.chunk(self.ranks.world)), part)
        return whole

    def _own(self, p: Any, kind: str) -> Fragment:
        """Return this rank's float32 partition of the weight `p` (kind "model") or of its moment `kind`, at stages 1
        to 3."""
        if self.zero.stage < 3:
            start, master, offset, elements = self._places[p]
            flat = master if kind == "model" else self._inner.state[master][kind]
            return Fragment(flat.detach()[offset : offset + elements], start, tuple(p.shape))
        kept = safe_get_local_fp32_param(p) if kind == "model" else safe_get_local_optimizer_state(p, kind)
        start = self.ranks.rank * p.ds_tensor.numel()  # the partitions of the last ranks are padded
        return Fragment(kept.detach().flatten()[: max(0, p.ds_numel - start)], start, tuple(p.ds_shape))

    def load_state(self, step: int, read: Read) -> None:
        self._prime(step)
        for name, p, kind in tensors_of(self.model, self.kinds):
            if self.zero.stage == 3:
                self._load_partition(name, p, kind, read)
                continue
            # at stages 1 and 2, this sets the copy of the weight that matmuls use
            if self.zero.stage == 0 or kind == "model":
                self._full(p, kind).data.copy_(read(name, 0, p.numel()).view_as(p))
            if self.zero.stage > 0:
                own = self._own(p, kind)
                own.data.copy_(read(name, own.start, len(own.data)))

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return getattr(self.ds.optimizer, "optimizer", self.ds.optimizer)

    def _prime(self, step: int) -> None:
        zero = self.ds.optimizer
        if self.zero.stage < 3:
            prime(self._inner, step)
            return
        # ZeRO-3 passes one flat partition at a time to its inner optimiser.
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            group = self._inner.param_groups[zero.sub_group_to_group_id[i]]
            group["params"] = [flat]
            prime(self._inner, step)
            group["params"] = []

    def _load_partition(self, name: str, p: Any, kind: str, read: Read) -> None:
        """Load this rank's partition of one tensor at stage 3."""
        own, length = self._own(p, kind), p.ds_tensor.numel()
        value = read(name, own.start, len(own.data))
        padded = nn.functional.pad(value, (0, length - len(value)))
        if kind == "model":
            p.ds_tensor.data.copy_(padded)
            safe_set_local_fp32_param(p, padded)
        else:
            safe_set_local_optimizer_state(p, padded, kind)


def deepspeed_section(config: DeepSpeedConfig, optim: OptimConfig, dtype: torch.dtype, share: Share) -> dict[str, Any]:
    """Return the `deepspeed` section, completed with values from the rest of the config. Defaults that would
    synchronise with the GPU or reduce the precision are overridden. `dtype`: dtype of matmuls; `share`: split of each
    step's batch into micro-batches."""
    section = config.model_dump(exclude_none=True)
    section["zero_optimization"] |= {"overlap_comm": True, "stage3_param_persistence_threshold": PERSISTENT}
    section |= {
        "train_micro_batch_size_per_gpu": share.micro_batch,
        "gradient_accumulation_steps": share.accumulation,
        "gradient_clipping": optim.clip_grad or 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,  # required for Muon
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},  # synchronises with the GPU twice per step
    }
    if dtype == torch.bfloat16:
        if config.zero_optimization.stage == 0:
            # Without ZeRO, DeepSpeed's bf16 mode takes one optimiser step too many, so float32 weights with autocast
            # are used. With an empty list of modules, gradients are reduced in float32.
            section["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        else:
            # DeepSpeed's check for overflows synchronises with the GPU and skips steps silently; `LossWatch` stops the
            # run instead.
            section["bf16"] = {"enabled": True, "check_grad_overflow": False}
            section["data_types"] = {"grad_accum_dtype": "fp32"}
    return section


def _starts(model: nn.Module, flats: Sequence[Tensor]) -> dict[nn.Parameter, tuple[int, int]]:
    """Return the index of the buffer that contains each weight at stages 1 and 2, and the index of the weight's first
    element in the buffer. Both are derived from memory addresses, because weights are views of the buffers `flats`."""
    numbers = {flat.untyped_storage().data_ptr(): i for i, flat in enumerate(flats)}
    found = {}
    for p in model.parameters():
        i = numbers[p.untyped_storage().data_ptr()]
        found[p] = i, int(p.storage_offset() - flats[i].storage_offset())
    return found


def _place(p: nn.Parameter, first: int, master: Tensor, rank: int) -> Place:
    """Return the place of a weight that begins at element `first` of a buffer. The buffer is split equally into the
    `master` partitions of the ranks."""
    first -= rank * len(master)  # relative to the beginning of `master`; may lie outside it
    offset, end = (min(max(edge, 0), len(master)) for edge in (first, first + p.numel()))
    return Place(offset - first if offset < end else 0, master, offset, end - offset)


def _private(of: Any, name: str) -> Any:
    """Return an undocumented attribute of DeepSpeed. Raises UserError if the installed version does not have it."""
    if not hasattr(of, name):
        what = of.__name__ if isinstance(of, ModuleType) else type(of).__name__
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} has no {what}.{name}, which this version of m3ae-fast needs: install "
            'deepspeed 0.19.8, or set "deepspeed": null for plain torch'
        )
    return getattr(of, name)


def _replace(module: str, name: str, value: Any) -> None:
    """Replace an attribute of a DeepSpeed module. Raises UserError if the module has no such attribute."""
    found = importlib.import_module(module)
    _private(found, name)
    setattr(found, name, value)


# The functions below remove host-device synchronisations from ZeRO stages 1 and 2 without changing results.


def _read_no_norms() -> None:
    """Disable two host–device synchronisations in DeepSpeed's stage 1 and 2 optimisers: the check for a non-finite
    gradient norm (`LossWatch` does it asynchronously) and the comparison of the norm with the clipping threshold. This
    affects all engines of this process."""
    for module in ("bf16_optimizer", "zero.stage_1_and_2"):
        _replace(f"deepspeed.runtime.{module}", "is_invalid_grad_norm", lambda norm: False)
    _replace("deepspeed.runtime.bf16_optimizer", "clip_tensors_by_global_norm", _clip)


def _clip(input_tensors: Sequence[Tensor], max_norm: float, global_norm: Tensor, **_: Any) -> Tensor:
    """Clip gradients as DeepSpeed does, but without reading the norm on the host: if it is below the threshold, the
    gradients are multiplied by 1."""
    torch._foreach_mul_(list(input_tensors), (max_norm / (global_norm + 1e-6)).clamp(max=1))
    return global_norm


def _valid_norm(norm: Tensor) -> Tensor:
    """Return the norm, with NaN in place of -1, which DeepSpeed uses for norms that are not finite."""
    return norm.masked_fill(norm < 0, torch.nan)


def _wait_for_one_stream(optimizer: Any) -> None:
    """Make the current stream wait, after each backward pass, for the stream that reduces gradients, instead of
    synchronising the host with the device. Must not be used with an offloaded optimiser, because the host then reads
    the values that the reducing stream copies."""
    epilogue = _private(optimizer, "independent_gradient_partition_epilogue")
    _private(optimizer, "reduction_stream")

    def quietly() -> None:
        accelerator = get_accelerator()
        accelerator.synchronize = lambda *_: accelerator.current_stream().wait_stream(optimizer.reduction_stream)
        try:
            epilogue()
        finally:
            del accelerator.synchronize

    optimizer.independent_gradient_partition_epilogue = quietly
