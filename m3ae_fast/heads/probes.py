"""Probes of frozen features. They are trained on stored features of training samples and predict the classes of
held-out samples, for several types of features at once.

Shapes: M samples to classify, L patches, D encoder width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.progress import track
from m3ae_fast.heads import logistic_regression
from m3ae_fast.heads.feature_bank import FeatureBank, FeatureType
from m3ae_fast.heads.fit_heads import Heads, Stack, fit_heads, judge, logits, stored_steps
from m3ae_fast.heads.hyperparameter_choice import Trial, best, edge, split
from m3ae_fast.heads.knn import knn_predictions
from m3ae_fast.heads.logistic_regression import Tried
from m3ae_fast.heads.modules import AttentiveHeads, LinearHeads
from m3ae_fast.heads.predictions import Predictions
from m3ae_fast.heads.recipe import ATTENTIVE, Recipe
from m3ae_fast.heads.stacked_optimizers import AdamW
from m3ae_fast.heads.training_defaults import OFFICIAL
from m3ae_fast.heads.training_warnings import training_warnings
from m3ae_fast.process.heartbeats import Heartbeats
from m3ae_fast.process.ranks import Ranks

_USUAL = 1e-3  # peak learning rate of attentive probes if there are too few samples to try several
Banks = Mapping[FeatureType, FeatureBank]


def predict(
    banks: Banks, held_out: Banks, recipe: Recipe, ranks: Ranks, heartbeats: Heartbeats, tried: Tried | None = None
) -> dict[FeatureType, Predictions]:
    """Train a probe on each type of features, and return the predictions for the held-out samples by type. They contain
    the hyper-parameters that were selected, and warnings about their reliability. Every rank must call it, and gets all
    predictions.

    Args:
        banks: features of the training samples.
        held_out: features of the held-out samples, of the same types.
        recipe: kind of the probes, and their hyper-parameters.
        ranks, heartbeats: the ranks, and the heartbeats of this rank.
        tried: result of `try_strengths` for the features if it is known; only for logistic regression on a single type.

    Raises:
        UserError: a head diverged, so its weights or scores are not finite.
    """
    return PROBES[recipe.probe](banks, held_out, recipe, ranks, heartbeats, tried)


def _by_neighbours(
    banks: Banks, held_out: Banks, recipe: Recipe, ranks: Ranks, heartbeats: Heartbeats, tried: Tried | None
) -> dict[FeatureType, Predictions]:
    return {kind: knn_predictions(bank, held_out[kind], recipe.classes, recipe.knn) for kind, bank in banks.items()}


def _by_regression(
    banks: Banks, held_out: Banks, recipe: Recipe, ranks: Ranks, heartbeats: Heartbeats, tried: Tried | None
) -> dict[FeatureType, Predictions]:
    return {
        kind: logistic_regression.predict(bank, held_out[kind], recipe.classes, heartbeats, tried)
        for kind, bank in banks.items()
    }


def _by_attention(
    banks: Banks, held_out: Banks, recipe: Recipe, ranks: Ranks, heartbeats: Heartbeats, tried: Tried | None
) -> dict[FeatureType, Predictions]:
    """Train attentive heads on patch tokens, and linear heads on pooled features, all in one pass."""
    found = {}
    for kind, trained in train_heads(banks, recipe, ranks, heartbeats).items():
        own = held_out[kind].predictions(logits(trained.heads, held_out[kind]))
        found[kind] = with_training(own, trained, recipe)
    return found


# The docstring of `evaluation/tasks.py` lists what else a new probe needs.
PROBES: dict[str, Callable[[Banks, Banks, Recipe, Ranks, Heartbeats, Tried | None], dict[FeatureType, Predictions]]] = {
    "knn": _by_neighbours,
    "logistic": _by_regression,
    ATTENTIVE: _by_attention,
}


class Trained(NamedTuple):
    """A trained head of a stack, with information on its training."""

    heads: Heads  # the stack, in evaluation mode
    accuracies: list[float]  # training accuracy of each step, before the update
    peak_lr: float
    tried: list[Trial]  # results of the learning rates that were tried; empty if the learning rate was set
    number: int = 0  # number of the head in the stack


def train_heads(banks: Banks, recipe: Recipe, ranks: Ranks, heartbeats: Heartbeats) -> dict[FeatureType, Trained]:
    """Train one head on each bank, all in one pass, and return the heads. If the recipe has several learning rates, one
    of them is chosen for each head; see `try_rates`. Every rank must call it. Raises UserError if the weights of a head
    are not finite."""
    tried: dict[FeatureType, list[Trial]] = {kind: [] for kind in banks}
    rates = dict.fromkeys(banks, recipe.rates[0])
    if len(recipe.rates) > 1:
        tried = try_rates(banks, recipe, ranks, heartbeats)
        rates = {kind: best(own).value if own else _USUAL for kind, own in tried.items()}
    each = {kind: [rate] for kind, rate in rates.items()}
    stacks, right = _fit(banks, recipe, each, "attentive probe", ranks, heartbeats)
    if not all(p.isfinite().all() for stack in stacks.values() for p in stack.heads.parameters()):
        raise UserError("the attentive probe diverged: its weights are not finite; set a lower attentive.peak_lr")
    return {kind: Trained(stacks[kind].heads, right[kind][:, 0].tolist(), rates[kind], tried[kind]) for kind in banks}


def try_rates(banks: Banks, recipe: Recipe, ranks: Ranks, heartbeats: Heartbeats) -> dict[FeatureType, list[Trial]]:
    """For each of the recipe's learning rates, train a head on nine tenths of the samples, for as many steps as in the
    final training. Return the results on the remaining tenth; they are empty if there are fewer than ten samples. The
    heads have the same initial weights and the same batches. Every rank must call it."""
    train, held_out = (
        {kind: bank.rows(numbers) for kind, bank in banks.items()} for numbers in split(next(iter(banks.values())))
    )
    if not next(iter(held_out.values())).keys:
        return {kind: [] for kind in banks}
    title = f"attentive probe, {len(recipe.rates)} rates"
    stacks, _ = _fit(train, recipe, dict.fromkeys(banks, recipe.rates), title, ranks, heartbeats)
    own = {kind: judge(stack.heads, held_out[kind]) for kind, stack in stacks.items()}
    own = ranks.broadcast(lambda: own)  # so that all ranks choose the same learning rate
    return {kind: [Trial(rate, *each) for rate, each in zip(recipe.rates, found)] for kind, found in own.items()}


def _fit(
    banks: Banks,
    recipe: Recipe,
    rates: Mapping[FeatureType, Sequence[float]],
    title: str,
    ranks: Ranks,
    heartbeats: Heartbeats,
) -> tuple[dict[FeatureType, Stack], dict[FeatureType, torch.Tensor]]:
    stacks = {kind: new_stack(bank.stored_SD.shape[1:], recipe, rates[kind], ranks) for kind, bank in banks.items()}
    batches = track(stored_steps(banks, range(recipe.steps), recipe.batch, recipe.seed), title, recipe.steps)
    return stacks, fit_heads(batches, stacks, recipe.lr, title, ranks, heartbeats)


def new_stack(shape: tuple[int, ...], recipe: Recipe, rates: Sequence[float], ranks: Ranks) -> Stack:
    """Return a stack of new heads, one for each peak learning rate. `shape`: shape of a sample's features, (D,) for
    linear heads or (L, D) for attentive heads."""
    seeds = [recipe.seed] * len(rates)
    heads: Heads = (
        LinearHeads(shape[0], recipe.classes, seeds, ranks)
        if len(shape) == 1
        else AttentiveHeads(shape[-1], recipe.classes, recipe.attention_heads, seeds, ranks)
    )
    heads = heads.to(ranks.device)
    optimizer = AdamW(heads.parameters(), weight_decay=recipe.weight_decay)
    return Stack(heads, optimizer, torch.tensor(rates, device=ranks.device), ranks)


def with_training(predictions: Predictions, trained: Trained, recipe: Recipe) -> Predictions:
    """Return the predictions of a head with its learning rate, "peak_lr", and warnings about their reliability."""
    return replace(predictions, chosen={"peak_lr": trained.peak_lr}, warnings=tuple(head_warnings(trained, recipe)))


def head_warnings(trained: Trained, recipe: Recipe) -> list[str]:
    """Return warnings about the reliability of a head's accuracy, one line each."""
    lines = [{"accuracy": accuracy} for accuracy in trained.accuracies]
    official = OFFICIAL["linear"]
    found = training_warnings("attentive", "attentive.steps", recipe.steps, official, lines, recipe.batch)
    return found + edge(trained.tried, trained.peak_lr)
