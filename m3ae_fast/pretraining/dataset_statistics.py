"""Statistics of a run's samples on which the automatic settings depend."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.tokenizer import CaptionTokenizer, load_tokenizer, train_tokenizer
from m3ae_fast.config import ModelConfig, Range, SourceConfig
from m3ae_fast.data.corpus import Corpus, open_corpus
from m3ae_fast.data.labels import class_names, label_corpus
from m3ae_fast.data.shard_store import ShardStore
from m3ae_fast.images.image_kind import channels_and_dtype
from m3ae_fast.pretraining.automatic_settings import (
    TOKENIZER,
    DatasetStatistics,
    Shards,
    channels_set,
    continues,
    set_to,
)
from m3ae_fast.pretraining.image_settings import fit_to_images, range_of
from m3ae_fast.shards.overview import describe_classes, part_of, show
from m3ae_fast.shards.problem_counts import Tally
from m3ae_fast.shards.statistics import SMALLEST_STD, collect, require_images
from m3ae_fast.shards.tokenizer_training import caption_texts, save_tokenizer

_INSPECTED = 2000  # number of samples that are inspected
_KINDS = 256  # number of samples whose images determine the channels and the dtype of the model
_CAPTIONS = 200_000  # maximum number of captions from which a vocabulary is learnt
_LONGEST = 1 << 16  # maximum length of a caption in tokens
_VOCABULARY = (512, 16384)  # minimum and maximum size of a vocabulary that is learnt
_NAMED = 3  # maximum number of damaged shards that are listed in notes
_QUANTILE = 0.95  # fraction of the captions that are not truncated


def inspect(
    shards: Shards,
    out: Path,
    labels: str,
    value_range: Range | None = None,
    overrides: Sequence[str] = (),
    *,
    start: ModelConfig | None = None,
    own: Sequence[str] = (),
) -> tuple[DatasetStatistics, list[str]]:
    """Return statistics of the samples, and notes for the user. Values that the overrides set replace those of the
    samples. If there are captions and the overrides do not set a tokenizer or exclude text, a tokenizer is trained and
    written to the run folder. An overview of the samples is printed.

    Args:
        shards: the shards.
        out: the run folder.
        labels: source of the labels.
        value_range: values of black and white in images with more than 8 bits per channel; None: detected.
        overrides: overrides "section.key=value": first those of the weights from which the run starts, then those of
            the user.
        start: the config of these weights; None: random weights.
        own: the user's overrides alone; used only if `start` is given.

    Raises:
        UserError: the shards cannot be used, no sample has an image, the value range of images with more than 8 bits
            per channel cannot be detected, the tokenizer of the weights from which the run starts is missing, or
            `labels` (other than "cls") or an override does not fit the samples.
    """
    store = ShardStore()
    train = open_corpus([SourceConfig(shards=shards.train)], store, progress=True)
    if not train.has_images:
        raise UserError(f"none of the {train.samples:,} training samples has an image, and pretrain needs images")
    val = open_corpus([SourceConfig(shards=shards.val)], store, progress=True) if shards.val else None
    classes, note = _classes(shards, store, labels)
    notes = [note] if note else []
    seen = part_of(train, "train", "trained on", classes.train, _KINDS)
    if not shards.shown:
        parts = [seen] if val is None else [seen, part_of(val, "val", "held out", classes.val)]
        show("the dataset", parts)
    elif labels != "cls" and classes.train:
        print(f"classes by {labels}: {describe_classes(classes.train)}", flush=True)
    channels, dtype = channels_and_dtype(seen.kinds)
    channels, dtype = channels_set(overrides) or channels, set_to(overrides, "model.image_dtype", dtype)
    value_range = value_range or shards.value_range or (start and start.value_range) or range_of(seen.kinds)
    fitted: list[str] = []
    if start is not None:
        fitted, more = fit_to_images(start, seen.kinds, value_range, own)
        notes += more
        channels = channels_set([*fitted, *own]) or start.channels
        dtype = set_to([*fitted, *own], "model.image_dtype", start.image_dtype)
    notes += _on_given_weights(train.has_captions, overrides)
    tokenizer = _tokenizer(shards, train, store, out, overrides)
    found = collect(train, _INSPECTED, 0, channels, value_range, tokenizer, None, dtype)
    require_images(found)
    if found.bad:
        reason = found.bad.most_common(1)[0][0]
        notes.append(f"{found.bad.total():,} of {found.seen:,} inspected samples cannot be used: {reason}")
    damaged = train.damaged + (val.damaged if val else [])
    notes += [str(shard) for shard in damaged[:_NAMED]]
    if len(damaged) > _NAMED:
        notes.append(f"further damaged or unreadable shards: {len(damaged) - _NAMED:,}")
    mean, std = found.mean_and_std()
    if channels == 4 and std[3] <= SMALLEST_STD:
        notes.append("all inspected images are opaque, as in all shards that pretrain makes")
    if start is not None and channels != start.channels:
        fitted += [f"model.image_mean={json.dumps(mean)}", f"model.image_std={json.dumps(std)}"]
    lengths = found.lengths or [1]
    return DatasetStatistics(
        train.samples,
        val.samples if val else 0,
        int(np.median(np.array(found.sizes).min(1))),
        mean,
        std,
        classes.number,
        tokenizer.vocab_size if tokenizer else 0,
        int(np.clip(8 * np.ceil(np.quantile(lengths, _QUANTILE) / 8), 8, 64)),
        dtype,
        value_range,
        train.has_captions,
        tuple(fitted),
    ), notes


def _on_given_weights(has_captions: bool, overrides: Sequence[str]) -> list[str]:
    """Return notes about text for a run that starts from given weights. There is one note if the weights include text
    and the samples do not, or the reverse, and none otherwise. Raises UserError if weights and samples include text,
    but the tokenizer of the weights is missing."""
    vocab_size = set_to(overrides, "model.vocab_size", None)
    if not continues(overrides) or vocab_size is None:
        return []
    if not has_captions:
        text = "there are no captions: the weights for text are kept, but they are not trained"
        return [text] if vocab_size else []
    if not vocab_size:
        return ["the captions are ignored, because the initial weights are those of an image-only model"]
    if set_to(overrides, "data.tokenizer", "") is None:
        raise UserError(
            "--from: the samples have captions, but the tokenizer of the weights is missing; specify it with "
            "--set data.tokenizer=FILE"
        )
    return []


def _tokenizer(
    shards: Shards, train: Corpus, store: ShardStore, out: Path, overrides: Sequence[str]
) -> CaptionTokenizer | None:
    """Return the tokenizer that is set in the overrides or, if none is set, a tokenizer that is trained on the
    captions. Return None if there are no captions, or if the overrides exclude text."""
    size, own = set_to(overrides, "model.vocab_size", None), set_to(overrides, "data.tokenizer", "")
    if not train.has_captions or size == 0 or own is None:
        return None
    if own:
        return load_tokenizer(str(own), _LONGEST)
    texts = list(caption_texts(shards.train, store, Tally(), _CAPTIONS))
    fitting = int(np.clip(2 ** round(np.log2(max(len(texts), 1))), *_VOCABULARY))
    learnt = train_tokenizer(texts, size or fitting)
    found = CaptionTokenizer(learnt, _LONGEST)
    if size and found.vocab_size != size:
        raise UserError(
            f"override model.vocab_size={size}: the captions yield a vocabulary of {found.vocab_size} tokens; set "
            "this size, or leave out the option"
        )
    save_tokenizer(learnt, out / TOKENIZER)
    return found


class _Classes(NamedTuple):
    """The classes of the samples."""

    number: int  # 0: the labels cannot be used
    train: Counter[str] | None = None  # number of training samples by class name
    val: Counter[str] | None = None  # number of held-out samples by class name


def _classes(shards: Shards, store: ShardStore, labels: str) -> tuple[_Classes, str]:
    """Return the classes, and the reason why the labels cannot be used ("" if they can). Raises UserError if the user
    has set `labels`, but the labels cannot be used."""
    if not shards.val:
        return _Classes(0), ""
    none = "k-NN accuracy and logistic regression are not computed"
    if shards.unlabelled and labels == "cls":
        return _Classes(0), f"{none}: {shards.unlabelled}"
    try:
        train, val = (
            open_corpus([SourceConfig(shards=part, modality="image")], store) for part in (shards.train, shards.val)
        )
        train, classes = label_corpus(train, labels)
        val, _ = label_corpus(val, labels, classes)
    except UserError as error:
        if labels != "cls":  # the user has set `labels`, so a run without evaluation would be unexpected
            raise UserError(f"--labels {labels}: {error}") from None
        return _Classes(0), f"{none}: {error}"
    names = class_names(train, classes)
    return _Classes(len(classes), *(_counts(corpus, names) for corpus in (train, val))), ""


def _counts(corpus: Corpus, names: list[str]) -> Counter[str]:
    """Return the number of samples of each class in a labelled dataset, by class name."""
    found: Counter[str] = Counter()
    for source in corpus.sources:
        assert source.labels is not None
        for number, count in enumerate(np.bincount(source.labels).tolist()):
            if count:
                found[names[number]] += count
    return found
