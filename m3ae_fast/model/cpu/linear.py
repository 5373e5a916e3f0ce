"""The linear layer of the trunk: torch's own, except on CPUs where another library is faster.

Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast.hardware import this_cpu

# evaluated at import; inside a compiled function it would break the graph
ONEDNN = torch.backends.mkldnn.is_available() and this_cpu().vendor == "AuthenticAMD"


class Linear(nn.Linear):
    def forward(self, x_RI: Tensor) -> Tensor:
        return linear(x_RI, self.weight, self.bias)


def linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """As torch.nn.functional.linear; in float32 on AMD's CPUs through oneDNN, where torch takes MKL, which reaches half
    of that there. On Intel's MKL is the faster by a tenth."""
    plain = x_RI.dtype == weight_OI.dtype == torch.float32 and x_RI.device.type == "cpu" and len(x_RI) > 0
    if plain and ONEDNN and not torch.is_autocast_enabled("cpu"):
        return onednn_linear(x_RI, weight_OI, bias_O)
    return F.linear(x_RI, weight_OI, bias_O)


@torch.library.custom_op("m3ae_fast::onednn_linear", mutates_args=())
def onednn_linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")


@onednn_linear.register_fake
def _(x_RI, weight_OI, bias_O):
    return x_RI.new_empty(x_RI.shape[0], weight_OI.shape[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad_RO):
    x_RI, weight_OI = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    grad_x = onednn_linear(grad_RO, weight_OI.t(), None) if need_x else None
    grad_weight = onednn_linear(grad_RO.t(), x_RI.t(), None) if need_weight else None
    return grad_x, grad_weight, grad_RO.sum(0) if need_bias else None


onednn_linear.register_autograd(_backward, setup_context=_save)
