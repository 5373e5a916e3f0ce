"""The runs of the experiment, in the order of execution."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

BASELINE, FAST = "baseline", "cross, a third, Muon"
USUAL = "baseline, usual settings"  # default settings, which may be better than the tuned ones at other lengths
ONE_BLOCK = "1 block, usual settings"  # the rival that needs no new option
FAST_ONE_BLOCK = "cross, a third, 1 block, Muon"
Overrides = tuple[tuple[str, Any], ...]  # settings with their values, which must be representable in JSON

_CROSS: Overrides = (("model.dec_attention", "cross"),)
_THIRD: Overrides = (("masking.image_predicted", 0.33), ("masking.text_predicted", 0.33))
_MUON: Overrides = (("optim.name", "muon"),)
_WSD: Overrides = (("optim.schedule", "wsd"),)
_ONE: Overrides = (("model.dec_depth", 1),)
ARMS: dict[str, Overrides] = {
    BASELINE: (),
    USUAL: (),
    ONE_BLOCK: _ONE,
    FAST: (*_CROSS, *_THIRD, *_MUON),
    "Muon": _MUON,
    "cross, a third": (*_CROSS, *_THIRD),
    "1 block": _ONE,
    "1 block, Muon": (*_ONE, *_MUON),
    FAST_ONE_BLOCK: (*_CROSS, *_THIRD, *_ONE, *_MUON),
    "cross": _CROSS,
    "cross, Muon": (*_CROSS, *_MUON),
    "half the width": (("model.dec_emb_dim", 0.5),),  # relative to the encoder
    "2 blocks": (("model.dec_depth", 2),),
    "4 blocks": (("model.dec_depth", 4),),
    "8 blocks": (("model.dec_depth", 8),),
    "a third": _THIRD,
    "wsd": _WSD,
    "all": (*_CROSS, *_THIRD, *_MUON, *_WSD),
}
PIXELS, RANDOM_WEIGHTS = "raw pixels", "random weights"  # references without training, which the baseline must exceed
# numbers of seeds: for all arms at the shortest length, and for the baseline and the fast arm at all lengths
SEEDS, FINAL_SEEDS = 3, 5
CHECKED = "optim.peak_lr"  # the setting that is tried again at a longer length, on validation samples


@dataclass(frozen=True)
class Trial:
    """A run: pre-training from random weights, and its probes."""

    data: str
    size: str
    arm: str
    steps: int  # for batches of 128 samples; with another batch size, the number of samples is the same
    seed: int
    tuned: Overrides = ()
    validation: bool = False  # whether the run is tested on the samples for choosing settings

    @property
    def overrides(self) -> Overrides:
        return ARMS[self.arm] + self.tuned

    @property
    def trained(self) -> bool:
        return self.arm in ARMS

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        arm = self.arm.replace(", ", "+").replace(" ", "-")
        tuned = hashlib.blake2b(json.dumps(self.tuned).encode(), digest_size=4).hexdigest()
        kind = "-validation" if self.validation else ""
        return f"{self.data}-{self.size}-{arm}-steps{self.steps}-seed{self.seed}-{tuned}{kind}"


def tuned_as(arm: str) -> str:
    """Return the arm whose tuned settings an arm uses; each optimiser is tuned once."""
    if arm in (USUAL, ONE_BLOCK):
        return USUAL
    return FAST if ("optim.name", "muon") in ARMS[arm] else BASELINE


def race(
    data: str,
    size: str,
    lengths: Sequence[int],
    target: Mapping[str, int],
    tried: Mapping[str, Sequence[Any]],
    seeds: int,
    final_seeds: int,
) -> Iterator[Trial]:
    """Yield the runs of one model size on one dataset in order, without their tuned settings. The first part contains,
    for each seed, both baselines at the three shortest lengths, between which the cost is interpolated, and all arms at
    the shortest length. The second part checks the learning rates at the third length. The third part contains, for
    each seed, the baseline with its usual settings and the fast arm at all lengths up to that of the target, the
    longest first, and both with a decoder of one block at the baseline's length in the target. The last part
    contains, for each seed, the baseline with its usual settings and the fast arm at the greater lengths.

    Args:
        data: name of the dataset.
        size: name of the model size.
        lengths: numbers of steps, ascending.
        target: number of steps of the `baseline` and of the `fast` arm in the target of the protocol.
        tried: values of each setting, with the default first.
        seeds: number of seeds of the first part.
        final_seeds: number of seeds of the third and of the last part.
    """
    trial = Trial(data, size, BASELINE, lengths[0], 0)
    ladder = [replace(trial, arm=arm, steps=steps) for steps in lengths[:3] for arm in (BASELINE, USUAL)]
    factorial = [replace(trial, arm=arm) for arm in ARMS if arm != BASELINE]
    both = [replace(trial, arm=arm, steps=steps) for steps in reversed(lengths) for arm in (USUAL, FAST)]
    final = [each for each in both if each.steps <= target["baseline"]]
    final += [replace(trial, arm=arm, steps=target["baseline"]) for arm in (ONE_BLOCK, FAST_ONE_BLOCK)]
    longer = [each for each in both if each.steps > target["baseline"]]
    found: dict[Trial, None] = {}
    for seed in range(seeds):
        found |= dict.fromkeys(replace(each, seed=seed) for each in [*ladder, *factorial])
        found |= {replace(trial, arm=arm, seed=seed, steps=0): None for arm in (PIXELS, RANDOM_WEIGHTS)}
    for value in tried[CHECKED]:
        checked = dict(usual(tried)) | {CHECKED: frozen(value)}
        at_length = replace(trial, steps=lengths[:3][-1], tuned=tuple(checked.items()), validation=True)
        found |= {replace(at_length, arm=arm): None for arm in (BASELINE, FAST)}
    for part in (final, longer):
        for seed in range(final_seeds):
            found |= dict.fromkeys(replace(each, seed=seed) for each in part)
    yield from found


def finetuned(data: str, size: str, shortest: int, target: Mapping[str, int], seeds: int) -> Iterator[Trial]:
    """Yield the runs whose encoders are fine-tuned, without their tuned settings: for each seed, the baseline with its
    usual settings and the fast recipe with their lengths in the target, an encoder with random weights, and both
    recipes with the shortest length.

    Args:
        data: name of the dataset.
        size: name of the model size.
        shortest: shortest length in steps.
        target: number of steps of the `baseline` and of the `fast` arm in the target of the protocol.
        seeds: number of seeds.
    """
    of_target = ((USUAL, target["baseline"]), (FAST, target["fast"]))
    runs = (*of_target, (RANDOM_WEIGHTS, 0), (USUAL, shortest), (FAST, shortest))
    yield from (Trial(data, size, arm, steps, seed) for seed in range(seeds) for arm, steps in runs)


def usual(tried: Mapping[str, Sequence[Any]]) -> Overrides:
    """Return the default values of the settings that are tuned. `tried`: values of each setting, the default first."""
    return tuple((setting, frozen(values[0])) for setting, values in tried.items())


def tune(
    start: Trial, tried: Mapping[str, Sequence[Any]], settings: Collection[str], accuracy: Callable[[Trial], float]
) -> Overrides:
    """Return the best values of all settings. They are tuned one after the other: for each setting, the value with the
    highest accuracy is chosen while the other settings have the best values so far.

    Args:
        start: run of the arm at the shortest length.
        tried: values of each setting, with the default first.
        settings: names of the settings to tune; the others have their defaults.
        accuracy: function that trains a run, unless it is complete, and returns its accuracy on the samples for
            choosing settings.
    """
    best = dict(usual(tried))
    for setting in (each for each in tried if each in settings):
        candidates = [best | {setting: frozen(value)} for value in tried[setting]]
        trials = [replace(start, tuned=tuple(each.items()), validation=True) for each in candidates]
        best = dict(max(trials, key=accuracy).tuned)
    return tuple(best.items())


def frozen(value: Any) -> Any:
    """Return a setting's value as in a trial, with JSON's lists converted to tuples."""
    return tuple(value) if isinstance(value, list) else value
