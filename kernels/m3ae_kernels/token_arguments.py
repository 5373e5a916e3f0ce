"""Arguments of the implementations of `masked_token_loss`.

Shapes: M rows, D width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    hidden: Tensor  # [M, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    row_weight: Tensor  # [M]
    targets: Tensor  # [M]


class Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    z_loss: float
    dtype: torch.dtype  # dtype of the matmuls
    return_correct: bool
    workspace: int | None  # maximum number of bytes of logits that are kept at once
    impl: str


class Results(NamedTuple):
    """Output tensors of the implementations. Outputs that are not required are empty tensors."""

    row_loss: Tensor  # [M]
    correct: Tensor  # bool [M]
    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
