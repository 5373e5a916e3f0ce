"""Batches of the training stream, the same for every number of ranks and workers."""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.utils.data import DataLoader, Sampler

from m3ae_fast.config import DataConfig, MaskingConfig
from m3ae_fast.data.corpus import Corpus, Skipped
from m3ae_fast.data.dataset import Augment, Samples
from m3ae_fast.data.order import FileOrder, Order
from m3ae_fast.data.tokenizer import CaptionTokenizer
from m3ae_fast.errors import UserError
from m3ae_fast.model.packing import Geometry, PackedBatch, Sample, pack

MAX_WORKERS = 16
MIN_SEEN = 100  # samples before a share of bad ones means anything
_LOGGED = 20  # bad samples that are named one by one

_log = logging.getLogger(__name__)


class MicroBatches(Sampler[list[int]]):
    """Positions of one rank's micro-batches, `accumulation` of them a step.

    Step s takes positions s * G to (s + 1) * G, G = micro_batch * world * accumulation; within it micro-batches go
    round the ranks. Positions from `end` on do not exist: a micro-batch may come out short or empty, but all ranks have
    equally many.
    """

    def __init__(
        self, steps: range, *, rank: int, world: int, micro_batch: int, accumulation: int, end: int | None = None
    ):
        self.steps = steps
        self.rank, self.world = rank, world
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.end = end

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for turn in range(self.accumulation):
                first = ((step * self.accumulation + turn) * self.world + self.rank) * self.micro_batch
                last = first + self.micro_batch
                yield list(range(first, last if self.end is None else min(last, self.end)))


def build_loader(
    data: DataConfig,
    corpus: Corpus,
    tokenizer: CaptionTokenizer | None,
    geometry: Geometry,
    masking: MaskingConfig,
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    micro_batch: int,
    accumulation: int = 1,
    start_step: int = 0,
    steps: int | None = None,
    train: bool = True,
    samples: int | None = None,
    pin_memory: bool = False,
) -> DataLoader[PackedBatch]:
    """A loader that yields `accumulation` micro-batches a step for steps start_step to steps - 1.

    Training goes through the corpus for ever, shuffled and augmented; evaluation (`train=False`) takes every sample, or
    `samples` of them evenly, once in file order, the central square, with masks that are the same each time. Samples
    that cannot be used are left out of their batch and listed in `batch.skipped`.

    Args:
        data: crop, shuffling, workers and prefetch.
        corpus: from `open_corpus`.
        tokenizer: from `load_tokenizer`; None where no captions are used.
        geometry: the model's sizes.
        masking: mask ratios, and what shares a mask.
        seed: the run's.
        rank: of `world` ranks.
        micro_batch: samples a rank and micro-batch.
        accumulation: micro-batches a rank and step.
        start_step: the first step, to resume.
        steps: the step to stop before, in training; None: for ever.
        train: see above.
        samples: how many samples to evaluate on; None: all.
        pin_memory: hand over batches in pinned memory.

    Raises:
        UserError: the corpus has captions and there is no tokenizer.
    """
    if tokenizer is None and corpus.has_captions:
        raise UserError('data.tokenizer: missing, but the shards have captions; name one, or set modality "image"')
    global_batch = micro_batch * world * accumulation
    if train:
        order: Order | FileOrder = Order(corpus.sizes, corpus.weights, data.shuffle_shards, seed)
        end, last = None, steps if steps is not None else 1 << 62
        augment, share_mask = Augment(data.crop_scale, data.flip), global_batch
    else:
        order = FileOrder(corpus.sizes, samples)
        end, last = order.samples, -(-order.samples // global_batch)
        augment, share_mask = None, order.samples  # whatever the number of ranks
    workers = default_workers() if data.workers is None else data.workers
    _allow_open_files()
    return DataLoader(
        Samples(corpus, order, tokenizer, geometry, masking, augment, seed, share_mask),
        batch_sampler=MicroBatches(
            range(start_step, last), rank=rank, world=world, micro_batch=micro_batch, accumulation=accumulation, end=end
        ),
        num_workers=workers,
        collate_fn=partial(collate, geometry=geometry),
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        prefetch_factor=data.prefetch if workers else None,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # the DataLoader's own; the global one is the model's
    )


def _allow_open_files() -> None:
    """Workers hand over each tensor as an open file: many batches ahead are more than the usual soft limit of 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(1 << 16, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def default_workers() -> int:
    """Loader processes for a rank: the cores it has to itself but one, 1 to MAX_WORKERS."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(MAX_WORKERS, max(1, len(os.sched_getaffinity(0)) // ranks - 1))


def collate(samples: Sequence[Sample | Skipped], geometry: Geometry) -> PackedBatch:
    """Pack the usable ones of a micro-batch, maybe none; the others are the batch's `skipped`."""
    batch = pack([sample for sample in samples if isinstance(sample, Sample)], geometry)
    batch.skipped = [sample for sample in samples if isinstance(sample, Skipped)]
    return batch


def _start_worker(worker: int) -> None:
    """Signals that a whole process group gets are the main process's business, which may want to save first.

    A worker that died of one would stop it with an error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_end, daemon=True).start()


def _await_end() -> None:
    """End the worker when it is the main process that terminates it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(0)


class BadSamples:
    """Counts samples that could not be used, names them in the log, and stops a run that has too many.

    Args:
        max_fraction: the share of bad samples that is borne.
        samples: samples an epoch; the share is looked at from MIN_SEEN samples on, or an epoch if that is fewer.
    """

    def __init__(self, max_fraction: float, samples: int):
        self.max_fraction = max_fraction
        self.least = max(1, min(MIN_SEEN, samples))
        self.seen = self.bad = self._logged = 0
        self._latest: Skipped | None = None

    def report(self, skipped: Sequence[Skipped]) -> None:
        """Log this rank's bad samples."""
        for item in skipped:
            self._latest = item
            self._logged += 1
            if self._logged <= _LOGGED:
                _log.warning("skipped %s", item)
            if self._logged == _LOGGED:
                _log.warning("further bad samples are counted, not named")

    def count(self, seen: int, bad: int) -> None:
        """Add the counts of a step over all ranks; `seen` includes the bad ones.

        Raises:
            UserError: more than `max_fraction` of all samples so far are bad.
        """
        self.seen += seen
        self.bad += bad
        if self.seen >= self.least and self.bad > self.max_fraction * self.seen:
            example = f", such as {self._latest}" if self._latest else ""
            raise UserError(
                f"{self.bad} of {self.seen} samples cannot be used{example}; "
                f"repair the shards or raise data.max_bad_fraction ({self.max_fraction:g})"
            )
