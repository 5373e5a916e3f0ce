"""Inference with a frozen encoder: a context manager, and a check of the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import dtype_of, fast_precision
from m3ae_fast.model.transformer import whole_depth

_ROWS = 16_384  # number of rows that are checked at a time


@contextmanager
def encoding(model: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Enter a context without gradients and without stochastic depth. The train and eval modes of modules are neither
    read nor changed, so other threads may train the same model. The weights are cast once for all batches.
    `precision`: "bf16" (autocast), "fp32", or "auto" for the faster one on the device."""
    dtype = dtype_of(fast_precision(device) if precision == "auto" else precision)
    # autocast to bfloat16 on a CPU raises an error for float16 weights
    known = device.type != "cpu" or next(model.parameters()).dtype != torch.float16
    with (
        whole_depth(),
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=known and dtype == torch.bfloat16),
    ):
        yield


def check_finite(values: Tensor, keys: Sequence[str]) -> None:
    """Raise UserError with the key of the first sample whose row of `values` is not finite, because comparisons with
    such a row would be meaningless. `values`: floating-point [S, ...]; `keys`: names of the S samples."""
    refuse_not_finite(rows_not_finite(values), keys)


def rows_not_finite(values: Tensor) -> list[int]:
    """Return the indices of the rows of `values` [S, ...] with a value that is not finite."""
    if not values.numel():
        return []
    parts = [part.flatten(1).isfinite().all(1) for part in values.split(_ROWS)]
    return (~torch.cat(parts)).nonzero()[:, 0].tolist()


def refuse_not_finite(rows: Sequence[int], keys: Sequence[str]) -> None:
    """Raise UserError with the number of non-finite rows and the key of the first one, unless `rows` is empty. `rows`:
    ascending indices into `keys`, the names of all samples."""
    if rows:
        raise UserError(
            f"{len(rows):,} of {len(keys):,} samples (for example, {keys[rows[0]]}) have features that are not finite; "
            "the model's weights are too large or damaged: use an earlier checkpoint, or set encode.precision=fp32"
        )
