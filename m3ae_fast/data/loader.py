"""Batches of the training stream and of an evaluation, the same for every number of ranks and workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from m3ae_fast.batch.bad_samples import Skipped
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.packing import Geometry, Sample, pack
from m3ae_fast.batch.tokenizer import check_tokenizer
from m3ae_fast.config import DataConfig
from m3ae_fast.data.corpus import Corpus
from m3ae_fast.data.dataset import Augment, Preparation, Samples, Transform
from m3ae_fast.data.order import FileOrder, Order
from m3ae_fast.data.shared_memory import batch_bytes, fitting_prefetch, most_workers
from m3ae_fast.data.workers import Loader, allow_open_files, default_workers, start_worker


@dataclass(frozen=True)
class Share:
    """Which part of every step is this rank's."""

    micro_batch: int  # samples
    accumulation: int = 1  # micro-batches per rank and step
    rank: int = 0
    world: int = 1

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.world * self.accumulation


class MicroBatches(Sampler[list[int]]):
    """Positions of one rank's micro-batches.

    Step s takes positions s * G to (s + 1) * G, G the global batch; within it micro-batches go to the ranks in turn.
    Positions from `end` on do not exist: a micro-batch may come out short or empty, but all ranks have equally many.
    """

    def __init__(self, steps: range, share: Share, end: int | None = None):
        self.steps, self.share, self.end = steps, share, end

    def __len__(self) -> int:
        return len(self.steps) * self.share.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        share = self.share
        for step in self.steps:
            for turn in range(share.accumulation):
                first = ((step * share.accumulation + turn) * share.world + share.rank) * share.micro_batch
                last = first + share.micro_batch
                yield list(range(first, last if self.end is None else min(last, self.end)))


def train_loader(
    config: DataConfig,
    corpus: Corpus,
    preparation: Preparation,
    share: Share,
    steps: range,
    *,
    transform: Transform | None = None,
    pin_memory: bool = False,
) -> DataLoader[PackedBatch]:
    """`share.accumulation` micro-batches per step, shuffled and augmented, epoch after epoch.

    Unusable samples are left out of their batch and listed in `batch.skipped`.

    Args:
        config: crop, repeats, shuffling, workers and prefetch.
        corpus: from `open_corpus`.
        preparation: how a sample becomes the model's input.
        share: this rank's.
        steps: which steps of the stream; a resumed run starts above 0.
        transform: of each image, cropped.
        pin_memory: hand over batches in pinned memory.

    Raises:
        UserError: the corpus has captions and there is no tokenizer.
    """
    order = Order(corpus.sizes, corpus.weights, config.shuffle_shards, preparation.seed)
    augment = Augment(config.crop_scale, config.flip)
    samples = Samples(corpus, order, preparation, augment, share.global_batch, config.repeats, transform)
    return _loader(config, samples, MicroBatches(steps, share), pin_memory)


def eval_loader(
    config: DataConfig,
    corpus: Corpus,
    preparation: Preparation,
    share: Share,
    samples: int | None = None,
    *,
    transform: Transform | None = None,
    pin_memory: bool = False,
) -> DataLoader[PackedBatch]:
    """Every sample, or `samples` of them evenly, once, in file order: the central square, with masks that are the same
    each time. Arguments and errors as in `train_loader`; accumulation is ignored."""
    order = FileOrder(corpus.sizes, samples)
    share = replace(share, accumulation=1)
    steps = range(-(-order.samples // share.global_batch))
    # masks are shared by the whole set, whatever the number of ranks
    dataset = Samples(corpus, order, preparation, None, order.samples, transform=transform)
    return _loader(config, dataset, MicroBatches(steps, share, order.samples), pin_memory)


def eval_samples(corpus: Corpus, preparation: Preparation, count: int) -> list[Sample]:
    """The usable ones of `count` samples spread evenly over `corpus`, as an evaluation sees them."""
    order = FileOrder(corpus.sizes, count)
    dataset = Samples(corpus, order, preparation, None, positions_per_mask=order.samples)
    return [sample for i in range(order.samples) if isinstance(sample := dataset[i], Sample)]


def samples_of(corpus: Corpus, preparation: Preparation, keys: Sequence[str]) -> dict[str, Sample]:
    """The usable ones of the samples with these keys (`Sample.key`), as an evaluation sees them."""
    places: dict[str, int] = {}
    start = 0
    for shard in (shard for source in corpus.sources for shard in source.shards):
        prefix = f"{shard.shard}/"
        if own := [key.removeprefix(prefix).encode() for key in keys if key.startswith(prefix)]:
            table = shard.table()["key"]
            found = np.flatnonzero(np.isin(table, np.array(own, dtype=table.dtype)))
            places |= {prefix + table[row].decode(): start + int(row) for row in found}
        start += shard.summary.samples
    dataset = Samples(corpus, FileOrder(corpus.sizes), preparation, None, positions_per_mask=start)
    samples = {key: dataset[place] for key, place in places.items()}
    return {key: sample for key, sample in samples.items() if isinstance(sample, Sample)}


def _loader(
    config: DataConfig, samples: Samples, micro_batches: MicroBatches, pin_memory: bool
) -> DataLoader[PackedBatch]:
    check_tokenizer(samples.preparation.tokenizer, samples.has_captions)
    geometry = samples.preparation.geometry
    size = batch_bytes(geometry, micro_batches.share.micro_batch)
    workers = min(default_workers(), most_workers(size)) if config.workers is None else config.workers
    allow_open_files()
    return Loader(
        cast("Dataset[PackedBatch]", samples),  # which `collate` makes of its samples
        batch_sampler=micro_batches,
        num_workers=workers,
        collate_fn=partial(collate, geometry=geometry),
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        prefetch_factor=fitting_prefetch(config.prefetch, workers, size) if workers else None,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # the DataLoader's own; the global one is the model's
    )


def collate(samples: Sequence[Sample | Skipped], geometry: Geometry) -> PackedBatch:
    """Pack the usable samples of a micro-batch, possibly none; the others are the batch's `skipped`."""
    batch = pack([sample for sample in samples if isinstance(sample, Sample)], geometry, repeat_shapes=True)
    return replace(batch, skipped=tuple(sample for sample in samples if isinstance(sample, Skipped)))
