"""Training of many heads (for several layers, poolings, learning rates and seeds) in one pass over the batches.

The heads that read the same features form a stack, and are updated together. Each rank processes its part of each step.
Statistics and gradients are summed over ranks, so apart from rounding, the result does not depend on the number of
ranks.

Shapes: N samples, S samples of a step on this rank, R samples of a bank on this rank, H heads of a stack, K classes, D
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.data.order import permutation
from m3ae_fast.heads.feature_bank import FeatureBank, FeatureType
from m3ae_fast.heads.modules import AttentiveHeads, LinearHeads
from m3ae_fast.heads.stacked_optimizers import StackedOptimizer
from m3ae_fast.process.collectives import all_reduce
from m3ae_fast.process.heartbeats import Heartbeats
from m3ae_fast.process.ranks import Ranks

Heads = LinearHeads | AttentiveHeads
_AT_A_TIME = 256  # number of samples that are classified at a time


class HeadBatch(NamedTuple):
    """This rank's part of a step."""

    inputs: Mapping[FeatureType, Tensor]  # features [S, D], or patch tokens [S, L, D]
    targets: Tensor  # in one of the three forms that `losses` accepts
    samples: int  # number of samples of the step, over all ranks


def stored_steps(banks: Mapping[FeatureType, FeatureBank], steps: range, batch: int, seed: int) -> Iterator[HeadBatch]:
    """Yield this rank's part of each training step over banks of the same samples, in shuffled order. An epoch is a
    permutation of all samples, and a step may span two epochs. Each rank processes those samples of a step that it
    stores. `batch`: number of samples of a step."""
    bank = next(iter(banks.values()))
    samples = len(bank.keys)
    row_N = torch.full((samples,), -1)  # row of each sample in this rank's features; -1: another rank has the sample
    row_N[bank.own] = torch.arange(len(bank.own))
    order = lru_cache(maxsize=2)(partial(permutation, samples, seed))  # permutation by epoch
    for step in steps:
        epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), samples)
        numbers = torch.from_numpy(
            np.concatenate([order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])
        )
        own = numbers[row_N[numbers] >= 0]
        inputs = {kind: each.take(row_N[own]) for kind, each in banks.items()}
        yield HeadBatch(inputs, bank.labels[own], batch)


@dataclass
class Stack:
    """Heads that read the same features and are trained together."""

    heads: Heads
    optimizer: StackedOptimizer
    scales_H: Tensor  # learning rates as multiples of the learning rate of the schedule
    ranks: Ranks | None = None  # ranks across which each step is split

    def step(self, x: Tensor, targets: Tensor, samples: int, lr: float) -> tuple[Tensor, Tensor]:
        """Take a training step, given this rank's part of its samples. Return the loss and the accuracy of each head
        before the step, over all samples of the step, float32 [H] each.

        Args:
            x: features [S, D], or patch tokens [S, L, D].
            targets: see `losses`.
            samples: number of samples of the step, over all ranks.
            lr: learning rate of the schedule.
        """
        self.heads.train()
        self.optimizer.zero_grad()
        logits_SHK = self.heads(x)
        loss_SH, right_SH, _ = losses(logits_SHK, targets)
        (loss_SH.sum() / samples).backward()
        for p in self.heads.parameters():
            assert p.grad is not None
            all_reduce(p.grad, self.ranks)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.scales_H
        self.optimizer.step()
        loss_H, right_H = all_reduce(torch.stack((loss_SH.detach().sum(0), right_SH.sum(0))), self.ranks) / samples
        return loss_H, right_H


def fit_heads(
    batches: Iterable[HeadBatch],
    stacks: Mapping[FeatureType, Stack],
    lr: Callable[[int], float],
    title: str,
    ranks: Ranks,
    heartbeats: Heartbeats,
) -> dict[FeatureType, Tensor]:
    """Train all heads on the same batches. Every rank must call it.

    Args:
        batches: this rank's part of each step.
        stacks: heads, keyed by the features that they read; they are in evaluation mode afterwards.
        lr: function that maps a step to its learning rate, which is multiplied by the scale of each head.
        title: description of the training.
        ranks: ranks across which each step is split.
        heartbeats: heartbeats of this rank, which are marked with the title at each step.

    Returns:
        The training accuracy of each head at each step, before the update: float32 [steps, H] by type of features, on
        the CPU.
    """
    right: dict[FeatureType, list[Tensor]] = {kind: [] for kind in stacks}
    for step, batch in enumerate(batches):
        heartbeats.mark(title)
        targets = batch.targets.to(ranks.device)
        for kind, stack in stacks.items() if batch.samples else ():
            x = batch.inputs[kind].to(ranks.device).float()
            right[kind].append(stack.step(x, targets, batch.samples, lr(step))[1])
    for stack in stacks.values():
        stack.heads.eval()
    return {kind: torch.stack(own).cpu() if own else torch.zeros(0, 1) for kind, own in right.items()}


@torch.no_grad()
def logits(heads: Heads, bank: FeatureBank, number: int = 0) -> Tensor:
    """Return the logits of one of the heads for this rank's samples: float32 [R, K], on the CPU. The heads must be in
    evaluation mode. `number`: index of the head in the stack."""
    return torch.cat([part_SHK[:, number].cpu() for _, part_SHK in _logits(heads, bank)])


@torch.no_grad()
def judge(heads: Heads, bank: FeatureBank) -> list[tuple[float, float | None]]:
    """Return two numbers for each head: its accuracy (for lists of labels, its mAP) on the samples of all ranks, and
    its loss. They are (0, None) for a head that has diverged. Every rank must call it."""
    totals_3H, labels_R = torch.zeros(3, len(heads.linear.bias), dtype=torch.float64), bank.labels[bank.own]
    for part, part_SHK in _logits(heads, bank):
        totals_3H += torch.stack(losses(part_SHK, labels_R[part].to(part_SHK.device))).double().sum(1).cpu()
    judged = verdicts(totals_3H, len(bank.keys), bank.ranks)
    if not bank.has_lists:
        return judged
    return [
        (0.0, None) if loss is None else (bank.predictions(logits(heads, bank, number)).quality, loss)
        for number, (_, loss) in enumerate(judged)
    ]


def verdicts(totals_3H: Tensor, samples: int, ranks: Ranks | None) -> list[tuple[float, float | None]]:
    """Return the accuracies and losses of heads, as `judge` does. Every rank must call it.

    Args:
        totals_3H: sums of the results of `losses` over this rank's samples, float64 on the CPU.
        samples: number of samples of all ranks.
        ranks: the ranks; None: this process has all samples.
    """
    if ranks is not None:
        ranks.sum_tensor(totals_3H)
    return [(0.0, None) if bad else (right / samples, loss / samples) for loss, right, bad in totals_3H.T.tolist()]


def _logits(heads: Heads, bank: FeatureBank) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of this rank's samples with their logits [S, H, K]; if there are no samples, yield one empty
    slice."""
    for start in range(0, max(len(bank.own), 1), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        yield part, heads(bank.take(part).to(heads.linear.bias.device).float())


def losses(logits_SHK: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each sample and head, the cross entropy, whether the prediction is correct (1 or 0), and whether a
    logit is not finite (1 or 0): float32 [S, H] each.

    Args:
        logits_SHK: the logits.
        targets: the labels, in one of three forms:

            - int64 [S]: class ids.
            - float32 [S, K]: the count of each class in each sample, such as the number of pixels of a patch that
              belong to the class. The second result is then the count of the predicted class.
            - bool [S, K]: whether each sample belongs to each class. The first result is then the sum of the binary
              cross entropies of the classes, and a prediction is correct if the sample belongs to the predicted class.
    """
    samples, heads, _ = logits_SHK.shape
    targets = targets[:, None].expand(samples, heads, *targets.shape[1:])
    if targets.dtype == torch.bool:
        loss_SH = F.binary_cross_entropy_with_logits(logits_SHK, targets.float(), reduction="none").sum(2)
    else:
        each = F.cross_entropy(logits_SHK.flatten(0, 1), targets.flatten(0, 1), reduction="none")
        loss_SH = each.view(samples, heads)
    best_SH, bad_SH = logits_SHK.argmax(2), ~logits_SHK.isfinite().all(2)
    right_SH = targets == best_SH if targets.ndim == 2 else targets.gather(2, best_SH[..., None])[..., 0]
    return loss_SH, right_SH.float(), bad_SH.float()
