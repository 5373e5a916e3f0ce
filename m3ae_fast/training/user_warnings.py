"""Warnings about a run that are reported once and are not errors."""

from __future__ import annotations

import contextlib
from statistics import median
from typing import Any

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.config import Config, ModelConfig
from m3ae_fast.data import Corpus, Data
from m3ae_fast.data.reader import Reader
from m3ae_fast.data.shard_store import network_file_system
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.images.decoding import size_of

_FIRST_STEPS = 50  # number of steps after which memory use should be stable
_GROWTH = 1.5
_INSPECTED = 32  # number of images that are inspected per source
# a warning is given if the median short side of the images is below this fraction of the model's image size
_ENLARGED = 0.75


def run_warnings(config: Config, data: Data, schedule: Schedule) -> list[str]:
    """Return one warning per unusual property of a run."""
    notes = []
    if not _trains(config):
        notes.append(
            "the total loss is always 0: for each modality, either the loss weight is 0 or no token counts towards the "
            "loss; check the sections loss and masking"
        )
    if config.model.dec_attention == "self" and (partial := _partly_predicted(config)):
        notes.append(
            f"with model.dec_attention=self and {' and '.join(partial)}, the features became worse in experiments: set "
            "model.dec_attention=cross, or predict all masked tokens"
        )
    batch, samples = config.train.global_batch, schedule.samples
    if batch > samples:
        notes.append(
            f"a batch of {batch:,} contains each of the {samples:,} samples {batch / samples:.1f} times on average; an "
            "epoch therefore counts as one batch in the log, in train.epochs and in optim.warmup_epochs"
        )
    wanted = round(config.optim.warmup_epochs * schedule.steps_per_epoch)
    if wanted > schedule.warmup_steps:
        notes.append(
            f"the warm-up of {wanted:,} steps (optim.warmup_epochs={config.optim.warmup_epochs:g}) is shortened to the "
            f"run's {schedule.warmup_steps:,} steps: the learning rate reaches its peak only at the end"
        )
    store = data.train.store
    if (kind := network_file_system(store.cache_dir)) and any(
        store.must_be_copied(shard.shard) for source in data.train.sources for shard in source.shards
    ):
        notes.append(
            f"data.cache_dir {store.cache_dir} is on a network file system ({kind}): shards are transferred twice; "
            "choose a folder on a local disk of each node"
        )
    for name, corpus in (("train", data.train), ("val", data.val)):
        if corpus and corpus.ignored:
            notes.append(f"data.{name}: some files in the shards are ignored: {corpus.ignored}")
        count, example = corpus.separated if corpus else (0, "")
        if count:
            notes.append(
                f"data.{name}: {count:,} images and their captions are separate samples, because their files are not "
                f"adjacent in the tar (for example, in {example}); create the tar again with its files sorted by name"
            )
    if shared := data.val.shared_with(data.train) if data.val else []:
        which = f"{len(shared):,} of its shards {'is' if len(shared) == 1 else 'are'}"
        notes.append(
            f"data.val: {which} also used for training (for example, {shared[0]}), so validation losses do not "
            "measure performance on unseen samples"
        )
    fields = ModelConfig.model_fields
    default = all(getattr(config.model, name) == fields[name].default for name in ("image_mean", "image_std"))
    sources = [source for source in data.train.sources if source.has_images]
    if default and sources and not any("cc12m" in shard.shard.lower() for one in sources for shard in one.shards):
        notes.append(
            "model.image_mean and model.image_std are still the defaults for CC12M; set them to the values of your "
            "images, which m3ae-fast shards stats SHARDS prints"
        )
    if config.model.resize == "square" and (note := enlarged_images(config, data.train)):
        notes.append(note)
    return notes


def open_options(config: Config) -> str:
    """Return a line on the options in which a run differs from the official M3AE; "" if there are none."""
    values: dict[str, tuple[Any, ...]] = {  # value of each setting, followed by the values of the official M3AE
        "model.image_targets": (config.model.image_targets, "pixels", "vqgan"),
        "model.dec_attention": (config.model.dec_attention, "self"),
        "masking.image_predicted": (config.masking.image_predicted, 1.0),
        "masking.text_predicted": (config.masking.text_predicted, 1.0),
        "optim.name": (config.optim.name, "adamw"),
        "optim.layer_decay": (config.optim.layer_decay, 1.0),
        "optim.schedule": (config.optim.schedule, "cosine"),
    }
    changed = [f"{name}={value}" for name, (value, *official) in values.items() if value not in official]
    if not changed:
        return ""
    settings = ", ".join(changed)
    return (
        f"Open: {settings}; the run differs from the official M3AE, and is Closed (equal to it) without these settings"
    )


def _partly_predicted(config: Config) -> list[str]:
    """Return the settings of modalities whose masked tokens are not all predicted in training."""
    fractions = {name: getattr(config.masking, name) for name in ("image_predicted", "text_predicted")}
    return [f"masking.{name}={fraction:g}" for name, fraction in fractions.items() if fraction < 1]


def _trains(config: Config) -> bool:
    """Return whether at least one loss has a non-zero weight and is computed from at least one token."""
    loss, masking = config.loss, config.masking
    image = loss.image_weight and (masking.image_ratio or loss.image_all_tokens)
    text = config.model.vocab_size and loss.text_weight and (masking.text_ratio or loss.text_all_tokens)
    return bool(image or text)


def enlarged_images(config: Config, corpus: Corpus) -> str:
    """Return a note if most images are much smaller than the model's image size, judging by some images that are
    available locally; otherwise ""."""
    sides = []
    for source in corpus.sources:
        if source.indexed and source.has_images and not corpus.store.must_be_copied(source.indexed[0].shard):
            reader = Reader(source, corpus.store.in_place())
            for row in range(min(source.indexed[0].summary.samples, _INSPECTED)):
                with contextlib.suppress(BadSample, OSError):
                    image = reader.read(0, row).image
                    sides += [min(size_of(image))] if image else []
    size = config.model.image_size
    if not sides or (middle := median(sides)) >= _ENLARGED * size:
        return ""
    return (
        f"images are enlarged: half of {len(sides):,} inspected images have a short side of {middle:g} pixels or "
        f"less, but model.image_size is {size}; a smaller image size would be faster without losing detail"
    )


class MemoryGrowth:
    """Detector of peak memory that keeps growing after the first steps of a run."""

    def __init__(self) -> None:
        self._stable: float | None = None

    def check(self, steps: int, gigabytes: float) -> str | None:
        """Return a note if peak memory has grown; otherwise None. `steps`: number of steps since the run was started
        or resumed."""
        if steps < _FIRST_STEPS:
            return None
        before, self._stable = self._stable, self._stable or gigabytes
        if before is None or gigabytes < _GROWTH * before:
            return None
        self._stable = gigabytes
        return f"peak memory has grown from {before:.2f} to {gigabytes:.2f} GB"
