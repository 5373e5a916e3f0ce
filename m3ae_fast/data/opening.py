"""Opening of all data of a run, with checks before the run starts."""

from __future__ import annotations

from dataclasses import dataclass

from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.tokenizer import CaptionTokenizer, check_tokenizer, load_tokenizer
from m3ae_fast.config import DataConfig, ModelConfig
from m3ae_fast.data.corpus import Corpus, open_corpus
from m3ae_fast.data.shard_store import ShardStore
from m3ae_fast.vqgan.model import VQGAN


@dataclass(frozen=True)
class Data:
    """The training and held-out samples, and their tokenizers."""

    train: Corpus
    val: Corpus | None
    tokenizer: CaptionTokenizer | None  # None for a model without text, or if `data.tokenizer` is not set
    image_tokenizer: VQGAN | None = None  # None if the image targets are not ids of an image tokenizer

    @property
    def shown(self) -> Corpus:
        """Return the dataset whose samples are shown in figures: the held-out samples if there are any, otherwise the
        training samples."""
        return self.val or self.train


def open_data(config: DataConfig, model: ModelConfig, *, progress: bool = False) -> Data:
    """Open the shards and tokenizers. Raises UserError if a file is missing or damaged, or does not fit the model."""
    store = ShardStore(config.cache_dir, config.cache_gb)
    train = open_corpus(config.train, store, progress=progress)
    val = open_corpus(config.val, store, progress=progress) if config.val else None
    for corpus in (train, val):
        if corpus:
            corpus.require(config.max_bad_fraction)
    if not model.vocab_size:
        for name, corpus in (("train", train), ("val", val)):
            for number, source in enumerate(corpus.sources if corpus else ()):
                if shard := source.shard_with_captions:
                    where = f"data.{name}.{number}"
                    raise UserError(f"model.vocab_size is 0, but {shard} has captions; set {where}.modality=image")
    if model.image_targets == "features" and not train.has_images:
        raise UserError(
            "data.train: no sample has an image, so the teacher would not be used; set model.image_targets=pixels and "
            "loss.teacher=null"
        )
    data = Data(train, val, open_tokenizer(config, model), open_image_tokenizer(config, model))
    check_tokenizer(data.tokenizer, train.has_captions or (val is not None and val.has_captions))
    return data


def open_tokenizer(config: DataConfig, model: ModelConfig) -> CaptionTokenizer | None:
    """Return the text tokenizer; None if the model has no text or no tokenizer is set. Raises UserError if the
    tokenizer does not fit the model."""
    if not model.vocab_size or not config.tokenizer:
        return None
    return load_tokenizer(config.tokenizer, model.text_length, model.vocab_size)


def open_image_tokenizer(config: DataConfig, model: ModelConfig) -> VQGAN | None:
    """Return the VQGAN; None if the image targets are not its ids. Raises UserError if the VQGAN is missing or does not
    fit the model."""
    if model.image_targets != "vqgan" or config.image_tokenizer is None:
        return None
    vqgan = VQGAN.from_pretrained(config.image_tokenizer)
    vqgan.check_fits(model.patch_size, model.codebook_size, f"data.image_tokenizer {config.image_tokenizer}")
    return vqgan
