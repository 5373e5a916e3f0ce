"""Features of every sample of some shards, by the frozen encoder, unmasked, as a table.

m3ae-fast features runs/large 'imagenet/val-*.tar' --out val.parquet
m3ae-fast features out/ 'shards/*.tar' --out captions.npz --modality text --pool cls

FILE has the arrays or columns `keys` and `shards` [N], `features` float32 [N, D], `labels` [N] where any are found (-1
or "" for a sample without), with --patches `patches` float16 [N, L, D] (in parquet [N, L * D]; of a native model those
of an image with fewer patches end with zeros, and `grids` [N, 2] are their rows and columns), and what --columns
names: `path` and `class` from the samples' json, as from-folder writes it, and `caption`; "" where a sample has none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from m3ae_fast.base import object_store
from m3ae_fast.base.atomic_file import whole_file
from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.base.parquet import write_parquet
from m3ae_fast.cli.command_line import add_labels, add_settings, names_of, output, program
from m3ae_fast.config.evaluation import TransferConfig, transfer_config
from m3ae_fast.weights.model_name import MODEL_HELP

if TYPE_CHECKING:  # torch is imported by what needs it, not by --help
    from m3ae_fast.data import Corpus
    from m3ae_fast.data.labels import Label
    from m3ae_fast.process.ranks import Ranks

NPZ, PARQUET = ".npz", ".parquet"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = program("features", __doc__)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, brace patterns, globs, URLs")
    parser.add_argument(
        "--out", type=output(PARQUET, NPZ), required=True, metavar="FILE", help="a .parquet or .npz file to write"
    )
    parser.add_argument("--pool", choices=("mean", "cls"), help="mean over all tokens but cls (default), or cls itself")
    add_labels(parser)
    parser.add_argument(
        "--modality",
        choices=("image", "text", "paired"),
        default="image",
        help="what the encoder sees of a sample (default: image)",
    )
    parser.add_argument("--patches", action="store_true", help="also the features of all patches (large)")
    parser.add_argument(
        "--columns",
        type=names_of("column", [*COLUMNS]),
        default=[],
        metavar="NAME,NAME",
        help=f"also of each sample: {', '.join(COLUMNS)}",
    )
    add_settings(parser, "encode.batch=256")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from m3ae_fast.process.program import raise_once
    from m3ae_fast.process.ranks import join_ranks

    with join_ranks() as ranks:
        try:
            config = ranks.broadcast(lambda: _settings(args))
            ranks.on_main(lambda: _check_out(args.out))
            arrays = make_features(args, config, ranks)
            ranks.on_main(lambda: _write(args.out, arrays))
        except Exception as error:
            raise_once(error, ranks)
        if ranks.is_main:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            print(f"{args.out}: {shapes}")
    return 0


def _settings(args: argparse.Namespace) -> TransferConfig:
    given: dict = {"data": {"train": [{"shards": args.shards, "modality": args.modality}]}}
    if args.pool:
        given["encode"] = {"pool": args.pool}
    if args.patches and args.modality == "text":
        raise UserError("--patches: texts have none; choose another --modality")
    object_store.require(*args.shards)
    return transfer_config(given, args.set, ("features", ("encode",)))


def _check_out(out: Path) -> None:
    if out.exists():
        raise UserError(f"--out {out}: exists already; remove it or choose another name")


def make_features(args: argparse.Namespace, config: TransferConfig, ranks: Ranks) -> dict[str, np.ndarray]:
    """Return the arrays that FILE holds, on every rank. Raises UserError if model or shards cannot be used."""
    from m3ae_fast.base.hardware import keep_freed_memory
    from m3ae_fast.data import ShardStore, open_corpus
    from m3ae_fast.data.labels import read_labels
    from m3ae_fast.evaluation.encoding import encode_corpus
    from m3ae_fast.weights.open_model import open_model, set_images

    if ranks.device.type == "cpu":
        keep_freed_memory()
    model = open_model(args.model, text=args.modality != "image", tokenizer=config.data.tokenizer, seed=config.run.seed)
    set_images(model, config.data.range, config.encode.resize)
    model = model.to(ranks.device)
    store = ShardStore(config.data.cache_dir, config.data.cache_gb)
    corpus = ranks.main_first(lambda: open_corpus(config.data.train, store, progress=ranks.is_main))
    labels = read_labels(corpus, args.labels, progress=ranks.is_main)
    numbered = _number(corpus)
    found = encode_corpus(model, numbered, config.data, config.encode, ranks, patches=args.patches)
    numbers = found.labels.numpy()
    arrays = _names(corpus, numbers, found.keys) | {"features": found.features_ND.numpy()}
    everything = [label for own in labels for label in own]
    if any(label is not None for label in everything):
        arrays["labels"] = _label_array([everything[number] for number in numbers])
    if found.patches_NLD is not None:
        arrays["patches"] = found.patches_NLD.numpy()
        if model.config.resize == "native":
            arrays["grids"] = np.array(found.grids)
    return arrays | {name: np.array(COLUMNS[name](corpus, numbers), dtype=str) for name in args.columns}


def _field(name: str, corpus: Corpus, numbers: np.ndarray) -> list[str]:
    """Return a field of the json of these samples, "" of one without."""
    from m3ae_fast.data.labels import read_labels

    found = [value for own in read_labels(corpus, f"json.{name}", progress=True) for value in own]
    return ["" if found[number] is None else str(found[number]) for number in numbers]


def _captions(corpus: Corpus, numbers: np.ndarray) -> list[str]:
    """Return the captions of these samples, "" of one without."""
    from m3ae_fast.base.bad_samples import BadSample
    from m3ae_fast.base.progress import track
    from m3ae_fast.data.reader import Reader

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


COLUMNS: dict[str, Callable[[Any, np.ndarray], list[str]]] = {
    "path": partial(_field, "path"),
    "class": partial(_field, "class_name"),
    "caption": _captions,
}


def _number(corpus: Corpus) -> Corpus:
    """Return the corpus with each sample's number in place of its label: samples that cannot be read leave gaps."""
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
    """Write the arrays. Raises UserError if the disk refuses."""
    if out.suffix == PARQUET:
        return write_parquet(out, arrays)
    with whole_file(out) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
