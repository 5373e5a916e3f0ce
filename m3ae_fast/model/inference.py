"""Inference by a frozen encoder: its mode, and a check of what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import dtype_of, fast_precision


@contextmanager
def encoding(model: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Switch the model to inference for the block; its weights are cast once for all batches within."""
    was_training = model.training
    model.eval()
    dtype = dtype_of(fast_precision(device) if precision == "auto" else precision)
    known = device.type != "cpu" or next(model.parameters()).dtype != torch.float16  # of which autocast raises on a CPU
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=known and dtype == torch.bfloat16):
            yield
    finally:
        model.train(was_training)


def check_finite(values: Tensor, keys: Sequence[str]) -> None:
    """Raise UserError naming the first sample, of those with these `keys`, whose row of `values` is not finite: a
    comparison with such a row would give a meaningless number."""
    bad_N = ~values.flatten(1).isfinite().all(1) if values.numel() else torch.zeros(len(keys), dtype=torch.bool)
    if bad_N.any():
        first = keys[int(bad_N.nonzero()[0])]
        raise UserError(
            f"{int(bad_N.sum()):,} of {len(keys):,} samples have features that are not finite, such as {first}; "
            "the model's weights are too large or damaged: take an earlier checkpoint, or encode.precision=fp32"
        )
