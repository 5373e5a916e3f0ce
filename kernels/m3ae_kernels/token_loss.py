"""Cross-entropy over a vocabulary, head included: logits exist one chunk of rows at a time.

Shapes: M rows, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import accumulator, check_float, check_index, choose_impl, compute_dtype, no_autocast, wants_grad
from .loss import room_for_grads, save_grads, scale_grads, unit_weights

# The torch implementation makes logits for as many rows as fit CHUNK_BYTES, large enough for the matmuls, and takes
# their softmax in float32 for as many at a time as fit SOFTMAX_BYTES, small enough for the caches.
CHUNK_BYTES = 32 << 20
SOFTMAX_BYTES = 8 << 20


def masked_token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum over rows of row_weight[r] * (cross-entropy(logits[r], targets[r]) + z_loss * logsumexp(logits[r]) ** 2)
    with logits = hidden @ weight.T + bias, and which rows the largest logit gets right.

    Args:
        hidden: [M, D] floating.
        weight: [V, D].
        bias: [V].
        targets: [M] int32 in [0, V).
        row_weight: [M] floating; carries every normalisation.
        label_smoothing: as torch.nn.functional.cross_entropy has it.
        z_loss: weight of the squared log-partition (Chowdhery et al., arXiv 2204.02311, section 5).
        impl: "auto", "triton" or "torch".

    Returns:
        (the scalar loss, float32 (float64 for float64 hidden); correct [M] bool: argmax == target, the first of
        equals). The matmuls run in autocast's dtype where it is on, else in that of hidden; the softmax in float32.
        Gradients for hidden, weight, bias and row_weight; the first three are computed in the forward pass, where they
        are wanted.

    Raises:
        TypeError, ValueError: naming the argument whose dtype, shape, device or value is wrong.
    """
    check_float("hidden", hidden, (None, None), hidden)
    check_float("weight", weight, (None, hidden.shape[1]), hidden)
    check_float("bias", bias, (weight.shape[0],), hidden)
    check_index("targets", targets, (hidden.shape[0],), hidden)
    check_float("row_weight", row_weight, (hidden.shape[0],), hidden)
    if not len(weight):
        raise ValueError("weight has no rows: there must be a vocabulary")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, it must be from 0 to 1")
    dtype = compute_dtype(hidden, weight)
    loss, *_, correct = token_loss_op(
        hidden, weight, bias, row_weight, targets, label_smoothing, z_loss,
        dtype, wants_grad(hidden), wants_grad(weight, bias), impl,
    )  # fmt: skip
    return loss, correct


@torch.library.custom_op("m3ae::token_loss", mutates_args=())
def token_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_weight: Tensor,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    dtype: torch.dtype,
    hidden_grad: bool,
    param_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (loss, row losses, unit, the gradients of hidden, weight and bias divided by unit, correct)."""
    share_M, unit = unit_weights(row_weight, accumulator(dtype))
    row_loss_M = torch.empty_like(share_M)
    correct_M = torch.empty_like(targets, dtype=torch.bool)
    grads = room_for_grads(hidden, weight, dtype, hidden_grad, param_grad)
    if choose_impl(impl, hidden.device) == "triton":
        from .triton_impl.token_loss import token_loss
    else:
        token_loss = _token_loss
    if not len(hidden):
        for grad in grads:
            grad.zero_()
    else:
        with no_autocast(hidden):
            token_loss(
                hidden.to(dtype), weight.to(dtype), bias.to(dtype), share_M, targets, label_smoothing, z_loss,
                row_loss_M, correct_M, *grads,
            )  # fmt: skip
    return torch.dot(row_loss_M, row_weight.to(row_loss_M.dtype)), row_loss_M, unit, *grads, correct_M


@token_loss_op.register_fake
def _(hidden, weight, bias, row_weight, targets, label_smoothing, z_loss, dtype, hidden_grad, param_grad, impl):
    row_loss = row_weight.new_empty(hidden.shape[0], dtype=accumulator(dtype))
    grads = room_for_grads(hidden, weight, dtype, hidden_grad, param_grad)
    return row_loss.new_empty(()), row_loss, row_loss.new_empty(()), *grads, torch.empty_like(targets, dtype=torch.bool)


def _token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    share: Tensor,
    targets: Tensor,
    smoothing: float,
    z_loss: float,
    row_loss: Tensor,
    correct: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None:
    """Fills row_loss [M], correct [M], and the gradients that have room; hidden, weight and bias have one dtype."""
    dtype, acc, vocab = hidden.dtype, share.dtype, weight.shape[0]
    wanted = bool(grad_hidden.numel() or grad_weight.numel())
    grad_bias.zero_()
    chunk = min(len(hidden), max(1, CHUNK_BYTES // (vocab * dtype.itemsize)))
    logits_CV = hidden.new_empty(chunk, vocab)
    softmax_rows = min(chunk, max(1, SOFTMAX_BYTES // (vocab * acc.itemsize)))
    softmax_CV = hidden.new_empty(softmax_rows, vocab, dtype=acc)
    sum_VD = torch.zeros_like(grad_weight, dtype=acc) if chunk < len(hidden) else None

    def softmax(rows: slice, logits_CV: Tensor) -> None:
        """Turns logits into the slope of each row's loss to them, and fills in row losses, correct and bias's sum."""
        target_C1 = targets[rows, None].long()
        correct[rows] = logits_CV.max(1).indices == targets[rows]  # faster than argmax
        log_p_CV = torch.log_softmax(logits_CV, 1, dtype=acc, out=softmax_CV[: len(logits_CV)])
        # Any column gives the log-partition; the target's keeps the digits that the loss is made of.
        log_p_target_C1 = log_p_CV.gather(1, target_C1)
        lse_C1 = logits_CV.gather(1, target_C1) - log_p_target_C1
        loss_C1 = -(1 - smoothing) * log_p_target_C1 + z_loss * lse_C1.square()
        if smoothing:
            loss_C1 -= smoothing * log_p_CV.mean(1, keepdim=True)
        row_loss[rows] = loss_C1[:, 0]
        if not wanted:
            return
        slope_CV = log_p_CV.exp_()
        if z_loss:
            slope_CV *= 1 + 2 * z_loss * lse_C1
        if smoothing:
            slope_CV -= smoothing / vocab
        slope_CV.scatter_add_(1, target_C1, slope_CV.new_full((1, 1), smoothing - 1).expand_as(target_C1))
        if grad_bias.numel():
            grad_bias.addmv_(slope_CV.t(), share[rows])
        logits_CV.copy_(slope_CV)

    for start in range(0, len(hidden), chunk):
        hidden_CD, share_C1 = hidden[start : start + chunk], share[start : start + chunk, None]
        slope_CV = torch.addmm(bias, hidden_CD, weight.t(), out=logits_CV[: len(hidden_CD)])
        for first in range(0, len(hidden_CD), softmax_rows):
            part_CV = slope_CV[first : first + softmax_rows]
            softmax(slice(start + first, start + first + len(part_CV)), part_CV)
        # Row weights scale the narrow matrices, not the wide one.
        if grad_hidden.numel():
            torch.mul(slope_CV @ weight, share_C1, out=grad_hidden[start : start + chunk])
        if grad_weight.numel():
            weighted_CD = (hidden_CD * share_C1).to(dtype)
            if sum_VD is not None:
                sum_VD += slope_CV.t() @ weighted_CD
            elif grad_weight.dtype == dtype:
                torch.mm(slope_CV.t(), weighted_CD, out=grad_weight)
            else:
                grad_weight.copy_(slope_CV.t() @ weighted_CD)
    if sum_VD is not None:
        grad_weight.copy_(sum_VD)


def _backward(ctx, upstream, *_):
    return *scale_grads(ctx, upstream), *[None] * 7


token_loss_op.register_autograd(_backward, setup_context=save_grads)


class MaskedTokenLoss(nn.Module):
    """`masked_token_loss` with the head that it owns: weight [vocab, dim] (Xavier uniform), bias [vocab] (zero)."""

    def __init__(self, dim: int, vocab: int, *, label_smoothing: float = 0.0, z_loss: float = 0.0, impl: str = "auto"):
        super().__init__()
        self.label_smoothing, self.z_loss, self.impl = label_smoothing, z_loss, impl
        self.weight = nn.Parameter(torch.empty(vocab, dim))
        self.bias = nn.Parameter(torch.empty(vocab))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, targets: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [M, dim], targets [M] int32, row_weight [M] -> (scalar loss, correct [M] bool)."""
        return masked_token_loss(
            hidden,
            self.weight,
            self.bias,
            targets,
            row_weight,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            impl=self.impl,
        )

    def predict(self, hidden: Tensor) -> Tensor:
        """The logits [M, vocab] of hidden [M, dim]."""
        return F.linear(hidden, self.weight.to(hidden.dtype), self.bias.to(hidden.dtype))

    def extra_repr(self) -> str:
        vocab, dim = self.weight.shape
        return f"dim={dim}, vocab={vocab}, label_smoothing={self.label_smoothing}, z_loss={self.z_loss}"
