"""How long a probe trains, judged by a few steps on random features before the first sample is encoded."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch

from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.evaluation import attentive
from m3ae_fast.evaluation.default_hyperparameters import settled
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.probe_engine import Setting
from m3ae_fast.evaluation.probes import fit_linear

_LONG_ENOUGH_S = 0.2  # of steps, to judge the others by


class _Training(NamedTuple):
    steps: int  # of a whole training
    batch: int
    take: Callable[[FeatureBank, int], object]  # so many steps


def _linear(samples: int, setting: Setting) -> _Training:
    given = setting.config.linear
    config = settled(given, samples, {})

    def take(bank: FeatureBank, steps: int) -> None:
        short = {"global_batch": config.global_batch, "steps": steps, "epochs": None, "warmup_epochs": 0.0}
        fit_linear(bank, _with(setting, linear=given.model_copy(update=short)))

    assert config.global_batch
    return _Training(Schedule(config, config, samples).total_steps, config.global_batch, take)


def _attentive(samples: int, setting: Setting) -> _Training:
    config = attentive.settled(setting.config.attentive, samples, setting.encoder_heads)
    assert config.steps and config.batch
    return _Training(
        config.steps,
        config.batch,
        lambda bank, steps: attentive.fit(bank, config.model_copy(update={"steps": steps}), setting),
    )


_TRAININGS = {"linear": _linear, "attentive": _attentive}


def _with(setting: Setting, **sections: object) -> Setting:
    return setting._replace(config=setting.config.model_copy(update=sections))


def seconds(probe: str, samples: int, shape: tuple[int, ...], setting: Setting) -> float:
    """Return about how many seconds a probe trains on `samples` features of `shape`, the rates that it tries included;
    0 if it does not train."""
    if probe not in _TRAININGS:
        return 0.0
    training = _TRAININGS[probe](samples, setting)
    bank = _random(min(training.batch * 10 // 9 + 10, samples), shape, setting.classes)
    taken, spent = 0, 0.0
    while spent < _LONG_ENOUGH_S and taken < training.steps:  # the start is most of a few quick steps
        taken = min(max(4 * taken, 1), training.steps)
        began = perf_counter()
        training.take(bank, taken)
        spent = perf_counter() - began
    return spent / taken * training.steps


def _random(samples: int, shape: tuple[int, ...], classes: int) -> FeatureBank:
    """Return features of which a tenth can be held out, as those of tokens are stored if there are several each."""
    generator = torch.Generator().manual_seed(0)
    features_ND = torch.randn(samples, *shape, generator=generator)
    keys = [f"random/{number}" for number in range(samples)]
    features_ND = features_ND.half() if len(shape) > 1 else features_ND
    return FeatureBank(keys, features_ND, torch.arange(samples) % classes, None, [])
