"""Projected gradient descent (arXiv 1706.06083) on images, within an L-infinity ball.

Shapes: S samples, K classes, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def pgd(
    logits_of: Callable[[Tensor], Tensor],
    images_SCHW: Tensor,
    labels_S: Tensor,
    start_SCHW: Tensor,
    epsilon: float,
    steps: int,
    step_size: float,
) -> Tensor:
    """Return images that raise the cross entropy of their labels.

    Args:
        logits_of: differentiable, of images; [S, K].
        images_SCHW: floating, in [0, 1].
        labels_S: int64.
        start_SCHW: in [-1, 1]; the attack starts at images + epsilon * start.
        epsilon: most that a value changes.
        steps, step_size: of the sign of the gradient.

    Returns:
        [S, C, H, W] in [0, 1], at most epsilon away from the images.
    """
    low, high = (images_SCHW - epsilon).clamp(min=0), (images_SCHW + epsilon).clamp(max=1)
    attacked = torch.clamp(images_SCHW + epsilon * start_SCHW, low, high)
    for _ in range(steps):
        attacked.requires_grad_()
        loss = F.cross_entropy(logits_of(attacked), labels_S, reduction="sum")
        (grad,) = torch.autograd.grad(loss, attacked)
        attacked = torch.clamp(attacked.detach() + step_size * grad.sign(), low, high)
    return attacked
