"""Estimate of the training time of attentive probes from a few steps on random features, before samples are encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import torch

from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.probes import Setting, attentive_recipe, train_heads
from m3ae_fast.process.ranks import Ranks

_LONG_ENOUGH_S = 0.2  # minimum duration of the measured steps, in seconds


def seconds(samples: int, shapes: Sequence[tuple[int, ...]], setting: Setting) -> float:
    """Return the estimated training time of attentive probes in seconds, including the search for the learning rate.
    Every rank must call it.

    Args:
        samples: number of training samples.
        shapes: for each feature type on which a probe is trained, the shape of a sample's features.
        setting: context of the probe.
    """
    recipe, ranks = attentive_recipe(samples, setting), setting.ranks
    count = min(recipe.batch * 10 // 9 + 10, samples)
    random = {shape: _random(count, shape, setting.classes, ranks) for shape in dict.fromkeys(shapes)}
    banks = {number: random[shape] for number, shape in enumerate(shapes)}
    taken, spent = 0, 0.0
    while spent < _LONG_ENOUGH_S and taken < recipe.steps:  # a few quick steps would measure mostly start-up time
        taken = min(max(4 * taken, 1), recipe.steps)
        began = perf_counter()
        train_heads(banks, replace(recipe, steps=taken), setting)
        spent = ranks.from_main(perf_counter() - began)
    return spent / taken * recipe.steps


def _random(samples: int, shape: tuple[int, ...], classes: int, ranks: Ranks) -> FeatureBank:
    """Return random features in the form in which a bank stores them: float16 if each sample has several tokens."""
    generator = torch.Generator().manual_seed(0)
    own_R = torch.arange(ranks.rank, samples, ranks.world)
    features_RD = torch.randn(len(own_R), *shape, generator=generator)
    features_RD = features_RD.half() if len(shape) > 1 else features_RD
    keys = [f"random/{number}" for number in range(samples)]
    return FeatureBank(keys, features_RD, torch.arange(samples) % classes, own_R=own_R, ranks=ranks)
