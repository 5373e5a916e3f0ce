"""Automatic settings that fit the data, the hardware and the available time. They follow from rules, some of which are
only rules of thumb; the numbers in these rules are constants of this module. `size_and_length.py` applies the rules to
measurements of the speed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import parse_json
from m3ae_fast.config import LONGEST, MAX_CHANNELS, Config, Range, parse, require_libraries_of
from m3ae_fast.config.load import apply_override
from m3ae_fast.config.poolings import usual_pool
from m3ae_fast.pretraining.model_sizes import MODEL_SIZES, ModelSize
from m3ae_fast.weights.model_name import LOCAL_DIR, TIMM, TRANSFORMERS, split_side

TOKENIZER = "tokenizer.json"  # file name of the tokenizer in the run folder
# a model larger than the smallest is chosen only if it can be trained for this many epochs and samples
EPOCHS, SEEN = 20, 20_000
FEWEST_STEPS = 1000  # the batch is halved until there are at least this many steps
LEARNING_STEPS = 300  # with fewer steps or less than one epoch, features hardly differ from those of random weights
EVALUATIONS = 20  # number of evaluations during training; fewer if they would take too long
SMALLEST_BATCH, LARGEST_BATCH = 64, 1024
_STEPS_PER_EPOCH = 24  # approximate number of steps per epoch, if the batch is within its limits
_WARM_UP = 0.05  # fraction of the steps that belong to the warm-up
# for a run that starts from given weights: factor of the usual learning rate, and warm-up as a fraction of the steps
_CONTINUED_RATE, _CONTINUED_WARM_UP = 0.25, 0.02
LENGTHS = ("train.steps", "train.epochs")  # settings that determine the length of the run
_MOST_EPOCHS, _MOST_REPEATS = 10**6, 1 << 16  # maximum values of train.epochs and data.repeats in a config
EVALUATED = 1024  # maximum number of held-out samples on which losses are evaluated
PROBED = 5000  # with more training samples than this, the k-NN accuracy is measured only before and after training
# MAE's learning rate and batch size (arXiv 2111.06377). For Adam, the learning rate is scaled with the square root of
# the batch size (arXiv 2205.10287).
_RATE, _OF_BATCH = 2.4e-3, 4096
# The options of `pretrain`, keyed by patterns of the settings that they replace.
_ARGUMENTS = {
    r"run(\.dir)?": "--out",
    r"data\.train(\.\d+(\.shards)?)?": "SOURCE",
    r"data\.val\.\d+(\.shards)?": "--val",
    r"data": "SOURCE, --val and --set data.KEY",
    r"model\.init_from": "--from",
    r"loss\.teacher": "--teacher",
}
_ARGUMENTS |= {r"train\.probe\.labels": "--labels"}
_RATE_OF_NARROW = 4  # learning-rate factor for models that are narrower than "small"; the quickstart uses it too


@dataclass(frozen=True)
class Shards:
    """The shards of a run."""

    train: list[str]  # patterns of the shards' names, as in the config
    val: list[str]  # empty: no samples are held out
    notes: list[str]  # notes for the user
    unlabelled: str = ""  # reason why samples have no label "cls", if it is known
    shown: bool = False  # whether an overview of the samples has been shown to the user
    value_range: Range | None = None  # value range with which the shards were created


@dataclass(frozen=True)
class DatasetStatistics:
    """Statistics of the training and the held-out samples."""

    samples: int
    held_out: int
    short_side: int  # median length of the images' shorter sides, in pixels
    image_mean: list[float]
    image_std: list[float]
    classes: int  # 0: there are no usable labels
    vocab_size: int  # 0: there are no captions
    text_length: int  # maximum number of tokens per caption
    image_dtype: str = "uint8"
    value_range: Range | None = None  # values of black and white in images with more than 8 bits per channel
    has_captions: bool = False  # whether there are captions, even if an override excludes them
    fitted: tuple[str, ...] = ()  # overrides that adapt the settings of given weights to the images


@dataclass(frozen=True)
class Inputs:
    """The samples, paths and overrides from which `settings` derives the config of a run."""

    statistics: DatasetStatistics
    shards: Shards
    out: Path  # the run folder
    overrides: Sequence[str] = ()  # the user's overrides "section.key=value", which take precedence
    labels: str = "cls"  # source of the labels


def model_sizes(statistics: DatasetStatistics, overrides: Sequence[str] = ()) -> list[ModelSize]:
    """Return the model sizes for which there are enough samples, smallest first. If the run starts from given weights,
    only the size of these weights is returned."""
    if continues(overrides):
        return [ModelSize("as its weights", {}, MODEL_SIZES[-1].pixels, 0)]
    return [size for size in MODEL_SIZES if statistics.samples >= size.samples]


def possible(sizes: Sequence[ModelSize], config_of: Callable[[ModelSize], Config]) -> list[ModelSize]:
    """Return the model sizes that are compatible with the user's settings; for example, the number of heads must divide
    the width. `config_of`: function that returns the config for a size or raises UserError. Raises UserError if no size
    is compatible."""
    found, first = [], None
    for size in sizes:
        try:
            config_of(size)
            found.append(size)
        except UserError as error:
            first = first or error
    if not found and first is not None:
        raise first
    return found


def image_and_patch(short_side: int, pixels: int) -> tuple[int, int]:
    """Return the image size and the patch size. The image size is at most `pixels`, and so small that at least half of
    the images need not be enlarged. The patch size is 16 or, if this gives fewer than eight patches per side, 8 or 4
    pixels. `short_side`: median length of the images' shorter sides, in pixels; below 16, the image size is 16."""
    size = max(min(short_side, pixels), 16)
    patch = next((p for p in (16, 8) if size // p >= 8), 4)
    return size // patch * patch, patch


def _images(statistics: DatasetStatistics, size: ModelSize, overrides: Sequence[str]) -> tuple[int, int]:
    """Return the image size and the patch size as `image_and_patch` does. If the user sets one of them, the other is
    adapted to it."""
    image_size, patch = image_and_patch(statistics.short_side, size.pixels)
    if own := given(overrides, "model.image_size"):
        patch = next((p for p in (16, 8) if own // p >= 8 and own % p == 0), 4)
    elif own := given(overrides, "model.patch_size"):
        image_size = max(image_size // own, 1) * own
    return image_size, patch


def set_to(overrides: Sequence[str], name: str, default: Any) -> Any:
    """Return the value of the setting `name` in the overrides, or `default`. An override may also set the whole section
    of the setting."""
    found = default
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not f"{name}.".startswith(f"{key}."):
            continue
        try:
            value = parse_json(text)
        except ValueError:
            value = text
        for part in filter(None, name.removeprefix(key).split(".")):
            value = value.get(part, default) if isinstance(value, dict) else default
        found = value
    return found


def by_setting(overrides: Sequence[str]) -> list[str]:
    """Return the overrides. An override of the whole section `optim` is replaced by one override for each setting in
    it. Applied to the config of an existing run, the result changes only the settings that it names. The run therefore
    keeps its learning rate unless the user sets another one."""
    found = []
    for override in overrides:
        section = set_to([override], "optim", None)
        is_whole = isinstance(section, dict)
        found += [f"optim.{key}={json.dumps(value)}" for key, value in section.items()] if is_whole else [override]
    return found


def given(overrides: Sequence[str], name: str) -> int | None:
    """Return the value of the setting `name` in the overrides if it is an integer above 0, otherwise None."""
    value = set_to(overrides, name, None)
    return value if isinstance(value, int) and value > 0 else None


def channels_set(overrides: Sequence[str]) -> int | None:
    """Return the number of channels that the overrides set directly or through other settings; None if they do not
    determine it."""
    if channels := given(overrides, "model.channels"):
        return channels
    for name in ("model.image_mean", "model.image_std"):
        if isinstance(values := set_to(overrides, name, None), list):
            return len(values) or None
    return 3 if set_to(overrides, "model.image_targets", None) == "vqgan" else None


def batch_of(samples: int) -> int:
    """Return the default number of samples per step, a power of two, for this number of training samples."""
    most = _power_below(samples / 4)
    wanted = _power_below(samples / _STEPS_PER_EPOCH)
    return min(max(wanted, min(SMALLEST_BATCH, most)), LARGEST_BATCH)


def continues(overrides: Sequence[str]) -> bool:
    """Return whether the run starts from given weights."""
    return bool(set_to(overrides, "model.init_from", None))


def peak_rate(batch: int, width: int, factor: float = 1.0) -> float:
    """Return the automatic value of `optim.peak_lr`, multiplied by `factor`. The setting is the learning rate for a
    batch of 256. `batch`: samples per step; `width`: width of the encoder."""
    rate = factor * _RATE * math.sqrt(batch / _OF_BATCH) * (_RATE_OF_NARROW if width < 384 else 1)
    return float(f"{rate * 256 / batch:.3g}")


def steps_in(seconds: float, step: float, batch: int, samples: int) -> int:
    """Return the number of steps that fit into `seconds`. The result is at least 2, and at most the number of steps in
    LONGEST epochs. `step`: seconds per step; `batch`: samples per step; `samples`: samples per epoch."""
    longest = LONGEST * max(samples // batch, 1)
    return max(min(int(seconds / step), longest), 2)


def fitted_batch(seconds: float, step: Callable[[int], float], samples: int) -> int:
    """Return the number of samples per step: the result of `batch_of`, or a smaller number if there would be too few
    steps. `step`: function that returns the seconds of a step with a given number of samples."""
    batch = batch_of(samples)
    while batch > SMALLEST_BATCH and seconds / step(batch) < FEWEST_STEPS:
        batch //= 2
    return batch


def reaches(seen: float, samples: int) -> bool:
    """Return whether a model larger than the smallest may be chosen if it is trained on `seen` samples. A sample counts
    once for each epoch. `samples`: number of training samples."""
    return seen >= max(EPOCHS * samples, SEEN)


def teacher_settings(teacher: str | None) -> list[str]:
    """Return the overrides that a run with this teacher needs, with absolute paths; an empty list if `teacher` is
    None."""
    if teacher is None:
        return []
    # The config of an existing run contains the `target_width` of its teacher, which need not be that of this teacher.
    # It is reset here, so that the error about a changed teacher is raised when the run resumes.
    return [
        'model.image_targets="features"',
        f"loss.teacher={json.dumps(_absolute(teacher))}",
        "model.target_width=null",
    ]


def _absolute(teacher: str) -> str:
    """Return the name of a teacher with absolute paths."""
    if teacher.startswith(TRANSFORMERS):
        path, side = split_side(teacher.removeprefix(TRANSFORMERS), teacher)
        return TRANSFORMERS + _absolute(path) + ("" if side is None else f"@{side}")
    if not teacher.startswith(TIMM):
        return os.path.abspath(teacher) if os.path.exists(teacher) else teacher
    name, equals, file = teacher.partition("=")
    if name.startswith(prefix := TIMM + LOCAL_DIR):
        name = prefix + os.path.abspath(name.removeprefix(prefix))
    return f"{name}{equals}{os.path.abspath(file) if file else ''}"


def check_overrides(overrides: Sequence[str], start_from: str | None = None, teacher: str | None = None) -> Config:
    """Return the result of `assumed_config` for the user's overrides, for a run that starts from the weights
    `start_from` (None: from random weights) and has a `teacher` (None: none). Raises UserError if an override sets a
    value for which `pretrain` has an option. Also raises the errors of `assumed_config`."""
    for override in overrides:
        name = override.partition("=")[0]
        if meant := next((option for pattern, option in _ARGUMENTS.items() if re.fullmatch(pattern, name)), None):
            raise UserError(f"override {name}: use {meant} instead")
    if set_to(overrides, "model.init_from", None) is not None:  # set by an override of the whole section
        raise UserError("override model.init_from: use --from instead")
    if set_to(overrides, "data.val", None):
        raise UserError(
            "override data.val: can be only [] (no held-out samples); specify held-out samples with SOURCE or --val"
        )
    start = [] if start_from is None else [f"model.init_from={json.dumps(start_from)}"]
    return assumed_config([*start, *teacher_settings(teacher), *overrides])


def assumed_config(overrides: Sequence[str]) -> Config:
    """Return the config with these overrides for hypothetical samples, to validate the overrides before the samples are
    opened. Raises UserError if the overrides are invalid regardless of the samples, or require a library that is not
    installed."""
    shards = Shards(["train.tar"], ["val.tar"], [])
    inputs = Inputs(assumed(overrides), shards, Path("run"), overrides)

    def config_of(size: ModelSize) -> Config:
        return settings(inputs, size, 64, 1000)

    config = config_of(possible(MODEL_SIZES, config_of)[0])
    require_libraries_of(config, ranks=1)  # `pretrain` has a single rank
    return config


def assumed(overrides: Sequence[str], samples: int = PROBED) -> DatasetStatistics:
    """Return statistics of hypothetical samples that are compatible with the overrides."""
    shown = set_to(overrides, "data.show_channels", None)
    most = max([2, *(number for number in shown if isinstance(number, int))]) if isinstance(shown, list) else 2
    channels = min(channels_set(overrides) or most + 1, MAX_CHANNELS)  # the config refuses more
    is_alone = set_to(overrides, "data.tokenizer", "") is None
    words = 0 if is_alone else set_to(overrides, "model.vocab_size", 512)
    return DatasetStatistics(samples, 1000, 1000, [0.5] * channels, [0.25] * channels, 2, words, text_length=64)


def samples_per_epoch(statistics: DatasetStatistics, overrides: Sequence[str]) -> int:
    """Return the number of samples in an epoch, which contains `data.repeats` views of each training sample."""
    return statistics.samples * min(given(overrides, "data.repeats") or 1, _MOST_REPEATS)


def _length(statistics: DatasetStatistics, batch: int, steps: int, overrides: Sequence[str]) -> tuple[int, int]:
    """Return the number of steps of the run (`steps`, unless the overrides set a length) and the number of steps per
    epoch."""
    batch = given(overrides, "train.global_batch") or batch
    per_epoch = max(samples_per_epoch(statistics, overrides) // batch, 1)
    epochs = set_to(overrides, "train.epochs", None)
    if isinstance(epochs, int | float) and epochs > 0:
        steps = max(round(min(epochs, _MOST_EPOCHS) * per_epoch), 1)
    return min(given(overrides, "train.steps") or steps, _MOST_EPOCHS * per_epoch), per_epoch


def settings(
    inputs: Inputs,
    size: ModelSize,
    batch: int,
    steps: int,
    *,
    hours: float | None = None,
    evaluations: int = EVALUATIONS,
) -> Config:
    """Return the config of a run.

    Args:
        inputs: the samples, paths and overrides of the run.
        size: the model size.
        batch: number of samples per step.
        steps: number of steps.
        hours: time limit in hours. The number of steps is adjusted to it during training unless the user sets a length.
            None: the number of steps is not adjusted.
        evaluations: approximate number of evaluations between the first step and the last.

    Raises:
        UserError: an override is invalid.
    """
    statistics, shards, overrides = inputs.statistics, inputs.shards, inputs.overrides
    steps, per_epoch = _length(statistics, batch, steps, overrides)
    warm_up, factor = (_CONTINUED_WARM_UP, _CONTINUED_RATE) if continues(overrides) else (_WARM_UP, 1.0)
    config: dict[str, Any] = {
        "run": {"dir": str(inputs.out)},
        "model": _model_section(statistics, size, overrides),
        "loss": {"norm_pix": set_to(overrides, "model.image_targets", "pixels") == "pixels"},
        "data": _data_section(inputs),
        "optim": {"warmup_epochs": round(warm_up * steps / per_epoch, 3), "clip_grad": 1.0},
        "train": _train_section(inputs, batch, steps, evaluations) | {"hours": hours},
        "deepspeed": None,
    }
    _drop_incompatible(config, overrides)
    for override in overrides:
        if not statistics.classes:
            _require_probe(config, override)
        apply_override(config, override)
    found = parse(Config, config, "overrides")
    if shards.val and not found.data.val:
        config["train"]["probe"] = None
    config["model"].setdefault("pool", usual_pool(found.model.emb_dim))
    config["optim"].setdefault("peak_lr", peak_rate(found.train.global_batch, found.model.emb_dim, factor))
    return parse(Config, config, "overrides")


def _model_section(statistics: DatasetStatistics, size: ModelSize, overrides: Sequence[str]) -> dict[str, Any]:
    image_size, patch = _images(statistics, size, overrides)
    return {
        **size.model,
        "image_size": image_size,
        "patch_size": patch,
        "channels": len(statistics.image_mean),
        "image_dtype": statistics.image_dtype,
        "value_range": statistics.value_range,
        "image_mean": statistics.image_mean,
        "image_std": statistics.image_std,
        "text_length": statistics.text_length,
        "vocab_size": statistics.vocab_size,
    }


def _data_section(inputs: Inputs) -> dict[str, Any]:
    shards = inputs.shards
    return {
        "train": [{"shards": shards.train}],
        "val": [{"shards": shards.val}] if shards.val else [],
        "tokenizer": str((inputs.out / TOKENIZER).resolve()) if inputs.statistics.vocab_size else None,
        "crop_scale": [0.4, 1.0],
    }


def _train_section(inputs: Inputs, batch: int, steps: int, evaluations: int) -> dict[str, Any]:
    statistics, shards = inputs.statistics, inputs.shards
    often = max(steps // evaluations, min(steps, 10)) if evaluations else None
    probe = None
    if statistics.classes:
        train, val = ([{"shards": part, "modality": "image"}] for part in (shards.train, shards.val))
        every = often if statistics.samples <= PROBED else None
        probe = {"train": train, "val": val, "labels": inputs.labels, "every": every}
    return {
        "global_batch": batch,
        "steps": steps,
        "log_every": max(steps // 50, 1),
        "eval_every": often,
        "eval_samples": max(min(statistics.held_out, EVALUATED), 1),
        "save_every": max(steps // 10, min(steps, 10)),
        "probe": probe,
    }


def _drop_incompatible(config: dict[str, Any], overrides: Sequence[str]) -> None:
    """Remove from the config all automatic settings that are incompatible with the overrides, whatever the order of
    the overrides."""
    names = {name for name, _, value in (override.partition("=") for override in overrides) if value != "null"}
    if "train.epochs" in names:
        del config["train"]["steps"]
    if not names.isdisjoint(LENGTHS):
        del config["train"]["hours"]
    if "model.size" in names:
        for key in ("emb_dim", "depth", "num_heads", "dec_emb_dim", "dec_depth", "dec_num_heads"):
            config["model"].pop(key, None)


def _require_probe(config: dict[str, Any], override: str) -> None:
    """Raise UserError if the override needs a probe but there is none."""
    name, train = override.partition("=")[0], config["train"]
    if name.startswith("train.probe.") and isinstance(train, dict) and train.get("probe") is None:
        raise UserError(
            f"override {name}: there is no probe, because the samples have no usable labels; choose a field with "
            "--labels"
        )


def _power_below(value: float) -> int:
    """Return the largest power of two that does not exceed `value`, but at least 1."""
    return 2 ** max(int(math.log2(max(value, 1))), 0)
