"""The probes of frozen features: each scores held-out samples by training samples, for features of several layers at
once.

Shapes: N training samples, M samples to classify, L patches, D encoder width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.config.evaluation import AttentiveProbeConfig, EvaluationConfig
from m3ae_fast.engine.schedule import Schedule, warmup_cosine
from m3ae_fast.evaluation.default_hyperparameters import OFFICIAL, settled
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.fit_heads import BankSteps, Heads, Input, Live, Stack, fit_heads, judge, logits, subset
from m3ae_fast.evaluation.heads import AttentiveHeads, LinearHeads, LinearProbeHead
from m3ae_fast.evaluation.knn import knn_predictions
from m3ae_fast.evaluation.labelled_task import cautions
from m3ae_fast.evaluation.learning_rates import FACTORS, Tried, best, choose, edge, split
from m3ae_fast.evaluation.predictions import Predictions
from m3ae_fast.evaluation.stacked_optimizers import LARS, AdamW
from m3ae_fast.process.heartbeats import Pulse
from m3ae_fast.process.ranks import Ranks

ATTENTIVE_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # tried, of AdamW
_USUAL = 1e-3  # of too few samples to try any
_WARMUP = 1 / 9  # of the run, as of the linear probe
Banks = Mapping[Input, FeatureBank]


def _no_caution(of: Input, text: str) -> None:
    """Drop a caution."""


class Setting(NamedTuple):
    """Tells a probe what it needs besides the samples."""

    config: EvaluationConfig
    classes: int
    encoder_heads: int  # of attention
    seed: int  # of a probe's weights and of its order
    ranks: Ranks
    pulse: Pulse
    caution: Callable[[Input, str], None] = _no_caution  # given what speaks against a result, by the input of the heads
    live: Live | None = None  # shown the heads in training, if these are asked for before their end


@dataclass(frozen=True)
class Recipe:
    """How the heads of a probe train on a number of samples."""

    probe: str
    length: str  # the setting that makes the training longer
    steps: int
    batch: int  # samples of a step
    lr: Callable[[int], float]  # of a step, for a scale of 1
    scales: dict[float, float]  # of `lr`, by the peak learning rates that are tried; one: it is taken
    usual: float  # the peak learning rate of too few samples to try any
    start: Callable[[int, int], Heads]  # the width of the features, and the number of heads -> heads
    optimizer: Callable[[Heads], LARS | AdamW]
    choose: Callable[[Sequence[Tried], int], Tried]  # of those that were tried on so many held-out samples


def linear_recipe(samples: int, setting: Setting) -> Recipe:
    """Return how linear probes train on so many samples."""
    given = setting.config.linear
    config = settled(given, samples, {})
    schedule, peak_lr = Schedule(config, config, samples), config.peak_lr
    assert peak_lr is not None
    rates = (peak_lr,) if given.peak_lr is not None else tuple(float(f"{f * peak_lr:.3g}") for f in FACTORS)

    def optimizer(heads: Heads) -> LARS:
        return LARS(heads.parameters(), momentum=config.momentum, weight_decay=config.weight_decay)

    return Recipe(
        probe="linear",
        length="linear.epochs",
        steps=schedule.total_steps,
        batch=schedule.train.global_batch,
        lr=schedule.lr,
        scales={rate: rate / peak_lr for rate in rates},
        usual=peak_lr,
        start=lambda width, count: LinearHeads(width, setting.classes, [setting.seed] * count, setting.ranks),
        optimizer=optimizer,
        choose=lambda tried, held_out: choose(tried, peak_lr, held_out),
    )


def attentive_recipe(samples: int, setting: Setting) -> Recipe:
    """Return how attentive probes train on so many samples."""
    given = setting.config.attentive
    config = settled_attentive(given, samples, setting.encoder_heads)
    assert config.steps and config.batch and config.heads
    heads, steps = config.heads, config.steps
    rates = ATTENTIVE_RATES if given.peak_lr is None else (given.peak_lr,)
    return Recipe(
        probe="attentive",
        length="attentive.steps",
        steps=steps,
        batch=config.batch,
        lr=lambda step: warmup_cosine(step, round(steps * _WARMUP), steps),
        scales={rate: rate for rate in rates},
        usual=_USUAL,
        start=lambda width, count: AttentiveHeads(width, setting.classes, heads, [setting.seed] * count, setting.ranks),
        optimizer=lambda each: AdamW(each.parameters(), weight_decay=config.weight_decay),
        choose=lambda tried, held_out: best(tried),
    )


def settled_attentive(config: AttentiveProbeConfig, samples: int, encoder_heads: int) -> AttentiveProbeConfig:
    """Return the config with a value for each setting that it leaves open, but for the learning rate."""
    recipe = OFFICIAL["linear"].scaled(samples)
    batch = min(config.batch or recipe.global_batch, samples)
    steps = config.steps or math.ceil(recipe.epochs * samples / batch)
    return config.model_copy(update={"batch": batch, "steps": steps, "heads": config.heads or encoder_heads})


class Trained(NamedTuple):
    """A head, the only one of its stack unless `number` says which, and what is known of its training."""

    heads: Heads  # in evaluation mode
    accuracies: list[float]  # of each step, before that
    peak_lr: float
    tried: list[Tried]  # learning rates; empty if one was given
    number: int = 0

    def linear(self) -> LinearProbeHead:
        """Return the head of a linear probe."""
        assert isinstance(self.heads, LinearHeads)
        return self.heads.head(self.number)


def train_heads(banks: Banks, recipe: Recipe, setting: Setting) -> dict[Input, Trained]:
    """Train a head on each bank, all in one pass, at the recipe's learning rate or, of several, at the one that is
    chosen for it, see `try_rates`. Every rank must call it."""
    rates = dict.fromkeys(banks, next(iter(recipe.scales)))
    tried: dict[Input, list[Tried]] = {name: [] for name in banks}
    if len(recipe.scales) > 1:
        tried = try_rates(banks, recipe, setting)
        few = len(next(iter(banks.values())).keys) // 10
        rates = {name: recipe.choose(own, few).peak_lr if own else recipe.usual for name, own in tried.items()}
    scales = {name: [recipe.scales.get(rate, rate)] for name, rate in rates.items()}
    stacks, right = _fit(banks, recipe, scales, f"{recipe.probe} probe", setting)
    if not all(p.isfinite().all() for stack in stacks.values() for p in stack.heads.parameters()):
        raise UserError(
            f"{recipe.probe} probe: its weights are not finite: it diverged; set a lower {recipe.probe}.peak_lr"
        )
    return {name: Trained(stacks[name].heads, right[name][:, 0].tolist(), rates[name], tried[name]) for name in banks}


def try_rates(banks: Banks, recipe: Recipe, setting: Setting) -> dict[Input, list[Tried]]:
    """Train a head at each of the recipe's learning rates on nine tenths of the samples, for as many steps as the final
    training takes, and return what each reaches on the rest: nothing of fewer than ten samples. The heads begin alike
    and see the same batches. Every rank must call it."""
    parts = split(next(iter(banks.values())))
    if not parts.held_out:
        return {name: [] for name in banks}
    scales = {name: [*recipe.scales.values()] for name in banks}
    title = f"{recipe.probe} probe, {len(recipe.scales)} rates"
    stacks, _ = _fit(subset(banks, parts.train), recipe, scales, title, setting)
    held_out = subset(banks, parts.held_out)
    own = {name: judge(stack.heads, held_out[name]) for name, stack in stacks.items()}
    own = setting.ranks.broadcast(lambda: own)  # all ranks choose the same
    return {name: [Tried(rate, *each) for rate, each in zip(recipe.scales, found)] for name, found in own.items()}


def _fit(
    banks: Banks, recipe: Recipe, scales: Mapping[Input, Sequence[float]], title: str, setting: Setting
) -> tuple[dict[Input, Stack], dict[Input, torch.Tensor]]:
    stacks = {name: new_stack(bank.stored_SD.shape[-1], recipe, scales[name], setting) for name, bank in banks.items()}
    batches = BankSteps(banks, range(recipe.steps), recipe.batch, setting.seed)
    ranks, pulse = setting.ranks, setting.pulse
    return stacks, fit_heads(batches, stacks, recipe.lr, recipe.steps, title, ranks, pulse, setting.live)


def new_stack(width: int, recipe: Recipe, scales: Sequence[float], setting: Setting) -> Stack:
    """Return heads of features of that width, one for each scale of the learning rate."""
    device = setting.ranks.device
    heads = recipe.start(width, len(scales)).to(device)
    return Stack(heads, recipe.optimizer(heads), torch.tensor(scales, device=device), setting.ranks)


def predictions_so_far(
    live: Live, banks: Banks, held_out: Banks, recipe: Recipe
) -> tuple[dict[Input, Predictions], str]:
    """Return what heads in training make of this rank's held-out samples, and how far the training is; of several rates
    the best on this rank's part of the tenth that `try_rates` holds out. Nothing before the first step."""
    trained, where = live.copy()
    found = {}
    for name, heads in trained.items():
        number, asked = 0, held_out[name].local()
        if len(heads.linear.bias) > 1:
            tenth = banks[name].rows(split(banks[name]).held_out).local()
            tried = [Tried(rate, *each) for rate, each in zip(recipe.scales, judge(heads, tenth))]
            number = tried.index(best(tried))
        found[name] = asked.predictions(logits(heads, asked, number))
    return found, where


def cautions_of(trained: Trained, recipe: Recipe) -> list[str]:
    """Return what speaks against taking a head's accuracy as it is, a line each."""
    lines = [{"accuracy": accuracy} for accuracy in trained.accuracies]
    found = cautions(recipe.probe, recipe.length, recipe.steps, OFFICIAL["linear"], lines, recipe.batch)
    return found + edge(trained.tried, trained.peak_lr) if recipe.probe == "linear" else found


class Probe(NamedTuple):
    """A kind of probe."""

    recipe: Callable[[int, Setting], Recipe] | None = None  # how its heads train; None: it has none
    tokens: bool = False  # whether its features are [R, L, D], the patch tokens

    @property
    def seeded(self) -> bool:
        """Return whether the seed plays a part."""
        return self.recipe is not None

    def predict(self, banks: Banks, held_out: Banks, setting: Setting) -> dict[Input, Predictions]:
        """Return what the held-out samples are, by the training samples in `banks` and features of the same name. Every
        rank must call it, and gets all."""
        if self.recipe is None:
            config = setting.config.knn
            return {name: knn_predictions(banks[name], held_out[name], setting.classes, config) for name in banks}
        recipe = self.recipe(len(next(iter(banks.values())).keys), setting)
        found: dict[Input, Predictions] = {}
        for name, trained in train_heads(banks, recipe, setting).items():
            for text in cautions_of(trained, recipe):
                setting.caution(name, text)
            found[name] = held_out[name].predictions(logits(trained.heads, held_out[name]))
        return found


PROBES = {"knn": Probe(), "linear": Probe(linear_recipe), "attentive": Probe(attentive_recipe, tokens=True)}
