"""Arguments of the implementations of `masked_token_loss`.

Shapes: M rows, D width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The tensors from which the loss is computed; all but `targets` are floating-point."""

    hidden: Tensor  # [M, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    row_weight: Tensor  # [M]
    targets: Tensor  # int32 or int64 [M]


class Options(NamedTuple):
    """The options of the loss, as in `masked_token_loss`."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    dtype: torch.dtype  # dtype of the matmuls
    return_correct: bool
    workspace: int | None  # maximum number of bytes of logits that are kept at once
    impl: str


class Results(NamedTuple):
    """Output tensors of the implementations. Outputs that are not required are empty tensors."""

    row_loss: Tensor  # [M], float32 (float64 for float64)
    correct: Tensor  # bool [M]
    grad_hidden: Tensor  # [M, D]
    grad_weight: Tensor  # [V, D]
    grad_bias: Tensor  # [V]
