"""Features of shards or of image files, as arrays or as a table.

Shapes: N samples, L patches, D encoder width.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.utils.data import Dataset

from m3ae_fast.base import s3_and_gs
from m3ae_fast.base.atomic_file import atomic_write, require_writable
from m3ae_fast.base.bad_samples import BadSample, Skipped
from m3ae_fast.base.errors import ErrorElsewhere, UserError
from m3ae_fast.base.hardware import keep_freed_memory, pins_memory
from m3ae_fast.base.parquet import write_parquet
from m3ae_fast.base.progress import track
from m3ae_fast.batch.inputs import unmasked_sample
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.batch.packing import Sample
from m3ae_fast.config import ModelConfig
from m3ae_fast.config.arguments import accepts
from m3ae_fast.config.evaluation import EncodeConfig, EvaluationConfig, Uses, evaluation_config
from m3ae_fast.data import Corpus, ShardStore, Share, open_corpus
from m3ae_fast.data.labels import Label, read_labels
from m3ae_fast.data.loader import collate
from m3ae_fast.data.rank_share import MicroBatches
from m3ae_fast.data.reader import Reader
from m3ae_fast.embedding.embed_options import Column, EmbedOptions
from m3ae_fast.evaluation.image_features import input_config, input_of_files
from m3ae_fast.evaluation.library_features import open_fixed_features
from m3ae_fast.evaluation.model_images import set_images
from m3ae_fast.heads.encoding import Batches, corpus_batches, encode_types
from m3ae_fast.heads.feature_bank import FeatureBank, FeatureType
from m3ae_fast.images.suffixes import is_image, listed_suffixes
from m3ae_fast.model.encoder import MultimodalEncoder
from m3ae_fast.process.how_to_resume import AGAIN, effect_of_resuming, resumed_by
from m3ae_fast.process.ranks import Ranks
from m3ae_fast.process.session import joined_program
from m3ae_fast.process.workers import Loader, allow_open_files, default_workers, start_worker
from m3ae_fast.weights.open_model import open_model

_log = logging.getLogger(__name__)
PARQUET, NPZ = ".parquet", ".npz"
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@accepts(EmbedOptions)
def embed(model: str | os.PathLike[str] | MultimodalEncoder, source: Source, **options: Any) -> dict[str, np.ndarray]:
    """Return the features of all samples of a source, on every rank. The frozen encoder computes them without masking.

    Args:
        model: a model, or the name of a model (see `EmbedOptions.model`). A model that is passed as an object keeps
            its own settings of images and its own tokenizer, and is moved back to its device at the end.
        source: shards (paths, brace patterns, globs, URLs), a folder of images or of shards, or a list of image files.
        options: the options of the command, such as `modality="text"`: the fields of `embed_options.EmbedOptions`.
            Without `out`, no file is written. Settings of the sections encode, data and run can be overridden.

    Returns:
        Arrays by name. Samples that cannot be read are left out, with a warning.
            `keys` [N]: keys of the samples; for image files, their paths, relative to the folder if `source` is one.
            `shards` [N]: the shard of each sample, if `source` consists of shards.
            `features`: float32 [N, D].
            `labels` [N]: if there are any; -1 or "" for a sample without a label.
            `patches`: float16 [N, L, D], with the option `patches`.
            `grids` [N, 2]: numbers of rows and columns of patches, with the option `patches`, for native aspect ratio.
            The `columns`: text, "" for a sample without a value.

    Raises:
        UserError: the model, the source or an option cannot be used, or `out` exists.
    """
    given = EmbedOptions(model=model, source=source, **options)
    if not isinstance(given.model, str | MultimodalEncoder):
        raise UserError(f"model: must be a name, a path or a model, not {type(model).__name__}")
    with resumed_by(AGAIN, "starts over"), joined_program(given.device) as session:
        session.stop.advice = effect_of_resuming()
        ranks = session.ranks
        ranks.require_same({name: value for name, value in given if not isinstance(value, MultimodalEncoder)})
        images = ranks.broadcast(lambda: _image_files(given.source))
        config = ranks.broadcast(lambda: _settings(given, images))
        ranks.on_main(lambda: _check_out(given.out))
        with _on_device(given, config, ranks, images) as opened:
            arrays = _arrays(opened, config, ranks, images, given)
        if (out := given.out) is not None:
            ranks.on_main(lambda: _write(out, arrays))
        return arrays
    stopped = ErrorElsewhere("stopped on another rank")
    stopped.exit_code = 0
    raise stopped


def _image_files(names: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the folder of the images ("" if the source is a list of files) and their paths; None if the source
    consists of shards. Raises UserError if a folder contains neither images nor shards."""
    if len(names) == 1 and os.path.isdir(names[0]):
        folder = names[0]
        if _tars(folder):
            return None
        images = images_in(folder)
        if not images:
            raise UserError(f"{folder}: has neither images ({listed_suffixes()}) nor .tar shards")
        return folder, [os.path.relpath(path, folder) for path in images]
    return ("", [*names]) if all(map(is_image, names)) else None


def images_in(folder: str) -> list[str]:
    """Return the paths of the image files in a folder and its sub-folders, in alphabetical order."""
    found = [os.path.join(place, name) for place, _, files in os.walk(folder) for name in files]
    return sorted(path for path in found if is_image(path))


def _tars(folder: str) -> list[str]:
    return sorted(map(str, Path(folder).glob("*.tar")))


def _settings(options: EmbedOptions, images: tuple[str, list[str]] | None) -> EvaluationConfig:
    """Return the settings. Raises UserError if they or the options do not fit the source."""
    modality, names = options.modality, list(options.source)
    if images and (modality != "image" or options.columns):
        argument = "columns" if options.columns else f"modality {modality}"
        raise UserError(f"{argument}: images that are not in shards have neither captions nor columns; leave it out")
    shards = _tars(names[0]) if len(names) == 1 and os.path.isdir(names[0]) else names
    s3_and_gs.require(*shards)
    given: dict = {"data": {"train": [{"shards": shards, "modality": modality}]}}
    config = evaluation_config(given, options.all_overrides, "embed", Uses())
    if options.has_one_vector and config.encode.pool:
        raise UserError(f"override encode.pool: {options.model} has one vector for each image; leave it out")
    return config


def _check_out(out: Path | None) -> None:
    if out is None:
        return
    if out.exists():
        raise UserError(f"out {out}: already exists; remove it or choose another name")
    require_writable(out)


@contextmanager
def _on_device(
    options: EmbedOptions, config: EvaluationConfig, ranks: Ranks, images: tuple[str, list[str]] | None
) -> Iterator[MultimodalEncoder]:
    """Yield the model on the device, as a context manager. A model that was passed as an object is moved back at the
    end. `images`: see `_image_files`."""
    model = options.model
    if isinstance(model, MultimodalEncoder):
        before = next(model.parameters()).device
        try:
            yield model.to(ranks.device)
        finally:
            model.to(before)
        return
    opened: MultimodalEncoder
    if options.has_one_vector:
        reading = ranks.broadcast(lambda: _reading(config, images))
        opened = ranks.main_first(lambda: open_fixed_features(model, reading))
    else:
        text, tokenizer = options.modality != "image", config.data.tokenizer
        opened = open_model(model, text=text, tokenizer=tokenizer, seed=config.run.seed)
    set_images(opened, config.model)
    yield opened.to(ranks.device).eval()


def _reading(config: EvaluationConfig, images: tuple[str, list[str]] | None) -> ModelConfig:
    """Return the input of a model that is not an M3AE: the channels, the value range, the mean and the standard
    deviation of some images of the source. `images`: see `_image_files`. Raises UserError if the shards cannot be
    opened."""
    if images is None:
        return input_config(config.data)
    folder, names = images
    return input_of_files([os.path.join(folder, name) for name in names])


def _arrays(
    model: MultimodalEncoder,
    config: EvaluationConfig,
    ranks: Ranks,
    images: tuple[str, list[str]] | None,
    options: EmbedOptions,
) -> dict[str, np.ndarray]:
    if ranks.device.type == "cpu":
        keep_freed_memory()
    encode = config.encode.of_model(model.config, texts=options.modality != "image")
    config = config.model_copy(update={"encode": encode})
    if images:
        batches = _file_batches(model, *images, config, ranks)
        found, table = _encoded(model, batches, encode, ranks, options.patches)
        return {"keys": np.array(found.keys, dtype=str)} | table
    store = ShardStore(config.data.cache_dir, config.data.cache_gb)
    corpus = ranks.main_first(lambda: open_corpus(config.data.train, store, progress=ranks.is_main))
    known = read_labels(corpus, options.labels, progress=ranks.is_main)
    batches = corpus_batches(model, _number(corpus), config.data, encode, ranks)
    found, table = _encoded(model, batches, encode, ranks, options.patches)
    numbers = found.labels.numpy()
    arrays = _names(corpus, numbers, found.keys)
    arrays["features"] = table.pop("features")
    everything = [label for own in known for label in own]
    if any(label is not None for label in everything):
        arrays["labels"] = _label_array([everything[number] for number in numbers])
    return arrays | table | {name: np.array(COLUMNS[name](corpus, numbers), dtype=str) for name in options.columns}


def _encoded(
    model: MultimodalEncoder, batches: Batches, encode: EncodeConfig, ranks: Ranks, patches: bool
) -> tuple[FeatureBank, dict[str, np.ndarray]]:
    """Return the pooled features of all samples, and the arrays of features of the result."""
    kind, tokens = (FeatureType(model.config.depth, pool) for pool in (encode.fixed_pool, None))
    (bank,) = encode_types([model], [[kind, tokens] if patches else [kind]], batches, encode, ranks)
    if ranks.is_main and (skipped := bank.skipped):
        _log.warning("%d of %d samples are left out, for example %s", len(skipped), batches.samples, skipped[0])
    found = bank.of(kind).gathered()
    arrays = {"features": found.features_RD.numpy()}
    if patches:
        arrays["patches"] = bank.of(tokens).gathered().features_RD.numpy()
        if model.config.resize == "native":
            arrays["grids"] = np.array(found.grids)
    return found, arrays


class _ImageFiles(Dataset[Sample | Skipped]):
    """A dataset of image files; an image that cannot be read is returned as Skipped."""

    def __init__(self, folder: str, names: Sequence[str], config: ModelConfig) -> None:
        self.folder, self.names, self.config = folder, names, config

    def __getitem__(self, number: int) -> Sample | Skipped:
        name = self.names[number]
        path = os.path.join(self.folder, name)
        try:
            sample = unmasked_sample(number, path, None, self.config, None)
        except (UserError, ValueError) as error:
            return Skipped(self.folder, name, str(error).removeprefix(f"{path}: "))
        return replace(sample, key=name)


def _file_batches(
    model: MultimodalEncoder, folder: str, names: Sequence[str], config: EvaluationConfig, ranks: Ranks
) -> Batches:
    """Return this rank's batches of image files, in order."""
    data, share = config.data, Share(config.encode.batch * ranks.world, rank=ranks.rank, world=ranks.world)
    steps = range(-(-len(names) // share.global_batch))
    workers = default_workers() if data.workers is None else data.workers
    allow_open_files()
    loader = Loader(
        cast("Dataset[PackedBatch]", _ImageFiles(folder, names, model.config)),  # `collate` returns batches
        batch_sampler=MicroBatches(steps, share, end=len(names)),
        num_workers=min(workers, len(steps)),
        collate_fn=partial(collate, geometry=model.geometry, model=None),
        pin_memory=pins_memory(ranks.device),
        worker_init_fn=start_worker,
    )
    return Batches(loader, len(names), data.max_bad_fraction)


def _field(name: str, corpus: Corpus, numbers: np.ndarray) -> list[str]:
    """Return the value of a json field for the samples with these numbers; "" for a sample without the field."""
    found = [value for own in read_labels(corpus, f"json.{name}", progress=True) for value in own]
    return ["" if found[number] is None else str(found[number]) for number in numbers]


def _captions(corpus: Corpus, numbers: np.ndarray) -> list[str]:
    """Return the captions of the samples with these numbers; "" for a sample without a caption."""
    sources = [replace(s, modalities=["text"] * len(s.shards), caption_fraction=1.0) for s in corpus.sources]
    readers = [(Reader(source, corpus.store), int(source.sizes.sum())) for source in sources]
    places = [(reader, number) for reader, samples in readers for number in range(samples)]
    captions = []
    for reader, number in track([places[number] for number in numbers], "reading captions"):
        try:
            captions.append(reader.read(*reader.find(number)).caption or "")
        except BadSample:
            captions.append("")
    return captions


COLUMNS: dict[Column, Callable[[Any, np.ndarray], list[str]]] = {
    "path": partial(_field, "path"),
    "class": partial(_field, "class_name"),
    "caption": _captions,
}


def _number(corpus: Corpus) -> Corpus:
    """Return the dataset with each sample's number as its label, so that samples can be identified although unreadable
    ones are left out."""
    starts = np.cumsum([0, *(sum(source.sizes) for source in corpus.sources)])
    sources = [replace(s, labels=np.arange(sum(s.sizes)) + start) for s, start in zip(corpus.sources, starts)]
    return replace(corpus, sources=sources)


def _names(corpus: Corpus, numbers: np.ndarray, keys: list[str]) -> dict[str, np.ndarray]:
    shards = [shard for source in corpus.sources for shard in source.shards]
    names = np.repeat([shard.shard for shard in shards], [shard.summary.samples for shard in shards])[numbers]
    bare = [key.removeprefix(f"{name}/") for key, name in zip(keys, names)]
    return {"keys": np.array(bare, dtype=str), "shards": names}


def _label_array(labels: list[Label | None]) -> np.ndarray:
    if any(isinstance(label, str) for label in labels):
        return np.array(["" if label is None else str(label) for label in labels])
    return np.array([-1 if label is None else label for label in labels], dtype=np.int64)


def _write(out: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays to a .parquet or .npz file. Raises UserError if that fails."""
    if out.suffix == PARQUET:
        return write_parquet(out, arrays)
    with atomic_write(out) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
