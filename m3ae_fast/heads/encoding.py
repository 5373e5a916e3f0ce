"""Encoding of datasets by a frozen encoder.

Shapes: S samples of a batch, R samples of this rank, L patches per image, D encoder width, K feature vectors per
sample, over all pairs of a layer and a pooling.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import pins_memory
from m3ae_fast.base.pace import Pace
from m3ae_fast.base.progress import track
from m3ae_fast.batch.masking import UNMASKED
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import DataConfig
from m3ae_fast.config.evaluation import EncodeConfig
from m3ae_fast.data import Corpus, Preparation, Share, eval_loader
from m3ae_fast.heads.feature_bank import FeatureBank, FeatureType, Rows, has_tokens, layers_of, pools_of
from m3ae_fast.images.patch_grid import Grid
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.inference import encoding
from m3ae_fast.process.heartbeats import Heartbeats
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.process.stop_request import StopRequest
from m3ae_fast.process.stoppable_loop import until_stopped

T = TypeVar("T")
# a function that maps labels [S], pooled features [S, K, D] and patch tokens [S, K, L, D] to F results, [S, F, ...]
Reduce = Callable[[Tensor, Tensor, Tensor], Tensor]


class UnusableSamples(UserError):
    """Too many samples of a dataset could not be used. It is raised on every rank."""


def key_digest(key: str, draw: str = "") -> bytes:
    """Return a hash of a sample's key, 32 bytes, which serves as a source of random numbers for the sample; `draw`
    selects one of several independent hashes. The hash does not depend on the folder of the shard, so that results do
    not change if the data are moved."""
    shard_and_name = key.split("/")[-2:]
    return hashlib.sha256(os.fsencode(draw + "/".join(shard_and_name))).digest()


class PassMonitor(NamedTuple):
    """Progress display, stall detection and stop requests of a pass over samples."""

    title: str = "encoding"
    heartbeats: Heartbeats | None = None  # the heartbeats of this rank, marked at each batch
    stop: StopRequest | None = None  # stop requests, checked before each batch
    whole: Pace | None = None  # pace of the whole task, of which this pass is a part; see `progress`
    part: float = 0.0  # size of this pass, in the units of `whole`

    def over(self, loader: DataLoader[PackedBatch], ranks: Ranks) -> Iterable[PackedBatch]:
        """Yield the batches of a loader. Raises Stopped if a rank is asked to stop."""
        batches: Iterable[PackedBatch] = self.heartbeats.watch(loader, self.title) if self.heartbeats else loader
        if self.stop:
            batches = until_stopped(batches, ranks, self.stop)
        return track(batches, self.title, len(loader), whole=self.whole, part=self.part)


NO_MONITOR = PassMonitor()


class Batches(NamedTuple):
    """This rank's batches of a dataset. Each batch has at most `encode.batch` samples, without masks. All ranks have
    the same number of batches; batch b of rank r is number b * world + r among the batches of all ranks."""

    loader: DataLoader[PackedBatch]
    samples: int  # number of samples of all ranks, including unreadable ones
    max_bad_fraction: float  # maximum fraction of unreadable samples
    lists: np.ndarray | None = None  # lists of labels, as in `Corpus`


def corpus_batches(
    model: MultimodalEncoder, corpus: Corpus, data: DataConfig, config: EncodeConfig, ranks: Ranks
) -> Batches:
    """Return this rank's batches of all samples of a corpus, in file order, for encoders with the same input as
    `model`. Images are cropped to the central square if the model's images are squares. The modalities of the sources
    determine whether images, texts or pairs are encoded. Raises UserError if there are captions but the model has no
    tokenizer."""
    if corpus.has_captions:
        model.require_tokenizer()
    preparation = Preparation(model.geometry, UNMASKED, model.tokenizer, seed=0)
    share = Share(config.batch * ranks.world, rank=ranks.rank, world=ranks.world)
    loader = eval_loader(data, corpus, preparation, share, pin_memory=pins_memory(ranks.device))
    return Batches(loader, corpus.samples, data.max_bad_fraction, corpus.lists)


def encode_batches(
    model: MultimodalEncoder,
    batches: Batches,
    config: EncodeConfig,
    ranks: Ranks,
    monitor: PassMonitor = NO_MONITOR,
    *,
    folder: Path | None = None,
) -> FeatureBank:
    """Return the features of the last block with the pooling of `config`, float32 [R, D]. See `encode_types` for the
    arguments and the errors."""
    kind = FeatureType(model.config.depth, config.fixed_pool)
    (bank,) = encode_types([model], [[kind]], batches, config, ranks, monitor, folder=folder)
    return bank.of(kind)


def encode_types(
    models: Sequence[MultimodalEncoder],
    types: Sequence[Sequence[FeatureType]],
    batches: Batches,
    config: EncodeConfig,
    ranks: Ranks,
    monitor: PassMonitor = NO_MONITOR,
    *,
    reduce: Reduce | None = None,
    folder: Path | None = None,
) -> list[FeatureBank]:
    """Return a bank of the features of all samples for each model; `FeatureBank.of` selects the features of one type.
    Each batch is decoded only once for all models. Each rank stores the features that it has computed: float32, or
    float16 for patch tokens.

    Args:
        models: encoders with the same input, on the device of `ranks`.
        types: the types of features of each model.
        batches: this rank's batches of the dataset.
        config: settings of the encoding.
        ranks: the ranks across which the samples are split.
        monitor: progress display and stop requests.
        reduce: function of a batch's labels, pooled features and patch tokens; its results are stored in place of the
            features.
        folder: folder for a file with features that do not fit into memory; None: the folder for temporary files.

    Raises:
        Stopped: `monitor.stop` is given, and a rank is asked to stop.
        UserError: too many samples cannot be read, a feature is not finite, or features fit neither into memory nor on
            the disk.
    """
    most = len(batches.loader) * config.batch
    # for each model: pooled features and patch tokens
    rows = [[Rows(most, ranks, folder, count) for _ in range(2)] for count in range(len(models), 0, -1)]
    known: list[_Known] = []
    with ExitStack() as inside:
        encoders = []
        for model, own_types in zip(models, types):
            inside.enter_context(encoding(model, config.precision, ranks.device))
            encoders.append(partial(_pool, model, own_types, config, reduce))
        shown = monitor.over(batches.loader, ranks)
        for batch, found in _one_behind(lambda batch: [encode(batch) for encode in encoders], shown, ranks.device):
            for (pooled, tokens), (pooled_SKD, patches_SKLD) in zip(rows, found):
                pooled.append(pooled_SKD)
                if patches_SKLD is not None:
                    tokens.append(patches_SKLD)
            labels = None if batch.labels is None else batch.labels.cpu()
            known.append(_Known(batch.keys, labels, list(batch.skipped), batch.grids, batch.image_hashes))
    # batch b of rank r is number b * world + r of the dataset
    each = [known for parallel in zip(*ranks.gather(known)) for known in parallel]
    check_skipped([bad for one in each for bad in one.skipped], batches.samples, batches.max_bad_fraction)
    starts = list(accumulate((len(one.keys) for one in each), initial=0))
    own = [torch.arange(starts[batch], starts[batch + 1]) for batch in range(ranks.rank, len(each), ranks.world)]
    labels_N = None if any(one.labels is None for one in each) else torch.cat([one.labels for one in each])
    if batches.lists is not None:
        labels_N = torch.from_numpy(batches.lists)[labels_N]
    banks = [
        FeatureBank(
            keys=[key for one in each for key in one.keys],
            stored_SD=pooled.tensor(),
            labels_N=labels_N,
            patches_SLD=tokens.tensor() if has_tokens(own_types) and reduce is None else None,
            skipped=[bad for one in each for bad in one.skipped],
            grids=[grid for one in each for grid in one.grids],
            image_hashes=[image for one in each for image in one.image_hashes],
            own_R=torch.cat(own) if ranks.world > 1 else None,
            ranks=ranks,
            types=own_types,
        )
        for (pooled, tokens), own_types in zip(rows, types)
    ]
    if reduce is None:
        for bank in banks:
            bank.check_finite()
    return banks


class _Known(NamedTuple):
    """The properties of a batch that are sent to all ranks."""

    keys: list[str]
    labels: Tensor | None
    skipped: list[Skipped]
    grids: list[Grid]
    image_hashes: list[str]


def _one_behind(
    encode: Callable[[PackedBatch], T], batches: Iterable[PackedBatch], device: torch.device
) -> Iterator[tuple[PackedBatch, T]]:
    """Yield each batch with its result. A result is yielded only after the computation for the next batch has
    been launched, so that the GPU is busy while results are copied."""
    last = None
    for batch in batches:
        encoded = encode(batch.to(device, non_blocking=True))
        if last:
            yield last
        last = batch, encoded
    if last:
        yield last


def _pool(
    model: MultimodalEncoder,
    types: Sequence[FeatureType],
    config: EncodeConfig,
    reduce: Reduce | None,
    batch: PackedBatch,
) -> tuple[Tensor, Tensor | None]:
    layers, pools = layers_of(types), pools_of(types) or [config.fixed_pool]
    if not has_tokens(types) and reduce is None:
        return model.pooled_of_layers(batch, layers, pools), None
    pooled_SKD, patches_SKLD = model.pooled_and_patches(batch, layers, pools)
    if reduce is None:
        return pooled_SKD, patches_SKLD.half()
    assert batch.labels is not None
    with torch.autocast(batch.labels.device.type, enabled=False):
        return reduce(batch.labels, pooled_SKD, patches_SKLD.half()), None


def check_skipped(skipped: Sequence[Skipped], samples: int, max_fraction: float) -> None:
    """Raise UnusableSamples if no sample, or too few samples, could be used."""
    if len(skipped) == samples or len(skipped) > max_fraction * samples:
        raise UnusableSamples(
            f"{len(skipped):,} of {samples:,} samples cannot be used, for example {skipped[0]}; "
            f"repair them or raise data.max_bad_fraction ({max_fraction:g})"
        )
