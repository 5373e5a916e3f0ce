"""Settings that fit data, hardware and time. Rules of thumb where nothing better is known; each is a constant here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import parse_json
from m3ae_fast.config import LONGEST, Config, Range, parse, require_libraries_of
from m3ae_fast.config.load import apply_override

TOKENIZER = "tokenizer.json"  # of a run folder
EPOCHS, SEEN = 20, 20_000  # and samples, that a larger model must reach in the time that there is
FEWEST_STEPS = 1000  # a batch is halved until there are so many
LEARNING_STEPS = 300  # with fewer, or less than an epoch, features hardly differ from those of random weights
EVALUATIONS = 20  # during training, if they do not take too long
SMALLEST_BATCH, LARGEST_BATCH = 64, 1024
_STEPS_PER_EPOCH = 24  # about, between the smallest and the largest batch
_WARM_UP = 0.05  # of the steps
# of a run that continues from weights: a fraction of the usual learning rate, and the warm-up
_CONTINUED_RATE, _CONTINUED_WARM_UP = 0.25, 0.02
LENGTHS = ("train.steps", "train.epochs")  # settings by which the user decides how long the run is
EVALUATED = 1024  # held-out samples, at most
PROBED = 5000  # training samples: with more the k-NN accuracy is measured only before and after
# MAE's rate for its batch (arXiv 2111.06377), by the square root of the batch, as Adam asks for (arXiv 2205.10287)
_RATE, _OF_BATCH = 2.4e-3, 4096
# settings that are arguments of `pretrain`, by their pattern
_ARGUMENTS = {
    r"run(\.dir)?": "--out",
    r"data\.train(\.\d+(\.shards)?)?": "SOURCE",
    r"data\.val\.\d+(\.shards)?": "--val",
}
_ARGUMENTS |= {r"train\.probe\.labels": "--labels"}
_RATE_OF_NARROW = 4  # times as high for models narrower than "small", as in the quickstart


@dataclass(frozen=True)
class Shards:
    """Patterns for the config, and what to tell the user."""

    train: list[str]
    val: list[str]  # empty: nothing is held out
    notes: list[str]
    unlabelled: str = ""  # why samples have no label "cls", where that is known
    shown: bool = False  # the user has seen what was found in them
    image_range: Range | None = None  # with which they were made


@dataclass(frozen=True)
class Facts:
    """Statistics of the training and the held-out samples."""

    samples: int
    held_out: int
    short_side: int  # pixels, the median
    image_mean: list[float]
    image_std: list[float]
    classes: int  # 0: there are no labels that can be used
    vocab_size: int  # 0: there are no captions
    text_length: int  # tokens
    image_dtype: str = "uint8"
    image_range: Range | None = None  # values of black and white, for more than 8 bits


class Rung(NamedTuple):
    """A size of the model, and for how many samples."""

    name: str
    model: dict[str, Any]
    pixels: int  # of an image, at most
    samples: float  # that it takes at least to be of use


def _narrow(width: int, depth: int, heads: int, decoder: int) -> dict[str, Any]:
    own = {"size": None, "emb_dim": width, "depth": depth, "num_heads": heads}
    return own | {"dec_emb_dim": decoder, "dec_depth": 2, "dec_num_heads": 4}


LADDER = (
    Rung("tiny", _narrow(128, 4, 4, 64), 48, 0),
    Rung("mini", _narrow(192, 6, 6, 128), 96, 0),
    Rung("small", {"size": "small", "dec_emb_dim": 256, "dec_depth": 4, "dec_num_heads": 8}, 224, 1e4),
    Rung("base", {"size": "base"}, 224, 1e5),
    Rung("large", {"size": "large"}, 224, 1e6),
)


def rungs(facts: Facts, overrides: Sequence[str] = ()) -> list[Rung]:
    """Return the sizes that the number of samples allows, smallest first; that of the weights to continue from, if
    there are some."""
    if continues(overrides):
        return [Rung("as its weights", {}, LADDER[-1].pixels, 0)]
    return [rung for rung in LADDER if facts.samples >= rung.samples]


def possible(sizes: Sequence[Rung], config_of: Callable[[Rung], Config]) -> list[Rung]:
    """Return the sizes with which the user's settings are possible, such as a number of heads that divides the width.
    Raises UserError if there are none."""
    found, first = [], None
    for rung in sizes:
        try:
            config_of(rung)
            found.append(rung)
        except UserError as error:
            first = first or error
    if not found and first is not None:
        raise first
    return found


def image_and_patch(short_side: int, pixels: int) -> tuple[int, int]:
    """Return an image size of at most `pixels` to which most images need not be enlarged, and its patch size: the
    largest with eight patches a side."""
    size = max(min(short_side, pixels), 16)
    patch = next((p for p in (16, 8) if size // p >= 8), 4)
    return size // patch * patch, patch


def _images(facts: Facts, rung: Rung, overrides: Sequence[str]) -> tuple[int, int]:
    """Return `image_and_patch`; where the user sets one of them, the other fits it."""
    size, patch = image_and_patch(facts.short_side, rung.pixels)
    if own := given(overrides, "model.image_size"):
        patch = next((p for p in (16, 8) if own // p >= 8 and own % p == 0), 4)
    elif own := given(overrides, "model.patch_size"):
        size = max(size // own, 1) * own
    return size, patch


def set_to(overrides: Sequence[str], name: str, default: Any) -> Any:
    """Return the value to which the user sets `name`, or `default`."""
    found = default
    for override in overrides:
        key, equals, text = override.partition("=")
        if key == name and equals:
            try:
                found = parse_json(text)
            except ValueError:
                found = text
    return found


def given(overrides: Sequence[str], name: str) -> int | None:
    """Return the number above 0 that the user sets, None if there is none."""
    value = set_to(overrides, name, None)
    return value if isinstance(value, int) and value > 0 else None


def channels_set(overrides: Sequence[str]) -> int | None:
    """Return the channels that the user sets, or other settings imply; None if they are open."""
    if channels := given(overrides, "model.channels"):
        return channels
    for name in ("model.image_mean", "model.image_std"):
        if isinstance(values := set_to(overrides, name, None), list):
            return len(values) or None
    return 3 if set_to(overrides, "model.image_targets", None) == "vqgan" else None


def batch_of(samples: int) -> int:
    """Return samples per step, a power of two."""
    most = _power_below(samples / 4)
    wanted = _power_below(samples / _STEPS_PER_EPOCH)
    return min(max(wanted, min(SMALLEST_BATCH, most)), LARGEST_BATCH)


def continues(overrides: Sequence[str]) -> bool:
    """Return whether the run continues from weights."""
    return bool(set_to(overrides, "model.init_from", None))


def peak_rate(batch: int, width: int, factor: float = 1.0) -> float:
    """Return `optim.peak_lr`, which is for a batch of 256, times `factor`."""
    rate = factor * _RATE * math.sqrt(batch / _OF_BATCH) * (_RATE_OF_NARROW if width < 384 else 1)
    return float(f"{rate * 256 / batch:.3g}")


def steps_in(seconds: float, pace: float, batch: int, samples: int) -> int:
    """Return the number of steps that fit at `pace` seconds per sample, at most LONGEST epochs."""
    longest = LONGEST * max(samples // batch, 1)
    return max(min(int(seconds / (pace * batch)), longest), 2)


def fitted_batch(seconds: float, pace: float, samples: int) -> int:
    """Return the batch for the time: smaller than `batch_of` where there would be too few steps."""
    batch = batch_of(samples)
    while batch > SMALLEST_BATCH and seconds / (pace * batch) < FEWEST_STEPS:
        batch //= 2
    return batch


def reaches(seconds: float, pace: float, samples: int) -> bool:
    """Return whether the time is enough for a model of that pace to see enough samples."""
    return seconds / pace >= max(EPOCHS * samples, SEEN)


def check_overrides(overrides: Sequence[str]) -> Config:
    """Return the config that the user's overrides give for assumed samples. Raises UserError if one is an argument of
    `pretrain`, and as `assumed_config`."""
    for override in overrides:
        name = override.partition("=")[0]
        if meant := next((option for pattern, option in _ARGUMENTS.items() if re.fullmatch(pattern, name)), None):
            raise UserError(f"--set {name}: is what {meant} names")
    if set_to(overrides, "data.val", None):
        raise UserError("--set data.val: is what SOURCE or --val names; [] evaluates on nothing")
    return assumed_config(overrides)


def assumed_config(overrides: Sequence[str]) -> Config:
    """Return the config that overrides give for assumed samples. Raises UserError if they are possible for no samples
    at all, or need a library that is not installed."""
    facts = assumed(overrides)
    shards = Shards(["train.tar"], ["val.tar"], [])

    def config_of(rung: Rung) -> Config:
        return settings(facts, shards, Path("run"), rung, 64, 1000, "cls", overrides)

    config = config_of(possible(LADDER, config_of)[0])
    require_libraries_of(config)
    return config


def assumed(overrides: Sequence[str], samples: int = 10**6) -> Facts:
    """Return facts about samples that fit the overrides, where these settings depend on samples."""
    shown = set_to(overrides, "data.show_channels", None)
    most = max([2, *(number for number in shown if isinstance(number, int))]) if isinstance(shown, list) else 2
    channels = channels_set(overrides) or most + 1
    is_alone = set_to(overrides, "data.tokenizer", "") is None
    words = 0 if is_alone else set_to(overrides, "model.vocab_size", 512)
    return Facts(samples, 1000, 1000, [0.5] * channels, [0.25] * channels, 2, words, text_length=64)


def _length(facts: Facts, batch: int, steps: int, overrides: Sequence[str]) -> tuple[int, int]:
    """Return the steps of the run, `steps` unless the user sets a length, and those of an epoch."""
    per_epoch = max(facts.samples // (given(overrides, "train.global_batch") or batch), 1)
    epochs = set_to(overrides, "train.epochs", None)
    if isinstance(epochs, int | float) and epochs > 0:
        steps = max(round(epochs * per_epoch), 1)
    return given(overrides, "train.steps") or steps, per_epoch


def settings(
    facts: Facts,
    shards: Shards,
    out: Path,
    rung: Rung,
    batch: int,
    steps: int,
    labels: str,
    overrides: Sequence[str],
    *,
    hours: float | None = None,
    evaluations: int = EVALUATIONS,
) -> Config:
    """Return the config of a run with the user's `--set` overrides. Raises UserError for one that is not possible.

    `hours`: to which the number of steps is adjusted during training, unless the user sets that; None: it stays.
    `evaluations`: between the first step and the last, about.
    """
    size, patch = _images(facts, rung, overrides)
    steps, per_epoch = _length(facts, batch, steps, overrides)
    train, val = ([{"shards": part}] for part in (shards.train, shards.val))
    warm_up, factor = (_CONTINUED_WARM_UP, _CONTINUED_RATE) if continues(overrides) else (_WARM_UP, 1.0)
    often = max(steps // evaluations, min(steps, 10)) if evaluations else None
    config: dict[str, Any] = {
        "run": {"dir": str(out)},
        "model": {
            **rung.model,
            "image_size": size,
            "patch_size": patch,
            "channels": len(facts.image_mean),
            "image_dtype": facts.image_dtype,
            "image_mean": facts.image_mean,
            "image_std": facts.image_std,
            "text_length": facts.text_length,
            "vocab_size": facts.vocab_size,
        },
        "loss": {"norm_pix": set_to(overrides, "model.image_targets", "pixels") == "pixels"},
        "data": {
            "train": train,
            "val": val if shards.val else [],
            "tokenizer": str((out / TOKENIZER).resolve()) if facts.vocab_size else None,
            "range": facts.image_range,
            "crop_scale": [0.4, 1.0],
        },
        "optim": {"warmup_epochs": round(warm_up * steps / per_epoch, 3), "clip_grad": 1.0},
        "train": {
            "global_batch": batch,
            "steps": steps,
            "hours": hours,
            "log_every": max(steps // 50, 1),
            "eval_every": often,
            "eval_samples": max(min(facts.held_out, EVALUATED), 1),
            "save_every": max(steps // 10, min(steps, 10)),
            "probe": _probe(train, val, labels, often if facts.samples <= PROBED else None) if facts.classes else None,
        },
        "deepspeed": None,
    }
    for override in overrides:
        _give_way(config, override)
        apply_override(config, override)
    if shards.val and not config["data"]["val"]:
        config["train"]["probe"] = None
    found = parse(Config, config, "--set")
    config["optim"].setdefault("peak_lr", peak_rate(found.train.global_batch, found.model.emb_dim, factor))
    return parse(Config, config, "--set")


def _give_way(config: dict[str, Any], override: str) -> None:
    """Drop automatic choices that the user's settings replace. Raises UserError for a setting of a probe that is
    missing."""
    name, _, value = override.partition("=")
    if name == "train.epochs" and value != "null":
        config["train"].pop("steps", None)
    if name in LENGTHS and value != "null":
        config["train"].pop("hours", None)
    if name == "model.size" and value != "null":
        for key in ("emb_dim", "depth", "num_heads", "dec_emb_dim", "dec_depth", "dec_num_heads"):
            config["model"].pop(key, None)
    if name.startswith("train.probe.") and config["train"]["probe"] is None:
        raise UserError(f"--set {name}: there is no probe, since no labels of the samples can be used; see --labels")


def _probe(train: Any, val: Any, labels: str, every: int | None) -> dict[str, Any]:
    images = [[source | {"modality": "image"} for source in part] for part in (train, val)]
    return {"train": images[0], "val": images[1], "labels": labels, "every": every}


def _power_below(value: float) -> int:
    """Return the largest power of two up to `value`, at least 1."""
    return 2 ** max(int(math.log2(max(value, 1))), 0)
