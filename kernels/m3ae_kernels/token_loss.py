"""Cross-entropy over a vocabulary, including the head. Logits are computed one chunk of rows at a time.

Shapes: M rows, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .dispatch import (
    accumulator,
    as_rows,
    check_float,
    check_index,
    check_number,
    choose_impl,
    compute_dtype,
    is_integer,
    no_autocast,
    wants_grad,
    with_lead,
)
from .ids import check_range, checked
from .loss import (
    LossHead,
    check_reduction,
    empty_gradients,
    row_gradients,
    row_weights,
    save_gradients,
    save_inputs,
    scale_gradients,
    unit_weights,
)
from .plain import check_plain
from .registry import Op
from .token_arguments import Inputs, Options, Results

# Workspace for logits in bytes; large enough for full matmul speed.
WORKSPACE = {"triton": 256 << 20, "torch": 64 << 20}
# Maximum number of bytes of float32 values that the softmax of the torch implementation processes at a time, so that
# they fit into the caches.
SOFTMAX_BYTES = 8 << 20


def masked_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_correct: bool = False,
    workspace: int | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the mean over rows r of row_weight[r] * (cross-entropy(logits[r], targets[r]) + z_loss *
    logsumexp(logits[r]) ** 2) with logits = hidden @ weight.T + bias.

    Args:
        hidden: [..., D] floating-point.
        weight: [V, D] floating-point.
        targets: [...] int32 or int64 in [0, V), or `ignore_index`.
        bias: [V] floating-point, or None for no bias.
        row_weight: [...] floating-point, or None for ones.
        reduction: "mean" (the sum divided by the total weight of the rows that are not ignored; 0 if there are none),
            "sum" or "none" (the terms of the sum, [...]).
        ignore_index: rows with this target have a loss of 0 and no gradient, and never count as correct.
        label_smoothing: as in torch.nn.functional.cross_entropy.
        z_loss: weight of the squared log-partition (Chowdhery et al., arXiv 2204.02311, section 5).
        return_correct: whether to return (loss, correct) instead of only the loss.
        workspace: maximum number of bytes of logits that are kept at once (at least one row is kept); None: 256 MiB
            with Triton, 64 MiB with torch.
        impl: "auto", "triton" or "torch".

    Returns:
        The loss in float32 (float64 for float64 hidden), a scalar, or [...] with reduction "none". With return_correct,
        also `correct`, bool [...]: whether the target is the index of the largest logit (the first one if several are
        equal). The matmuls run in autocast's dtype if autocast is enabled, otherwise in the dtype of hidden; the
        softmax runs in float32 (float64 for float64). Gradients are computed for hidden, weight, bias and row_weight.
        The required gradients of hidden, weight and bias are computed in the forward pass. With "none", they are
        computed in the backward pass, which repeats the matmuls. With the Triton kernel, the loss is NaN if a target is
        out of range.

    Raises:
        TypeError, ValueError: the dtype, shape, device or value of the named argument is wrong.
        IndexError: a target is out of range. Targets are checked by torch's implementation on a CPU, and everywhere
            with M3AE_KERNELS_CHECK=1.
    """
    check_float("hidden", hidden, (..., None), hidden)
    lead = hidden.shape[:-1]
    check_float("weight", weight, (None, hidden.shape[-1]), hidden)
    if bias is not None:
        check_float("bias", bias, (weight.shape[0],), hidden)
    check_index("targets", targets, lead, hidden)
    if row_weight is not None:
        check_float("row_weight", row_weight, lead, hidden)
        row_weight = as_rows(row_weight, 0)
    hidden, targets = as_rows(hidden, 1), as_rows(targets, 0)
    if not weight.shape[0]:
        raise ValueError("weight has no rows, but the vocabulary must not be empty")
    check_number("label_smoothing", label_smoothing)
    check_number("z_loss", z_loss)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, but must be from 0 to 1")
    check_reduction(reduction)
    if not is_integer(ignore_index):
        raise TypeError(f"ignore_index is {ignore_index}, but must be an integer")
    if targets.dtype == torch.int32 and not -(2**31) <= ignore_index < 2**31:
        raise ValueError(f"ignore_index is {ignore_index}, which int32 targets cannot contain")
    if workspace is not None:
        if not is_integer(workspace):
            raise TypeError(f"workspace is {workspace!r}, but must be an integer number of bytes")
        if workspace < 1:
            raise ValueError(f"workspace is {workspace} bytes, but must be positive")
    dtype = compute_dtype(hidden, weight)
    impl = choose_impl(impl, hidden.device, dtype)
    options = Options(ignore_index, label_smoothing, z_loss, dtype, return_correct, workspace, impl)
    if reduction == "none":
        loss, correct = token_rows_op(hidden, weight, bias, targets, *options)
        loss = with_lead(loss if row_weight is None else loss * row_weight.to(loss.dtype), lead)
    else:
        counted = targets != ignore_index if reduction == "mean" else None
        weight_M = row_weights(row_weight, counted, hidden, accumulator(dtype), reduction)
        needs = [wants_grad(hidden), wants_grad(weight), wants_grad(bias)]
        loss, *_, correct = token_loss_op(hidden, weight, bias, weight_M, targets, needs, *options)
    return (loss, with_lead(correct, lead)) if return_correct else loss


# torch.library reads the ops' arguments from these two signatures; all other code uses `Inputs` and `Options`.


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor,
    targets: Tensor,
    needs: Sequence[bool],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    dtype: torch.dtype,
    return_correct: bool,
    workspace: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, the row losses, the unit (see `unit_weights`), the gradients of hidden, weight and bias divided
    by the unit, and `correct`."""
    options = Options(ignore_index, label_smoothing, z_loss, dtype, return_correct, workspace, impl)
    return _loss(Inputs(hidden, weight, bias, row_weight, targets), options, needs)


def _rows_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    dtype: torch.dtype,
    return_correct: bool,
    workspace: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return (row losses, correct)."""
    options = Options(ignore_index, label_smoothing, z_loss, dtype, return_correct, workspace, impl)
    ones_M = hidden.new_ones(len(hidden), dtype=accumulator(dtype))
    _, row_loss, *_, correct = _loss(Inputs(hidden, weight, bias, ones_M, targets), options, [False] * 3)
    return row_loss, correct


def _loss(
    inputs: Inputs, options: Options, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias, row_weight, targets = inputs
    dtype, impl = options.dtype, options.impl
    if checked(targets, impl):
        check_range("masked_token_loss", "targets", targets, len(weight), ignored=options.ignore_index)
    row_weight = row_weight.masked_fill(targets == options.ignore_index, 0)
    unit_weight_M, unit = unit_weights(row_weight)
    results = _empty_results(inputs, options, needs)
    if impl == "triton":
        from .triton_impl.token_loss import token_loss
    else:
        token_loss = _token_loss
    if not len(hidden):
        for grad in results[2:]:
            grad.zero_()
    else:
        inputs = Inputs(
            hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), unit_weight_M, targets
        )
        options = options._replace(workspace=options.workspace or WORKSPACE[impl])
        with no_autocast(hidden):
            token_loss(inputs, options, needs, results)
    row_loss_M, correct_M, *grads = results
    return torch.dot(row_loss_M, row_weight), row_loss_M, unit, grads[0], grads[1], grads[2], correct_M


def _empty_results(inputs: Inputs, options: Options, needs: Sequence[bool]) -> Results:
    rows = inputs.targets.shape[0] if options.return_correct else 0
    correct = inputs.targets.new_empty(rows, dtype=torch.bool)
    grads = empty_gradients(inputs.hidden, inputs.weight, options.dtype, needs)
    return Results(torch.empty_like(inputs.row_weight), correct, *grads)


def _fake(hidden, weight, bias, row_weight, targets, needs, *options):
    row_loss, correct, *grads = _empty_results(
        Inputs(hidden, weight, bias, row_weight, targets), Options(*options), needs
    )
    return row_loss.new_empty(()), row_loss, row_loss.new_empty(()), *grads, correct


def _rows_fake(hidden, weight, bias, targets, *options):
    ones = hidden.new_empty(hidden.shape[0], dtype=accumulator(Options(*options).dtype))
    return _empty_results(Inputs(hidden, weight, bias, ones, targets), Options(*options), [False] * 3)[:2]


def _rows_backward(ctx, upstream, _):
    def loss(inputs, row_weight, needs):
        return token_loss_op(*inputs[:3], row_weight, inputs[3], needs, *inputs[4:])

    return row_gradients(ctx, upstream, loss)


def _backward(ctx, upstream, *_):
    return scale_gradients(ctx, upstream, len(Inputs._fields) + 1 + len(Options._fields))


token_loss_op = Op("token_loss", _forward, _fake, save_gradients, _backward)
token_rows_op = Op("token_rows", _rows_forward, _rows_fake, save_inputs, _rows_backward)


def _token_loss(inputs: Inputs, options: Options, needs: Sequence[bool], results: Results) -> None:
    """Fill `results`; only the gradients selected by `needs` are computed. `hidden`, `weight` and `bias` share one
    dtype, and ignored rows have weight 0."""
    hidden, weight, bias, unit_weight, targets = inputs
    row_loss, correct, grad_hidden, grad_weight, grad_bias = results
    ignore_index, smoothing, z_loss = options[:3]
    assert options.workspace is not None
    dtype, acc, vocab = hidden.dtype, unit_weight.dtype, weight.shape[0]
    bias = weight.new_zeros(vocab) if bias is None else bias
    grad_bias.zero_()
    chunk = min(len(hidden), max(1, options.workspace // (vocab * dtype.itemsize)))
    logits_CV = hidden.new_empty(chunk, vocab)
    softmax_rows = min(chunk, max(1, SOFTMAX_BYTES // (vocab * acc.itemsize)))
    softmax_CV = hidden.new_empty(softmax_rows, vocab, dtype=acc)
    sum_VD = torch.zeros_like(grad_weight, dtype=acc) if chunk < len(hidden) else None

    def softmax(rows: slice, logits_CV: Tensor) -> None:
        """Replace the logits by the gradients of the row losses with respect to them, and fill in the row losses,
        `correct` and the bias gradient."""
        ignored_C1 = targets[rows, None] == ignore_index
        target_C1 = targets[rows, None].long().masked_fill(ignored_C1, 0)
        if len(correct):
            hit_C = logits_CV.max(1).indices == targets[rows]  # faster than argmax
            correct[rows] = hit_C.masked_fill_(ignored_C1[:, 0], False)
        log_p_CV = torch.log_softmax(logits_CV, 1, dtype=acc, out=softmax_CV[: len(logits_CV)])
        # The logsumexp is logit - log_p in any column; the target's column avoids cancellation in the loss.
        log_p_target_C1 = log_p_CV.gather(1, target_C1)
        lse_C1 = logits_CV.gather(1, target_C1) - log_p_target_C1
        loss_C1 = -(1 - smoothing) * log_p_target_C1 + z_loss * lse_C1.square()
        if smoothing:
            loss_C1 -= smoothing * log_p_CV.mean(1, keepdim=True)
        row_loss[rows] = loss_C1.masked_fill_(ignored_C1, 0)[:, 0]
        if not any(needs):
            return
        grad_CV = log_p_CV.exp_()
        if z_loss:
            grad_CV *= 1 + 2 * z_loss * lse_C1
        if smoothing:
            grad_CV -= smoothing / vocab
        grad_CV.scatter_add_(1, target_C1, grad_CV.new_full((1, 1), smoothing - 1).expand_as(target_C1))
        if needs[2]:
            grad_bias.addmv_(grad_CV.t(), unit_weight[rows])
        logits_CV.copy_(grad_CV)

    for start in range(0, len(hidden), chunk):
        hidden_CD, unit_weight_C1 = hidden[start : start + chunk], unit_weight[start : start + chunk, None]
        grad_CV = torch.addmm(bias, hidden_CD, weight.t(), out=logits_CV[: len(hidden_CD)])
        for first in range(0, len(hidden_CD), softmax_rows):
            part_CV = grad_CV[first : first + softmax_rows]
            softmax(slice(start + first, start + first + len(part_CV)), part_CV)
        # To save time, the row weights are applied to matrices of width D and not to the logits' gradients of width V.
        if needs[0]:
            torch.mul(grad_CV @ weight, unit_weight_C1, out=grad_hidden[start : start + chunk])
        if needs[1]:
            weighted_CD = (hidden_CD * unit_weight_C1).to(dtype)
            if sum_VD is not None:
                sum_VD += grad_CV.t() @ weighted_CD
            elif grad_weight.dtype == dtype:
                torch.mm(grad_CV.t(), weighted_CD, out=grad_weight)
            else:
                grad_weight.copy_(grad_CV.t() @ weighted_CD)
    if needs[1] and sum_VD is not None:
        grad_weight.copy_(sum_VD)


class MaskedTokenLoss(LossHead):
    """A module that computes `masked_token_loss` with its own head: weight [vocab, dim] (Xavier uniform) and, unless
    `bias` is False, bias [vocab] (zero). The other options are those of `masked_token_loss`. The constructor raises
    ValueError if the reduction is unknown."""

    def __init__(
        self,
        dim: int,
        vocab: int,
        *,
        bias: bool = True,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        workspace: int | None = None,
        impl: str = "auto",
    ):
        check_reduction(reduction)
        super().__init__(dim, vocab, bias)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "reduction": reduction,
            "workspace": workspace,
            "impl": impl,
        }

    @property
    def reduction(self) -> str:
        """Return the reduction: "mean", "sum" or "none"."""
        return self.options["reduction"]

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> "MaskedTokenLoss":
        """Return a loss module that shares the parameters of a language model's head. `options` are further arguments
        of the constructor.

        Raises:
            TypeError: the module is not a `torch.nn.Linear`, or computes more than this class, such as an adapter.
        """
        check_plain("head", linear, nn.Linear)
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, **options)
        for name in ("weight", "bias"):
            setattr(head, name, getattr(linear, name))
        return head

    def forward(
        self, hidden: Tensor, targets: Tensor, row_weight: Tensor | None = None, *, return_correct: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the loss, a scalar or (with reduction "none") [...], for hidden [..., dim], targets [...] int and
        row_weight [...] (None for ones). With return_correct, return (loss, correct [...] bool)."""
        (vocab, dim), width = self.weight.shape, hidden.shape[-1]
        if width != dim:
            raise ValueError(f"hidden has width {width}, but this MaskedTokenLoss has dim={dim} and vocab={vocab}")
        return masked_token_loss(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            row_weight=row_weight,
            return_correct=return_correct,
            **self.options,
        )

    def extra_repr(self) -> str:
        (vocab, dim), options = self.weight.shape, ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"dim={dim}, vocab={vocab}, bias={self.bias is not None}, {options}"
