"""Data loaders for training and evaluation. The samples of a training step do not depend on the number of ranks or of
workers."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.packing import Geometry, Sample, pack
from m3ae_fast.batch.tokenizer import check_tokenizer
from m3ae_fast.config import DataConfig, ModelConfig
from m3ae_fast.data.batches_ahead import batch_bytes, fitting_prefetch, most_workers
from m3ae_fast.data.corpus import Corpus
from m3ae_fast.data.dataset import Augment, Preparation, Samples
from m3ae_fast.data.fetcher import FetcherOfNode
from m3ae_fast.data.lane_count import Layout, lay_out
from m3ae_fast.data.order import FileOrder, Order
from m3ae_fast.data.prefetch_schedule import PrefetchSchedule
from m3ae_fast.data.rank_share import MicroBatches, Share
from m3ae_fast.model.flops import executed_flops
from m3ae_fast.process.ranks import Node
from m3ae_fast.process.workers import Loader, allow_open_files, default_workers, start_worker


def train_loader(
    config: DataConfig,
    corpus: Corpus,
    preparation: Preparation,
    share: Share,
    steps: range,
    *,
    layout: Layout | None = None,
    node: Node | None = None,
    pin_memory: bool = False,
) -> DataLoader[PackedBatch]:
    """Return a loader of `share.accumulation` shuffled and augmented micro-batches per step, over all epochs.

    Bad samples are left out of their batch and listed in `batch.skipped`. If the sizes of native images are known, and
    `data.repeats` is 1, the images of a step are distributed over the ranks of the node such that all ranks have about
    the same number of patches.

    Args:
        config: settings of crops, repeats, shuffling, workers and prefetching.
        steps: range of steps; a resumed run starts above 0.
        layout: layout of the sample order; None: as computed by `lay_out`.
        node: the ranks of this node, which share a fetcher; None: only this rank.
        pin_memory: whether to return batches in pinned memory.

    Raises:
        UserError: the dataset has captions but there is no tokenizer, `data.cache_gb` is too small, or the shared
            memory is too small for the batches of the workers.
    """
    lanes, window = layout or lay_out(config, corpus.sizes, share.global_batch)
    order = Order(corpus.sizes, corpus.weights, window, preparation.seed, lanes)
    augment = Augment(config.crop_scale, config.flip)
    samples = Samples(corpus, order, preparation, augment, share.global_batch, config.repeats)
    work = _patches(corpus, order, preparation.geometry) if config.repeats == 1 else None
    ranks = node.ranks if node else [share.rank]
    micro_batches = MicroBatches(steps, share, lanes, config.repeats, work=work, ranks=ranks)
    loader = _loader(config, samples, micro_batches, pin_memory)
    if any(corpus.store.is_staged(shard.shard) for source in corpus.sources for shard in source.shards):
        ahead = -(-loader.num_workers * (loader.prefetch_factor or 0) // share.accumulation)
        schedule = PrefetchSchedule.of(corpus, order, micro_batches, ranks, ahead)
        schedule.require_space()
        node = node or Node(uuid.uuid4().hex, ranks)
        loader.companion = FetcherOfNode(schedule, node, share.rank, share.accumulation)
    return loader


def _patches(corpus: Corpus, order: Order, geometry: Geometry) -> Callable[[int], int] | None:
    """Return a function that maps a position to the number of patches of its image; None if all images have the same
    number of patches or if the numbers are unknown."""
    sizes = [source.image_sizes for source in corpus.sources if source.image_sizes is not None]
    if geometry.native is None or len(sizes) < len(corpus.sources):
        return None
    grid = lru_cache(1 << 16)(geometry.native.grid)

    def patches(position: int) -> int:
        source, _, sample = order.locate(position)
        height, width = sizes[source][sample].tolist()
        return math.prod(grid(height, width)) if height and width else 0

    return patches


def eval_loader(
    config: DataConfig,
    corpus: Corpus,
    preparation: Preparation,
    share: Share,
    samples: int | None = None,
    *,
    pin_memory: bool = False,
) -> DataLoader[PackedBatch]:
    """Return a loader that yields every sample once, or `samples` evenly spaced samples, in file order. Images are
    cropped to the central square unless they have native aspect ratio. The masks are the same in each evaluation. See
    `train_loader` for the arguments and errors. Batches have at most `share.micro_batch` samples."""
    order = FileOrder(corpus.sizes, samples)
    share = replace(share, global_batch=share.micro_batch * share.world, accumulation=1)
    steps = range(-(-order.samples // share.global_batch))
    # if `masking.per` is "batch", all samples have the masks of one step, so that the result does not depend on the
    # number of ranks
    dataset = Samples(corpus, order, preparation, None, order.samples)
    return _loader(config, dataset, MicroBatches(steps, share, end=order.samples), pin_memory)


def eval_samples(corpus: Corpus, preparation: Preparation, count: int) -> list[Sample]:
    """Return `count` evenly spaced samples of `corpus`, prepared as for evaluation, without bad samples."""
    order = FileOrder(corpus.sizes, count)
    dataset = Samples(corpus, order, preparation, None, positions_per_mask=order.samples)
    return [sample for i in range(order.samples) if isinstance(sample := dataset[i], Sample)]


def samples_of(corpus: Corpus, preparation: Preparation, keys: Sequence[str]) -> dict[str, Sample]:
    """Return the samples with these keys (`Sample.key`), prepared as for evaluation, without bad samples."""
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


def _loader(config: DataConfig, samples: Samples, micro_batches: MicroBatches, pin_memory: bool) -> Loader[PackedBatch]:
    check_tokenizer(samples.preparation.tokenizer, samples.corpus.has_captions)
    preparation = samples.preparation
    size = batch_bytes(preparation.geometry, micro_batches.share.micro_batch)
    workers = min(default_workers(), most_workers(size)) if config.workers is None else config.workers
    allow_open_files()
    return Loader(
        cast("Dataset[PackedBatch]", samples),  # `collate` converts its samples to a PackedBatch
        batch_sampler=micro_batches,
        num_workers=workers,
        collate_fn=partial(collate, geometry=preparation.geometry, model=preparation.counted_for),
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        prefetch_factor=fitting_prefetch(workers, size) if workers else None,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # a separate generator for the DataLoader, because the model uses the global one
    )


def collate(samples: Sequence[Sample | Skipped], geometry: Geometry, model: ModelConfig | None = None) -> PackedBatch:
    """Return the valid samples of a micro-batch as one packed batch, which lists the bad samples in `skipped`. `model`:
    model whose FLOPs are counted for the batch; None: FLOPs are not counted."""
    usable = [sample for sample in samples if isinstance(sample, Sample)]
    batch = pack(usable, geometry, repeat_shapes=True)
    skipped = tuple(sample for sample in samples if isinstance(sample, Skipped))
    return replace(batch, skipped=skipped, flops=None if model is None else executed_flops(model, batch))
