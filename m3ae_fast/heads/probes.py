"""Probes of frozen features. They are trained on the features of training samples and predict the classes of held-out
samples, for several layers at once.

Shapes: N training samples, M samples to classify, L patches, D encoder width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import POOLINGS, ModelConfig, Pool
from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.engine.schedule import warmup_cosine
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.fit_heads import (
    BankSteps,
    Heads,
    Input,
    Stack,
    fit_heads,
    judge,
    logits,
    subset,
)
from m3ae_fast.heads.hyperparameter_choice import Trial, best, edge, split
from m3ae_fast.heads.knn import knn_predictions
from m3ae_fast.heads.length_and_rate import OFFICIAL
from m3ae_fast.heads.logistic_regression import predict
from m3ae_fast.heads.modules import AttentiveHeads, LinearHeads
from m3ae_fast.heads.predictions import Predictions
from m3ae_fast.heads.stacked_optimizers import AdamW
from m3ae_fast.heads.training_warnings import training_warnings
from m3ae_fast.process.heartbeats import Heartbeats
from m3ae_fast.process.ranks import Ranks

ATTENTIVE_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # peak learning rates to try with AdamW
_USUAL = 1e-3  # peak learning rate if there are too few samples to try several
_WARMUP = 1 / 9  # fraction of the steps that belong to the warm-up, as for the linear probe
Banks = Mapping[Input, FeatureBank]


def _no_warning(of: Input, text: str) -> None:
    """Ignore a warning."""


def _no_choice(of: Input, chosen: dict[str, float]) -> None:
    """Ignore the selected hyper-parameters."""


class Features(NamedTuple):
    """A type of encoder feature: a layer and a pooling."""

    layer: int  # number of the block, from 1
    pool: Pool | None  # None: the patch tokens, which are pooled by an attentive probe

    @property
    def is_tokens(self) -> bool:
        """Return whether the features are patch tokens."""
        return self.pool is None


class FeatureTypes(NamedTuple):
    """The feature types that the probes of a grid read. The encoder computes pooled features for all pairs of a layer
    and a pooling, in the order of `MultimodalEncoder.pooled_of_layers`, and patch tokens of all layers."""

    kinds: Sequence[Features]

    @property
    def layers(self) -> list[int]:
        """Return the numbers of the blocks, without duplicates, in the order of `kinds`."""
        return [*dict.fromkeys(kind.layer for kind in self.kinds)]

    @property
    def pools(self) -> list[Pool]:
        """Return the poolings, without duplicates, in the order of `kinds`; empty if all features are patch tokens."""
        return [*dict.fromkeys(kind.pool for kind in self.kinds if kind.pool is not None)]

    @property
    def has_tokens(self) -> bool:
        """Return whether a probe reads patch tokens."""
        return any(kind.is_tokens for kind in self.kinds)

    def shapes(self, model: ModelConfig) -> list[tuple[int, ...]]:
        """Return the shape of a sample's features of each type: (D,) or (L, D)."""
        return [
            (model.most_patches, model.emb_dim) if kind.pool is None else (POOLINGS[kind.pool].vectors * model.emb_dim,)
            for kind in self.kinds
        ]

    def place(self, kind: Features) -> tuple[int, int]:
        """Return the index of this feature type's first vector among the pooled features, and the number of its
        vectors; or the index of its layer among the patch tokens, and 1."""
        layer = self.layers.index(kind.layer)
        if kind.pool is None:
            return layer, 1
        counts = [POOLINGS[pool].vectors for pool in self.pools]
        before = self.pools.index(kind.pool)
        return layer * sum(counts) + sum(counts[:before]), counts[before]

    def inputs(self, pooled_SKD: Tensor, tokens_SKLD: Tensor) -> dict[Input, Tensor]:
        """Return the features of a batch by index of the feature type: pooled features [S, D] or patch tokens
        [S, L, D]."""
        found = {}
        for number, kind in enumerate(self.kinds):
            first, count = self.place(kind)
            source = tokens_SKLD if kind.is_tokens else pooled_SKD
            found[number] = source[:, first : first + count].flatten(1, 2)
        return found


class Setting(NamedTuple):
    """The context of a probe: everything that it requires apart from the samples."""

    config: EvaluationConfig
    classes: int
    encoder_heads: int  # number of attention heads of the encoder
    seed: int  # random seed of the probe's initial weights and of the order of samples
    ranks: Ranks
    heartbeats: Heartbeats
    warn: Callable[[Input, str], None] = _no_warning  # called with warnings about the reliability of a result
    chose: Callable[[Input, dict[str, float]], None] = _no_choice  # called with the hyper-parameters that were selected


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of attentive probes, and of linear heads that are trained with them."""

    steps: int
    batch: int  # samples per step
    attention_heads: int
    weight_decay: float
    rates: Sequence[float]  # peak learning rates; if there are several, they are tried

    def lr(self, step: int) -> float:
        """Return the learning rate of a step as a fraction of the peak learning rate."""
        return warmup_cosine(step, round(self.steps * _WARMUP), self.steps)


def attentive_recipe(samples: int, setting: Setting) -> Recipe:
    """Return the hyper-parameters for this number of training samples, with defaults in place of settings that are
    null."""
    config, usual = setting.config.attentive, OFFICIAL["linear"].scaled(samples)
    batch = min(config.batch or usual.global_batch, samples)
    return Recipe(
        steps=config.steps or math.ceil(usual.epochs * samples / batch),
        batch=batch,
        attention_heads=config.heads or setting.encoder_heads,
        weight_decay=config.weight_decay,
        rates=ATTENTIVE_RATES if config.peak_lr is None else (config.peak_lr,),
    )


class Trained(NamedTuple):
    """A trained head of a stack, with information on its training."""

    heads: Heads  # the stack, in evaluation mode
    accuracies: list[float]  # training accuracy of each step, before the update
    peak_lr: float
    tried: list[Trial]  # results of the learning rates that were tried; empty if the learning rate was set
    number: int = 0  # number of the head in the stack


def train_heads(banks: Banks, recipe: Recipe, setting: Setting) -> dict[Input, Trained]:
    """Train one head on each bank, all in one pass, and return the heads. If the recipe has several learning rates, one
    of them is chosen for each head; see `try_rates`. Every rank must call it. Raises UserError if the weights of a head
    are not finite."""
    tried: dict[Input, list[Trial]] = {name: [] for name in banks}
    rates = dict.fromkeys(banks, recipe.rates[0])
    if len(recipe.rates) > 1:
        tried = try_rates(banks, recipe, setting)
        rates = {name: best(own).value if own else _USUAL for name, own in tried.items()}
    stacks, right = _fit(banks, recipe, {name: [rate] for name, rate in rates.items()}, "attentive probe", setting)
    if not all(p.isfinite().all() for stack in stacks.values() for p in stack.heads.parameters()):
        raise UserError("the attentive probe diverged: its weights are not finite; set a lower attentive.peak_lr")
    return {name: Trained(stacks[name].heads, right[name][:, 0].tolist(), rates[name], tried[name]) for name in banks}


def try_rates(banks: Banks, recipe: Recipe, setting: Setting) -> dict[Input, list[Trial]]:
    """For each of the recipe's learning rates, train a head on nine tenths of the samples, for as many steps as in the
    final training. Return the results on the remaining tenth; they are empty if there are fewer than ten samples. The
    heads have the same initial weights and the same batches. Every rank must call it."""
    parts = split(next(iter(banks.values())))
    if not parts.held_out:
        return {name: [] for name in banks}
    title = f"attentive probe, {len(recipe.rates)} rates"
    stacks, _ = _fit(subset(banks, parts.train), recipe, dict.fromkeys(banks, recipe.rates), title, setting)
    held_out = subset(banks, parts.held_out)
    own = {name: judge(stack.heads, held_out[name]) for name, stack in stacks.items()}
    own = setting.ranks.broadcast(lambda: own)  # so that all ranks choose the same learning rate
    return {name: [Trial(rate, *each) for rate, each in zip(recipe.rates, found)] for name, found in own.items()}


def _fit(
    banks: Banks, recipe: Recipe, rates: Mapping[Input, Sequence[float]], title: str, setting: Setting
) -> tuple[dict[Input, Stack], dict[Input, torch.Tensor]]:
    stacks = {name: new_stack(bank.stored_SD.shape[1:], recipe, rates[name], setting) for name, bank in banks.items()}
    batches = BankSteps(banks, range(recipe.steps), recipe.batch, setting.seed)
    ranks, heartbeats = setting.ranks, setting.heartbeats
    return stacks, fit_heads(batches, stacks, recipe.lr, recipe.steps, title, ranks, heartbeats)


def new_stack(shape: tuple[int, ...], recipe: Recipe, rates: Sequence[float], setting: Setting) -> Stack:
    """Return a stack of new heads, one for each peak learning rate. `shape`: shape of a sample's features, (D,) for
    linear heads or (L, D) for attentive heads."""
    ranks, seeds = setting.ranks, [setting.seed] * len(rates)
    heads: Heads = (
        LinearHeads(shape[0], setting.classes, seeds, ranks)
        if len(shape) == 1
        else AttentiveHeads(shape[-1], setting.classes, recipe.attention_heads, seeds, ranks)
    )
    heads = heads.to(ranks.device)
    optimizer = AdamW(heads.parameters(), weight_decay=recipe.weight_decay)
    return Stack(heads, optimizer, torch.tensor(rates, device=ranks.device), ranks)


def head_warnings(trained: Trained, recipe: Recipe) -> list[str]:
    """Return warnings about the reliability of a head's accuracy, one line each."""
    lines = [{"accuracy": accuracy} for accuracy in trained.accuracies]
    official = OFFICIAL["linear"]
    found = training_warnings("attentive", "attentive.steps", recipe.steps, official, lines, recipe.batch)
    return found + edge(trained.tried, trained.peak_lr)


class Probe(NamedTuple):
    """A kind of probe."""

    # returns the predictions and the hyper-parameters that were selected, for one type of features; None: heads are
    # trained for all types in one pass
    find: Callable[[FeatureBank, FeatureBank, Setting], tuple[Predictions, dict[str, float]]] | None = None

    @property
    def is_attentive(self) -> bool:
        """Return whether heads are trained on patch tokens [R, L, D], so that the result depends on the seed. Other
        probes read pooled features."""
        return self.find is None

    def predict(self, banks: Banks, held_out: Banks, setting: Setting) -> dict[Input, Predictions]:
        """Return the predictions for the held-out samples, with the same keys as `banks`. Every rank must call it, and
        gets all predictions.

        Args:
            banks: features of the training samples.
            held_out: features of the held-out samples, with the same keys.
            setting: context of the probe.

        Raises:
            UserError: a head diverged, so its weights or scores are not finite.
        """
        found: dict[Input, Predictions] = {}
        if self.find is not None:
            for name in banks:
                found[name], chosen = self.find(banks[name], held_out[name], setting)
                setting.chose(name, chosen)
            return found
        recipe = attentive_recipe(len(next(iter(banks.values())).keys), setting)
        for name, trained in train_heads(banks, recipe, setting).items():
            for text in head_warnings(trained, recipe):
                setting.warn(name, text)
            setting.chose(name, {"peak_lr": trained.peak_lr})
            found[name] = held_out[name].predictions(logits(trained.heads, held_out[name]))
        return found


def _by_neighbours(bank: FeatureBank, held_out: FeatureBank, setting: Setting) -> tuple[Predictions, dict[str, float]]:
    predictions, search = knn_predictions(bank, held_out, setting.classes, setting.config.knn)
    return predictions, search.entries()


def _by_regression(bank: FeatureBank, held_out: FeatureBank, setting: Setting) -> tuple[Predictions, dict[str, float]]:
    predictions, strength = predict(bank, held_out, setting.classes, setting.heartbeats)
    return predictions, {"inverse_strength": strength}


# The docstring of `tasks.py` lists what else a new probe needs.
PROBES = {
    "knn": Probe(_by_neighbours),
    "logistic": Probe(_by_regression),
    "attentive": Probe(),
}
