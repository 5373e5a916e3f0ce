"""Features of whole shards, by a frozen encoder.

Shapes: S samples, L patches per image, D encoder width, N samples of a corpus, K layers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import pins_memory
from m3ae_fast.base.progress import TimeLeft, track
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import DataConfig
from m3ae_fast.config.evaluation import EncodeConfig
from m3ae_fast.data import Corpus, Preparation, Share, eval_loader
from m3ae_fast.data.dataset import UNMASKED
from m3ae_fast.images.patch_grid import Grid
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.model.inference import check_finite, encoding
from m3ae_fast.model.pooling import Pool
from m3ae_fast.process.heartbeats import Pulse
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.process.signals import StopRequest
from m3ae_fast.process.stopping import until_stopped

T = TypeVar("T")


def key_digest(key: str, draw: str = "") -> bytes:
    """Return a hash of a sample's key, for what is drawn by sample; another for each `draw`. The folder of its shard
    has no part in it, so that the same data elsewhere give the same result."""
    shard_and_name = key.split("/")[-2:]
    return hashlib.sha256(os.fsencode(draw + "/".join(shard_and_name))).digest()


@dataclass(frozen=True)
class Features:
    """Features of the samples that could be read, in file order."""

    keys: list[str]
    features_ND: Tensor  # float32, on the CPU; of several layers [N, K, D]
    labels_N: Tensor | None  # int64 ids of classes; None for a corpus without labels
    patches_NLD: Tensor | None  # float16, on the CPU; of several layers [N, K, L, D]
    skipped: list[Skipped]
    grids: list[Grid] = field(default_factory=list)  # rows and columns of patches, of samples that have an image

    @property
    def labels(self) -> Tensor:
        """Return the labels of a corpus that has some."""
        assert self.labels_N is not None
        return self.labels_N

    def rows(self, rows: list[int]) -> Features:
        """Return the samples of these rows."""
        labels_N, patches_NLD = (None if t is None else t[rows] for t in (self.labels_N, self.patches_NLD))
        keys, features_ND = [self.keys[row] for row in rows], self.features_ND[rows]
        return replace(self, keys=keys, features_ND=features_ND, labels_N=labels_N, patches_NLD=patches_NLD, grids=[])

    def layer(self, number: int) -> Features:
        """Return the samples at one of several layers, counted from 0."""
        patches_NLD = None if self.patches_NLD is None else self.patches_NLD[:, number]
        return replace(self, features_ND=self.features_ND[:, number], patches_NLD=patches_NLD)

    def tokens(self) -> Features:
        """Return the samples with their patches as features, [N, L, D]."""
        assert self.patches_NLD is not None
        return replace(self, features_ND=self.patches_NLD, patches_NLD=None)

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        """Return the samples of all parts, one after the other."""
        return cls(*map(_joined, zip(*(vars(part).values() for part in parts))))


def _joined(parts: tuple[Any, ...]) -> Any:
    """Join lists, or tensors; None if one is missing."""
    if any(part is None for part in parts):
        return None
    return torch.cat(parts) if isinstance(parts[0], Tensor) else list(chain.from_iterable(parts))


def encode_corpus(
    model: MultimodalEncoder,
    corpus: Corpus,
    data: DataConfig,
    config: EncodeConfig,
    ranks: Ranks,
    *,
    title: str = "encoding",
    layers: Sequence[int] | None = None,
    patches: bool = False,
    pulse: Pulse | None = None,
    stop: StopRequest | None = None,
    whole: TimeLeft | None = None,
    part: float = 0.0,
) -> Features:
    """Return pooled features of the central square and the caption of every sample, complete on every rank.

    Args:
        model: on the device of `ranks`.
        corpus: what its sources' modalities say is encoded: images, texts, or pairs. Labels go along.
        layers: the K blocks after which features are taken, numbered from 1, see `Features`; None: the last one.
        patches: keep the features of all patches too.
        pulse, stop: marked at, and checked before, each batch.
        whole, part: the task that this belongs to and its size there, for the progress shown, see `progress`.

    Raises:
        Stopped: a rank is asked to stop.
        UserError: too many samples cannot be read, a feature is not finite, or there are captions and the model has no
            tokenizer.
    """
    share = Share(config.batch * ranks.world, rank=ranks.rank, world=ranks.world)
    loader = encoding_loader(model, corpus, data, share, ranks.device)
    return encode_batches(
        model,
        loader,
        config,
        ranks,
        title=title,
        layers=layers,
        patches=patches,
        pulse=pulse,
        stop=stop,
        whole=whole,
        part=part,
        samples=corpus.samples,
        max_bad_fraction=data.max_bad_fraction,
    )


def encode_batches(
    model: MultimodalEncoder,
    loader: DataLoader[PackedBatch],
    config: EncodeConfig,
    ranks: Ranks,
    *,
    samples: int,
    max_bad_fraction: float,
    title: str = "encoding",
    layers: Sequence[int] | None = None,
    patches: bool = False,
    pulse: Pulse | None = None,
    stop: StopRequest | None = None,
    whole: TimeLeft | None = None,
    part: float = 0.0,
) -> Features:
    """Return pooled features of all ranks' batches; arguments and errors as of `encode_corpus`.

    Args:
        loader: this rank's batches, as many as every other rank has; rank r's b-th is number b x world + r of all.
        samples: the number of samples of all ranks, those that cannot be read included.
        max_bad_fraction: the largest fraction of them that may be left out.
    """
    batches: Iterable[PackedBatch] = pulse.watch(loader, title) if pulse else loader
    if stop:
        batches = until_stopped(batches, ranks, stop)
    shown = track(batches, title, len(loader), whole=whole, part=part)
    with encoding(model, config.precision, ranks.device):
        encode = partial(_pool, model, layers or [model.config.depth], config.pool, patches)
        own = [
            Features(
                batch.keys,
                pooled_SKD.cpu(),
                batch.labels,
                None if patches_SKLD is None else patches_SKLD.cpu(),
                list(batch.skipped),
                batch.grids,
            )
            for batch, (pooled_SKD, patches_SKLD) in _one_behind(encode, shown, ranks.device)
        ]
    # rank r's b-th batch is the stream's number b x world + r
    parts = list(chain.from_iterable(zip(*ranks.gather(own)))) if ranks.world > 1 else own
    found = Features.joined(parts)
    check_skipped(found.skipped, samples, max_bad_fraction)
    found = found if layers else found.layer(0)
    for features in (found.features_ND, found.patches_NLD):
        if features is not None:
            check_finite(features, found.keys)
    return found


def encoding_loader(
    model: MultimodalEncoder, corpus: Corpus, data: DataConfig, share: Share, device: torch.device
) -> DataLoader[PackedBatch]:
    """Return a loader of all samples, unmasked, in file order. Raises UserError if captions have no tokenizer."""
    if corpus.has_captions:
        model.require_tokenizer()
    preparation = Preparation(model.geometry, UNMASKED, model.tokenizer, seed=0)
    return eval_loader(data, corpus, preparation, share, pin_memory=pins_memory(device))


def _one_behind(
    encode: Callable[[PackedBatch], T], batches: Iterable[PackedBatch], device: torch.device
) -> Iterator[tuple[PackedBatch, T]]:
    """Yield each batch with its result once the next one has been launched: a GPU never waits for a copy."""
    last = None
    for batch in batches:
        encoded = encode(batch.to(device, non_blocking=True))
        if last:
            yield last
        last = batch, encoded
    if last:
        yield last


def _pool(
    model: MultimodalEncoder, layers: Sequence[int], pool: Pool, patches: bool, batch: PackedBatch
) -> tuple[Tensor, Tensor | None]:
    if not patches:
        return model.pooled_of_layers(batch, layers, pool), None
    pooled_SKD, patches_SKLD = model.pooled_and_patches(batch, layers, pool)
    return pooled_SKD, patches_SKLD.half()


def check_skipped(skipped: Sequence[Skipped], samples: int, max_fraction: float) -> None:
    """Raise UserError if none, or too few, of the samples could be used."""
    if len(skipped) == samples or len(skipped) > max_fraction * samples:
        raise UserError(
            f"{len(skipped):,} of {samples:,} samples cannot be used, such as {skipped[0]}; "
            f"repair the shards or raise data.max_bad_fraction ({max_fraction:g})"
        )
