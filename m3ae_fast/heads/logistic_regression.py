"""Logistic regression on standardised features, for several strengths of the L2 penalty at once.

L-BFGS (Liu and Nocedal 1989) minimises the loss of all samples. Its initial estimate of the inverse Hessian is computed
for zero weights from the covariance of the features, so that few iterations are necessary. Each rank computes the
losses and gradients of its own samples, and all ranks take the same steps.

Shapes: N samples, R of them on this rank, B of them at a time, D width, P = D + 1 weights of a class, the last of which
is its bias, K classes, H strengths, A of which are still being optimised, M pairs in the memory, Q eigenvectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.fit_heads import judge, logits
from m3ae_fast.heads.hyperparameter_choice import Trial, best, split, within_error
from m3ae_fast.heads.modules import BATCH_NORM_EPS, LinearHeads
from m3ae_fast.heads.predictions import Predictions
from m3ae_fast.process.collectives import all_reduce
from m3ae_fast.process.heartbeats import Heartbeats
from m3ae_fast.process.ranks import Ranks

USUAL = 1.0  # scikit-learn's default inverse strength
INVERSE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, USUAL)  # inverse strengths that `fit_chosen` tries
# Minimum number of held-out samples for the one-standard-error rule. With fewer, the standard error is so large that
# the rule often selects a far too strong penalty. Compared to the most accurate strength, the rule cost 7 to 14 points
# of accuracy with 50 training samples, 3 to 5 points with 100, and 1.2 +- 0.4 points with 800 (scikit-learn's digits as
# pixels and as HOG, wine and breast cancer; 20 random splits each).
# The rule is not used for lists of labels: with 1,200 samples of data/openclipart and its 40 most frequent keywords, it
# cost 3.8, 0.7 and 2.0 points of mAP for HOG, pixels and colour histograms (means of 6 random subsets).
_ENOUGH = 100
_CONVERGED = 1e-7  # a fit has converged if its next step is expected to decrease the mean loss by less than this
_MOST_ITERATIONS = 1000
_MEMORY = 10  # number of stored pairs; a pair is a step and the resulting change of the gradient
_SUFFICIENT = 1e-4  # minimum decrease of the loss as a fraction of the decrease that the gradient predicts (Armijo)
_ROUNDING = 1e-7  # relative rounding error of a loss
_SHORTEST = 1e-6  # minimum step length
_AT_A_TIME = 1 << 22  # maximum number of logits that are computed at a time
# For wider features, only the largest eigenvalues of the covariance are computed. The time for all of them grows with
# the cube of the width: for a width of 3,072, computing all eigenvalues takes 34 CPU seconds, and only 256 takes 0.6.
_WIDE, _EIGENVALUES, _POWERS = 512, 256, 2
# A feature counts as constant if its standard deviation is below _CONSTANT times its mean (a few roundings of float32),
# or below _TINY, whose inverse float32 can still represent.
_CONSTANT, _TINY = 1e-6, 1e-30


class Tried(NamedTuple):
    """One classifier for each of INVERSE_STRENGTHS, fitted to those samples of a bank that are not held out."""

    trials: list[Trial]  # results on the held-out samples; empty if no samples are held out, because there are too few
    held_out: int  # number of held-out samples
    weight_HKP: Tensor | None  # weights of the classifiers; None if there are no trials

    def quality(self, ranks: Ranks | None) -> float:
        """Return the highest quality; 0 without trials. Every rank must call it, and gets the same value."""
        quality = best(self.trials).quality if self.trials else 0.0
        return ranks.from_main(quality) if ranks else quality


def fit_chosen(
    bank: FeatureBank, classes: int, heartbeats: Heartbeats | None = None, tried: Tried | None = None
) -> tuple[LinearHeads, float]:
    """Choose the strength of the penalty on a held-out tenth of the samples, and fit a classifier to all samples: one
    multinomial regression or, for lists of labels, one binary regression per class. Every rank must call it.

    The strength is chosen as follows:

    - By default, it is the strongest penalty whose accuracy on the held-out samples is within one standard error of the
      highest accuracy; see `within_error`.
    - If fewer than _ENOUGH samples are held out, it is the penalty with the highest accuracy; in a tie, the one with
      the lowest loss.
    - For lists of labels, it is the penalty with the highest mAP.
    - If there are fewer than ten samples, the inverse strength is USUAL. This is also so if no held-out sample is
      classified correctly, for example because each class has one sample.

    Args:
        bank: the features.
        classes: number of classes.
        heartbeats: heartbeats of this rank, which are marked in each iteration.
        tried: result of `try_strengths` for this bank if it is known.

    Returns:
        The classifier, as a single head, and its inverse strength.
    """
    trials, held_out, tried_HKP = tried or try_strengths(bank, classes, heartbeats)
    strength, start_HKP = USUAL, None
    if tried_HKP is not None:
        if best(trials).quality:
            is_error_known = held_out >= _ENOUGH and not bank.has_lists
            accurate = within_error(trials, held_out) if is_error_known else [best(trials)]
            strength = min(each.value for each in accurate)
        strength = bank.ranks.from_main(strength) if bank.ranks else strength  # all ranks use the same value
        start_HKP = tried_HKP[[INVERSE_STRENGTHS.index(strength)]]
    return _fit(bank, classes, [strength], heartbeats, start_HKP)[1], strength


def try_strengths(bank: FeatureBank, classes: int, heartbeats: Heartbeats | None = None) -> Tried:
    """Fit a classifier with each of INVERSE_STRENGTHS to nine tenths of the samples, and evaluate it on the remaining
    tenth. Every rank must call it."""
    train, held_out = (bank.rows(numbers) for numbers in split(bank))
    if not held_out.keys:
        return Tried([], 0, None)
    weight_HKP, heads = _fit(train, classes, INVERSE_STRENGTHS, heartbeats)
    judged = zip(INVERSE_STRENGTHS, judge(heads, held_out))
    return Tried([Trial(each, *found) for each, found in judged], len(held_out.keys), weight_HKP)


def predict(
    bank: FeatureBank,
    held_out: FeatureBank,
    classes: int,
    heartbeats: Heartbeats | None = None,
    tried: Tried | None = None,
) -> Predictions:
    """Fit a classifier to `bank` as `fit_chosen` does, and return its predictions for the samples of `held_out`, which
    are not used for fitting. Their `chosen` contains the "inverse_strength". They also contain the classifier. Every
    rank must call it."""
    heads, strength = fit_chosen(bank, classes, heartbeats, tried)
    found = held_out.predictions(logits(heads, held_out))
    return replace(found, chosen={"inverse_strength": strength}, classifier=heads)


def fit(bank: FeatureBank, targets: Tensor, classes: int) -> LinearHeads:
    """Return a classifier with the inverse strength USUAL, as a single head. Every rank must call it. `targets`: labels
    that replace the labels of the bank, in the form of `FeatureBank.labels`; `classes`: number of classes."""
    return _fit(replace(bank, labels_N=targets), classes, [USUAL])[1]


def _fit(
    bank: FeatureBank,
    classes: int,
    inverse_strengths: Sequence[float],
    heartbeats: Heartbeats | None = None,
    start_HKP: Tensor | None = None,
) -> tuple[Tensor, LinearHeads]:
    """Return the weights, float64 [H, K, P], and a stack of heads, one for each strength. A head is a multinomial
    regression or, for lists of labels, one binary regression per class. If all samples or no samples belong to a class,
    its binary regression has weights of 0 and a fixed bias.

    As in scikit-learn, a penalty is added to the mean loss. It is half the sum of the squared weights, divided by the
    inverse strength and by N; biases are not penalised. A multinomial regression with two classes has a single vector
    of weights w in scikit-learn, but two vectors here, w / 2 and -w / 2. The squared norm of w is twice the sum of the
    squared norms of the two vectors, so the penalty is doubled here.
    """
    features, targets = Standardised(bank), bank.labels
    device, samples = features.device, len(bank.keys)
    counts_K = (targets.sum(0) if bank.has_lists else targets.bincount(minlength=classes)).double().to(device)
    frequency_K = (counts_K + 0.5) / (samples + (1 if bank.has_lists else classes / 2))
    factor = 2 if not bank.has_lists and classes == 2 else 1
    penalty_H = factor / (samples * torch.tensor(inverse_strengths, dtype=torch.float64, device=device))
    fixed_K = (counts_K == 0) | (counts_K == samples) if bank.has_lists else torch.zeros_like(counts_K).bool()
    if start_HKP is None:
        start_HKP = torch.zeros(
            len(penalty_H), classes, bank.stored_SD.shape[-1] + 1, dtype=torch.float64, device=device
        )
        start_HKP[..., -1] = frequency_K.logit() if bank.has_lists else frequency_K.log()
    weight_HKP = _minimise(
        _Objective(features, targets[bank.own], penalty_H, fixed_K),
        start_HKP,
        _InverseHessian(features, (frequency_K * (1 - frequency_K)).clamp(min=1e-9), penalty_H),
        bank.ranks,
        heartbeats,
    )
    if not bank.has_lists:  # remove the mean of the biases, on which the softmax does not depend
        weight_HKP[..., -1] -= weight_HKP[..., -1].mean(1, keepdim=True)
    heads = LinearHeads(bank.stored_SD.shape[-1], classes, [0] * len(penalty_H)).to(device).eval()
    heads.norm.mean.copy_(features.mean_D)
    # the norm only subtracts the mean, because it would add eps to a variance; the weights contain the scale instead
    heads.norm.var.fill_(1 - BATCH_NORM_EPS)
    heads.linear.weight.data.copy_(weight_HKP[..., :-1] * features.scale_D)
    heads.linear.bias.data.copy_(weight_HKP[..., -1])
    return weight_HKP, heads


class Standardised:
    """The features of a bank, standardised to mean 0 and variance 1 over the samples of all ranks; constant features
    become 0. Every rank must create this object."""

    def __init__(self, bank: FeatureBank) -> None:
        self.bank, self.ranks = bank, bank.ranks
        self.device = bank.ranks.device if bank.ranks else bank.stored_SD.device
        zeros_D = torch.zeros(bank.stored_SD.shape[-1], dtype=torch.float64, device=self.device)
        self.mean_D, self.scale_D = zeros_D, zeros_D + 1
        sum_D = sum((part_BD.double().sum(0) for _, part_BD in self.parts(1)), zeros_D.clone())
        self.mean_D = all_reduce(sum_D, self.ranks) / len(bank.keys)
        squares_D = sum((part_BD.double().square().sum(0) for _, part_BD in self.parts(1)), zeros_D.clone())
        std_D = (all_reduce(squares_D, self.ranks) / len(bank.keys)).sqrt()
        varies_D = std_D > (_CONSTANT * self.mean_D.abs()).clamp(min=_TINY)
        self.scale_D = torch.where(varies_D, 1 / std_D, 0)

    def parts(self, logits: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of this rank's R samples, each with the standardised features of the slice, float32 [B, D].
        `logits`: number of logits per sample, which limits B."""
        at_a_time = max(_AT_A_TIME // max(logits, self.bank.stored_SD.shape[-1]), 1)
        mean_D, scale_D = self.mean_D.float(), self.scale_D.float()
        for start in range(0, len(self.bank.own), at_a_time):
            part = slice(start, start + at_a_time)
            yield part, (self.bank.take(part).to(self.device).float() - mean_D) * scale_D

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the largest eigenvalues of the covariance of the standardised features and their eigenvectors, float64
        [Q] and [D, Q], and the mean of the other eigenvalues. If the features are wide, the eigenvalues are approximate
        (subspace iteration; Halko et al., arXiv 0909.4061)."""
        width = len(self.mean_D)
        if width <= _WIDE:
            values_D, vectors_DD = torch.linalg.eigh(self._times_covariance(None))
            return values_D, vectors_DD, values_D.new_zeros(())
        # drawn on the CPU, because all ranks need the same directions
        start_DQ = torch.randn(width, _EIGENVALUES, generator=torch.Generator().manual_seed(0))
        basis_DQ = torch.linalg.qr(start_DQ.to(self.device)).Q
        for _ in range(_POWERS):
            basis_DQ = torch.linalg.qr(self._times_covariance(basis_DQ).float()).Q
        values_Q, rotation_QQ = torch.linalg.eigh(basis_DQ.double().T @ self._times_covariance(basis_DQ))
        trace = (self.scale_D > 0).sum().double()  # each feature that varies has the variance 1
        rest = (trace - values_Q.sum()).clamp(min=0) / (width - _EIGENVALUES)
        return values_Q, basis_DQ.double() @ rotation_QQ, rest

    def _times_covariance(self, right_DQ: Tensor | None) -> Tensor:
        """Return the product of the covariance with a matrix, float64 [D, Q]. `right_DQ`: float32; None: the
        identity matrix, so that the covariance is returned."""
        width = len(self.mean_D)
        total_DQ = self.mean_D.new_zeros(width, width if right_DQ is None else right_DQ.shape[1])
        for _, part_BD in self.parts(1):
            total_DQ += part_BD.T @ (part_BD if right_DQ is None else part_BD @ right_DQ)
        return all_reduce(total_DQ, self.ranks) / len(self.bank.keys)


@dataclass(frozen=True)
class _Objective:
    """The objective: the mean loss over all samples plus the penalty, for each strength, and its gradient."""

    features: Standardised
    targets: Tensor  # targets of this rank's samples
    penalty_H: Tensor
    fixed_K: Tensor  # bool: whether the weights of a class are kept fixed

    def __call__(self, weight_AKP: Tensor, which_A: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values, float64 [A], and the gradients, float64 [A, K, P], for the strengths `which_A`."""
        strengths, classes, _ = weight_AKP.shape
        weight_KD, bias_K = weight_AKP[..., :-1].flatten(0, 1).float(), weight_AKP[..., -1].flatten().float()
        found = weight_AKP.new_zeros(strengths * (1 + weight_AKP[0].numel()))
        loss_A, gradient_AKP = found[:strengths], found[strengths:].view_as(weight_AKP)
        for part, features_BD in self.features.parts(len(weight_KD)):
            logits_BAK = F.linear(features_BD, weight_KD, bias_K).unflatten(1, (strengths, classes))
            loss_BA, grad_BAK = _loss(logits_BAK, self.targets[part].to(logits_BAK.device))
            loss_A += loss_BA.sum(0, dtype=torch.float64)
            gradient_AKP[..., :-1] += (grad_BAK.flatten(1).T @ features_BD).view_as(gradient_AKP[..., :-1])
            gradient_AKP[..., -1] += grad_BAK.sum(0)
        found = all_reduce(found, self.features.ranks).div_(len(self.features.bank.keys))
        penalty_A = self.penalty_H[which_A]
        loss_A += penalty_A / 2 * weight_AKP[..., :-1].square().sum((1, 2))
        gradient_AKP[..., :-1] += penalty_A[:, None, None] * weight_AKP[..., :-1]
        return loss_A, gradient_AKP.masked_fill_(self.fixed_K[:, None], 0)


def _loss(logits_BAK: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each sample, [B, A], and its derivatives with respect to the logits, [B, A, K]."""
    if targets.ndim == 2:
        target_BAK = targets[:, None].to(logits_BAK.dtype).expand_as(logits_BAK)
        loss_BAK = F.binary_cross_entropy_with_logits(logits_BAK, target_BAK, reduction="none")
        return loss_BAK.sum(2), logits_BAK.sigmoid() - target_BAK
    log_BAK = logits_BAK.log_softmax(2)
    label_BA1 = targets[:, None, None].expand(-1, logits_BAK.shape[1], 1)
    grad_BAK = log_BAK.exp()
    grad_BAK.scatter_add_(2, label_BA1, grad_BAK.new_full(label_BA1.shape, -1))
    return -log_BAK.gather(2, label_BA1)[..., 0], grad_BAK


class _InverseHessian:
    """An estimate of the inverse Hessian at zero weights. It treats the classes as independent, each with a curvature
    of its own, and replaces all eigenvalues of the covariance except the largest ones by their mean."""

    def __init__(self, features: Standardised, curvature_K: Tensor, penalty_H: Tensor) -> None:
        values_Q, self.vectors_DQ, rest = features.spectrum
        self.rest_HK1 = 1 / (curvature_K[:, None] * rest + penalty_H[:, None, None])
        self.scale_HKQ = 1 / (curvature_K[:, None] * values_Q.clamp(min=0) + penalty_H[:, None, None]) - self.rest_HK1
        self.scale_K = 1 / curvature_K

    def __call__(self, gradient_AKP: Tensor, which_A: Tensor) -> Tensor:
        """Return the product of the estimate with the gradients of the strengths `which_A`."""
        of_weights_AKD, bias_AK = gradient_AKP[..., :-1], gradient_AKP[..., -1] * self.scale_K
        rotated_AKQ = of_weights_AKD @ self.vectors_DQ * self.scale_HKQ[which_A]
        of_weights_AKD = rotated_AKQ @ self.vectors_DQ.T + of_weights_AKD * self.rest_HK1[which_A]
        return torch.cat((of_weights_AKD, bias_AK[..., None]), -1)


class _Memory:
    """The most recent steps of each strength, with the changes of its gradient."""

    def __init__(self, like_HKP: Tensor) -> None:
        self.step_MHKP = like_HKP.new_zeros(_MEMORY, *like_HKP.shape)
        self.change_MHKP = torch.zeros_like(self.step_MHKP)
        self.rho_MH = like_HKP.new_zeros(_MEMORY, len(like_HKP))  # 0 where nothing is stored yet

    def add(self, step_AKP: Tensor, change_AKP: Tensor, which_A: Tensor) -> None:
        """Store a step and the change of the gradient for the strengths `which_A`, in place of their oldest pair."""
        for stored, new in (
            (self.step_MHKP, step_AKP),
            (self.change_MHKP, change_AKP),
            (self.rho_MH, 1 / _dot(step_AKP, change_AKP).clamp(min=1e-300)),
        ):
            stored[:, which_A] = torch.cat((stored[1:, which_A], new[None]))

    def direction(self, gradient_AKP: Tensor, which_A: Tensor, hessian: _InverseHessian) -> Tensor:
        """Return the direction of the next step, computed by the two-loop recursion of L-BFGS."""
        found_AKP, factors = -gradient_AKP, []
        pairs = [
            (s[which_A], y[which_A], rho[which_A]) for s, y, rho in zip(self.step_MHKP, self.change_MHKP, self.rho_MH)
        ]
        for step_AKP, change_AKP, rho_A in reversed(pairs):
            factor_A = rho_A * _dot(step_AKP, found_AKP)
            found_AKP = found_AKP - factor_A[:, None, None] * change_AKP
            factors.append(factor_A)
        found_AKP = hessian(found_AKP, which_A)
        _, last_AKP, rho_A = pairs[-1]
        scale_A = 1 / (rho_A * _dot(last_AKP, hessian(last_AKP, which_A)))
        found_AKP = found_AKP * scale_A.where(rho_A > 0, 1)[:, None, None]
        for (step_AKP, change_AKP, rho_A), factor_A in zip(pairs, reversed(factors)):
            found_AKP = found_AKP + (factor_A - rho_A * _dot(change_AKP, found_AKP))[:, None, None] * step_AKP
        return found_AKP


def _dot(first_AKP: Tensor, second_AKP: Tensor) -> Tensor:
    return (first_AKP * second_AKP).sum((1, 2))


def _minimise(
    objective: _Objective,
    weight_HKP: Tensor,
    hessian: _InverseHessian,
    ranks: Ranks | None,
    heartbeats: Heartbeats | None,
) -> Tensor:
    """Return the weights that minimise the objective. The strengths are independent: each has its own step length, and
    those that have converged are no longer optimised."""
    weight_HKP, at_A = weight_HKP.clone(), torch.arange(len(weight_HKP), device=weight_HKP.device)
    loss_H, gradient_HKP = objective(weight_HKP, at_A)
    memory, length_H = _Memory(weight_HKP), torch.ones_like(loss_H)
    direction_HKP = -hessian(gradient_HKP, at_A)
    for _ in range(_MOST_ITERATIONS):
        if heartbeats:
            heartbeats.mark("logistic regression")
        promised_A = -_dot(direction_HKP[at_A], gradient_HKP[at_A]) / 2
        going = (promised_A > _CONVERGED) & (length_H[at_A] > _SHORTEST)
        at_A = at_A[_same(going, ranks)]
        if not len(at_A):
            break
        step_AKP = length_H[at_A, None, None] * direction_HKP[at_A]
        loss_A, gradient_AKP = objective(weight_HKP[at_A] + step_AKP, at_A)
        predicted_A = _dot(step_AKP, gradient_HKP[at_A])
        taken = _same(loss_A <= loss_H[at_A] * (1 + _ROUNDING) + _SUFFICIENT * predicted_A, ranks)
        length_H[at_A[~taken]] /= 2
        at, step_AKP, gradient_AKP = at_A[taken], step_AKP[taken], gradient_AKP[taken]
        memory.add(step_AKP, gradient_AKP - gradient_HKP[at], at)
        weight_HKP[at] += step_AKP
        loss_H[at], gradient_HKP[at], length_H[at] = loss_A[taken], gradient_AKP, 1.0
        direction_HKP[at] = memory.direction(gradient_AKP, at, hessian)
    return weight_HKP


def _same(decisions_A: Tensor, ranks: Ranks | None) -> Tensor:
    """Return the decisions of the main rank, because rounding errors may differ between ranks."""
    return decisions_A.new_tensor(ranks.from_main(decisions_A.tolist())) if ranks else decisions_A
