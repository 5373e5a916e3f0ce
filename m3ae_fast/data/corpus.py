"""The dataset of a run: its sources and shards, counted before training starts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.s3_and_gs import require
from m3ae_fast.config import SourceConfig
from m3ae_fast.data.index import IndexedShard, Modality, index_shards
from m3ae_fast.data.manifest import UNREAD, CountedShards, cached, is_manifest, none_read, read, read_all
from m3ae_fast.data.shard_names import expand
from m3ae_fast.data.shard_store import ShardStore
from m3ae_fast.images.suffixes import listed_suffixes


@dataclass(frozen=True)
class Source:
    """A data source: its shards, and for each shard, which modality of its samples is used."""

    shards: Sequence[IndexedShard]
    modalities: list[Modality]
    weight: float | None
    loss_weight: float = 1.0
    labels: np.ndarray | None = None  # int64, labels of all samples in file order; see data.labels
    caption_fraction: float = 1.0  # fraction of the pairs whose captions are used; see data.reader
    image_sizes: np.ndarray | None = None  # int32 [samples, 2], height and width; see data.image_sizes

    @property
    def sizes(self) -> np.ndarray:
        """Return the number of samples in each shard, int64."""
        if isinstance(self.shards, CountedShards):
            return self.shards.sizes
        return np.array([shard.summary.samples for shard in self.shards], dtype=np.int64)

    @property
    def indexed(self) -> Sequence[IndexedShard]:
        """Return the shards that have an index; the result is empty for a manifest."""
        return () if isinstance(self.shards, CountedShards) else self.shards

    @property
    def has_images(self) -> bool:
        """Return whether a shard has images that are used for training."""
        shards = zip(self.shards, self.modalities)
        return any(shard.summary.images for shard, modality in shards if modality != "text")

    @property
    def has_captions(self) -> bool:
        """Return whether a shard has captions that are used for training."""
        return self.shard_with_captions is not None

    @property
    def shard_with_captions(self) -> str | None:
        """Return the first shard whose captions are used for training; None if there is none."""
        shards = zip(self.shards, self.modalities)
        return next((s.shard for s, modality in shards if modality != "image" and self._captions(s)), None)

    def _captions(self, shard: IndexedShard) -> int:
        """Return an upper bound on the number of captions that are used from a shard."""
        return shard.summary.captions - (0 if self.caption_fraction else shard.summary.paired)


@dataclass(frozen=True)
class Corpus:
    """A dataset: all sources of a run or of an evaluation."""

    sources: list[Source]
    store: ShardStore
    damaged: list[Skipped] = field(default_factory=list)  # incomplete, unreadable or empty shards
    # for each source: the number of unreadable shards and the number of all shards
    counted: list[tuple[int, int]] = field(default_factory=list)
    # if labels are ids of lists (see `label_lists`): whether each list contains each class, bool [lists, classes]
    lists: np.ndarray | None = None

    @property
    def samples(self) -> int:
        """Return the number of samples per epoch, including invalid samples."""
        return sum(int(source.sizes.sum()) for source in self.sources)

    def require(self, max_bad_fraction: float) -> None:
        """Raise UserError if more than the fraction `max_bad_fraction` of a source's shards cannot be read. The samples
        of these shards count as bad samples."""
        for lost, of in self.counted:
            if lost > max_bad_fraction * of:
                named = next(item for item in self.damaged if item.reason.startswith("cannot be read"))
                raise UserError(
                    f"{lost} of {of} shards cannot be read, for example {named}; "
                    f"repair them or raise data.max_bad_fraction ({max_bad_fraction:g})"
                )

    @property
    def ignored(self) -> str:
        """Return a summary of the ignored files in the shards, such as "12 .mp4, 3 .seg.png"; an empty string if there
        are none."""
        return describe_ignored([shard for source in self.sources for shard in source.indexed])

    @property
    def separated(self) -> tuple[int, str]:
        """Return the number of images that are not in one sample with their caption, because the two files are not
        adjacent in the tar. Also return the first shard with such an image. If there are none, the result is 0 and an
        empty string. Shards of manifests are not examined."""
        found = [(shard.separated(), shard.shard) for source in self.sources for shard in source.indexed]
        return sum(count for count, _ in found), next((shard for count, shard in found if count), "")

    def shared_with(self, other: Corpus) -> list[str]:
        """Return the shards that also occur in `other`, even if their paths are written differently. Shards of
        manifests are not compared."""
        own, theirs = (
            {os.path.realpath(shard.shard): shard.shard for source in corpus.sources for shard in source.indexed}
            for corpus in (self, other)
        )
        return sorted(own[path] for path in own.keys() & theirs)

    @property
    def sizes(self) -> list[np.ndarray]:
        """Return the number of samples in each shard, for each source: int64 [shards]."""
        return [source.sizes for source in self.sources]

    @property
    def weights(self) -> list[float] | None:
        """Return the weights of the sources; None if they are in proportion to the sizes of the sources."""
        given = [source.weight for source in self.sources if source.weight is not None]
        return given or None  # the config gives weights either to all sources or to none

    @property
    def has_images(self) -> bool:
        """Return whether a source has images that are used for training."""
        return any(source.has_images for source in self.sources)

    @property
    def has_captions(self) -> bool:
        """Return whether a source has captions that are used for training."""
        return any(source.has_captions for source in self.sources)


def open_corpus(sources: Sequence[SourceConfig], store: ShardStore, *, progress: bool = False) -> Corpus:
    """Return the dataset of these sources, with the number of samples in each shard. The numbers are read from a
    manifest or from the indexes of the shards, which are created if they are missing. `progress`: whether to show a
    progress bar. Raises UserError if a pattern matches nothing, no shard of a source can be read, a source contains no
    samples, or no sample of a source has the modality that the config sets."""
    corpus = Corpus([], store)
    for config in sources:
        names = [] if is_manifest(config.shards) else expand(config.shards)
        path = cached(names, store)
        if not names or path.exists():
            corpus.sources.append(_by_manifest(config, read(path) if names else read_all(config.shards), corpus))
            continue
        lost: list[Skipped] = []
        shards: Sequence[IndexedShard] = index_shards(names, store, progress, lost)
        corpus.damaged.extend(lost)
        corpus.counted.append((len(lost), len(lost) + len(shards)))
        for shard in shards:
            if shard.summary.damage:
                where = f" (its cached copy is {store.copy(shard.shard)})" if store.must_be_copied(shard.shard) else ""
                reason = f"the tar{where} {shard.summary.damage}; {shard.summary.samples} of its samples are used"
                corpus.damaged.append(Skipped(shard.shard, "", reason))
            elif not shard.summary.samples:
                others = describe_ignored([shard])
                reason = "contains no samples" + (f"; files in the shard: {others}" if others else "")
                corpus.damaged.append(Skipped(shard.shard, "", reason))
        if not shards:
            raise none_read(lost[0], len(lost))
        damage = next((f"; {shard.shard} {shard.summary.damage}" for shard in shards if shard.summary.damage), "")
        ignored = describe_ignored(shards)
        shards = [shard for shard in shards if shard.summary.samples]
        if not shards:
            kinds = f"image suffixes: {listed_suffixes()}; caption suffixes: txt, json"
            others = f"; files in the shards: {ignored}" if ignored else ""
            raise UserError(f"shards {config.shards!r}: contain no samples ({kinds}){others}{damage}")
        corpus.sources.append(_source(config, shards, [shard.summary.modality for shard in shards]))
    return corpus


def describe_ignored(shards: Sequence[IndexedShard]) -> str:
    """Return a summary of the ignored files by suffix, the most frequent first."""
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(shard.summary.ignored)
    return ", ".join(f"{count:,} .{suffix}" for suffix, count in counts.most_common())


def _by_manifest(config: SourceConfig, rows: np.ndarray, corpus: Corpus) -> Source:
    unread = rows["kind"] == UNREAD
    reason = "cannot be read, or could not be read when its manifest was created"
    corpus.damaged.extend(Skipped(name.decode(), "", reason) for name in rows["name"][unread])
    corpus.counted.append((int(unread.sum()), len(rows)))
    if not (rows := rows[rows["samples"] > 0] if (rows["samples"] == 0).any() else rows).size:
        raise UserError(f"shards {config.shards!r}: contain no samples")
    shards = CountedShards(rows, corpus.store)
    require(shards[0].shard)
    return _source(config, shards, shards.kinds)


def _source(config: SourceConfig, shards: Sequence[IndexedShard], kinds: list[Modality]) -> Source:
    """Return a source with these shards. `kinds`: the modality of each shard. Raises UserError if no sample has the
    modality that the config sets."""
    modalities = kinds if config.modality == "auto" else [config.modality] * len(shards)
    if not any(_holds(shard, modality) for shard, modality in zip(shards, modalities)):
        raise UserError(
            f"shards {config.shards!r}: no sample has the modality {config.modality!r}; set another modality"
        )
    if config.caption_fraction < 1 and not any(_holds(shard, "paired") for shard in shards):
        raise UserError(f"shards {config.shards!r}: contain no pairs, so caption_fraction has no effect; remove it")
    return Source(shards, modalities, config.weight, config.loss_weight, caption_fraction=config.caption_fraction)


def _holds(shard: IndexedShard, modality: Modality) -> bool:
    found = shard.summary
    return {"any": found.samples, "paired": found.paired, "image": found.images, "text": found.captions}[modality] > 0
