"""Make and inspect shards, and train a tokenizer on their captions.

m3ae-fast shards make images/ --out shards/ --held-out 0.05
m3ae-fast shards table 'shards/*.tar'
m3ae-fast shards stats 'shards/*.tar' --write mine.json
m3ae-fast shards tokenizer 'shards/train-*.tar' --vocab-size 4096 --out tokenizer.json
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.cli.command_line import GROUP_HELP, add_columns, add_labels, command, program, seed
from m3ae_fast.config import add_range_option
from m3ae_fast.config.arguments import output
from m3ae_fast.shards.settings import Settings

OUT_HELP = "output folder: a new folder, or the folder of an interrupted command, which is then continued"
MAKE = """Make shards from a folder of images, an HDF5 file or a Hugging Face dataset.

  m3ae-fast shards make images/ --out shards/ --held-out 0.05
  m3ae-fast shards make images/ --out shards/ --captions captions.csv --caption-column title
  m3ae-fast shards make imagenet/val --out shards-val/ --classes shards/classes.json
  m3ae-fast shards make cc12m.hdf5 --out shards/ --held-out 0.01
  m3ae-fast shards make uoft-cs/cifar10 --out shards/
  m3ae-fast shards make saved/flickr30k --out shards/ --split train --caption-column caption

A folder of images: sub-folders called train, val (valid, validation, dev) or test are splits, and shards are written
for each of them. Other sub-folders, or the sub-folders of the splits, are classes if there are at least two of them and
every image is in one of them; class ids are the same in all splits. Captions come from a table with one row per sample,
or from NAME.txt next to NAME.jpg. An image that occurs in several rows, or in a row with a list of captions, becomes
one sample per caption, even if rows are identical. A row with too many or too few fields is an error. In a .tsv file,
each line is a row, and quotes are part of the text unless the file was written by a program that quotes fields. Images
without a caption are used only for the image loss.

An HDF5 file has the layout of the official M3AE code: jpg (variable-length uint8) and caption for image-text pairs;
train_jpg, train_labels, val_jpg and val_labels for ImageNet; or text for captions without images. A row with several
captions becomes one sample per caption.

A Hugging Face dataset is a folder written by save_to_disk, a folder of data files, or a name on the Hub. All splits
are converted unless --split is given. A row with a list of captions becomes one sample per caption.

--masks MASKS is a folder of label masks with the same sub-folders as SOURCE: the mask of SOURCE/a/b.jpg is
MASKS/a/b.png, with one channel of class ids.

To continue an interrupted command, run it again. The same input always produces identical shards.
"""
STATS = """Inspect some samples, and print statistics: image sizes, aspect ratios, formats, caption lengths, labels, the
mean and standard deviation of the pixels, and the number of unreadable samples. The settings derived from these
statistics are printed as well; --write also writes them into a config.

  m3ae-fast shards stats 'shards/train-*.tar' --tokenizer tokenizer.json
  m3ae-fast shards stats 'shards/train-*.tar' --out stats.png --write mine.json
"""
TABLE = """Print the number of samples of each kind in each shard, and write the missing indexes of the shards.

With --out, a manifest is written instead: a file with the number of samples in each shard. A config whose `shards` is
the manifest opens many remote shards without reading them.

  m3ae-fast shards table 'shards/*.tar'
  m3ae-fast shards table 's3://bucket/{00000..01242}.tar' --out cc12m.npy
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = program("shards", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands (each has its own --help)")
    _add_make(commands)
    common = argparse.ArgumentParser(add_help=False)
    help_text = "tar files: paths, brace patterns, globs, URLs or pipe: commands"
    common.add_argument("shards", nargs="+", metavar="SHARDS", help=help_text)
    cache = "folder for copies of remote shards (default: ~/.cache/m3ae_fast)"
    common.add_argument("--cache-dir", type=Path, help=cache)
    for add in (_add_table, _add_stats, _add_tokenizer):
        add(commands, common)
    args = parser.parse_args(argv)
    args.perform(args)
    return 0


def _add_make(commands: Any) -> None:
    summary = "make shards from a folder of images, an HDF5 file or a Hugging Face dataset"
    parser = command(commands, "make", summary, MAKE, _make)
    parser.add_argument("source", metavar="SOURCE", help="a folder, an HDF5 file, or the name of a dataset on the Hub")
    parser.add_argument("--out", type=output(), required=True, metavar="DIR", help=OUT_HELP)
    folder = parser.add_argument_group("options for a folder of images")
    text = "table of captions: .csv, .tsv, .jsonl or .parquet"
    folder.add_argument("--captions", type=Path, metavar="TABLE", help=text)
    folder.add_argument(
        "--classes", type=Path, metavar="FILE", help="classes.json of other shards, to assign the same label ids"
    )
    folder.add_argument("--flat", action="store_true", help="do not use sub-folders as splits or classes")
    text = (
        "folder of label masks: a single-channel NAME.png for NAME.jpg, in the same sub-folders (for evaluate segment)"
    )
    folder.add_argument("--masks", type=Path, metavar="FOLDER", help=text)
    dataset = parser.add_argument_group("options for a Hugging Face dataset")
    dataset.add_argument("--subset", metavar="NAME", help="configuration of the dataset, if it has several")
    dataset.add_argument("--split", metavar="NAME", help="split to convert (default: all)")
    columns = parser.add_argument_group("columns of a table or a dataset")
    add_columns(columns)
    text = "column of labels in a dataset (default: detected)"
    columns.add_argument("--label-column", metavar="NAME", help=text)
    _add_shard_settings(parser)


def _add_shard_settings(parser: argparse.ArgumentParser) -> None:
    shards, usual = parser.add_argument_group("shards"), Settings()
    numbers = {
        "--short-side": (
            usual.short_side,
            "scale the short side of images down to N pixels; smaller JPEGs are copied unchanged",
        ),
        "--samples-per-shard": (usual.samples_per_shard, "maximum number of samples per shard"),
        "--workers": (len(os.sched_getaffinity(0)), "number of worker processes"),
    }
    for option, (default, text) in numbers.items():
        shards.add_argument(option, type=int, metavar="N", default=default, help=f"{text} (default: {default})")
    add_range_option(shards)
    text = "fraction of the samples that are written to val-*.tar (default: 0)"
    shards.add_argument("--held-out", type=float, default=0.0, metavar="FRACTION", help=text)
    shards.add_argument("--group", metavar="FIELD", help=GROUP_HELP)
    text = "keep the order of SOURCE (default: shuffle the samples, always in the same way)"
    shards.add_argument("--keep-order", action="store_true", help=text)


def _make(args: argparse.Namespace) -> None:
    from m3ae_fast.shards.overview import parts_of, show
    from m3ae_fast.shards.sources.registry import open_source
    from m3ae_fast.shards.writer import convert, describe_conversion

    settings = Settings(
        args.samples_per_shard,
        args.short_side,
        held_out=args.held_out,
        group=args.group,
        value_range=args.value_range,
        keep_order=args.keep_order,
    )
    records = open_source(
        args.source,
        captions=args.captions,
        image_column=args.image_column,
        caption_column=args.caption_column,
        label_column=args.label_column,
        classes=args.classes,
        flat=args.flat,
        masks=args.masks,
        subset=args.subset,
        split=args.split,
    )
    held_out = ", val-*.tar" if args.held_out else ""
    show(args.source, parts_of(records, {split: f"{split}-*.tar{held_out}" for split in records.splits}))
    print("".join(f"note: {note}\n" for note in records.notes), end="", flush=True)
    print(describe_conversion(args.out, convert(records, args.out, settings, args.workers)))
    print("".join(f"{line}\n" for line in records.ignored.lines()), end="")


def _add_table(commands: Any, common: argparse.ArgumentParser) -> None:
    summary = "print the contents of shards, or write them to a manifest for runs with many shards"
    parser = command(commands, "table", summary, TABLE, _table, common)
    parser.add_argument("--out", type=output(".npy"), metavar="FILE.npy", help="write a manifest to this file")
    text = "read the counts from the NAME_stats.json files that img2dataset wrote"
    parser.add_argument("--stats", action="store_true", help=f"with --out: {text}")


def _table(args: argparse.Namespace) -> None:
    if args.stats and args.out is None:
        raise UserError("--stats can be used only with --out")
    from m3ae_fast.shards.shard_table import print_table, table

    found = table(args.shards, args.out, stats=args.stats, cache_dir=args.cache_dir)
    if args.out is None:
        print_table(found.indexed)
    print("".join(f"note: {note}\n" for note in found.notes), end="")
    if args.out is not None:
        counts = f"{len(found.rows):,} shards with {found.samples:,} samples"
        print(f"{args.out}: {counts}; {found.unread:,} shards unreadable")


def _add_stats(commands: Any, common: argparse.ArgumentParser) -> None:
    summary = "print statistics of the samples, and the settings derived from them"
    parser = command(commands, "stats", summary, STATS, _stats, common)
    parser.add_argument(
        "--samples", type=int, default=10_000, metavar="N", help="number of samples to inspect (default: 10000)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="random seed for choosing the samples (default: 0)")
    parser.add_argument(
        "--channels", type=int, default=3, metavar="C", help="number of image channels of the model (default: 3)"
    )
    dtypes = ("uint8", "uint16", "float32")
    parser.add_argument(
        "--dtype", choices=dtypes, default="uint8", help="model.image_dtype of the model (default: uint8)"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer used to measure caption lengths in tokens (default: in words)"
    )
    add_labels(parser)
    add_range_option(parser)
    parser.add_argument("--out", type=output(".png"), metavar="FILE.png", help="write a figure with histograms")
    parser.add_argument("--write", type=Path, metavar="CONFIG", help="config into which the settings are written")


def _stats(args: argparse.Namespace) -> None:
    from m3ae_fast.shards import statistics

    given = None if args.write is None else statistics.read_whole_config(args.write)
    found = statistics.stats(
        args.shards,
        samples=args.samples,
        seed=args.seed,
        channels=args.channels,
        dtype=args.dtype,
        value_range=args.value_range,
        tokenizer=args.tokenizer,
        labels=args.labels,
        cache_dir=args.cache_dir,
    )
    print(*statistics.describe_statistics(found), sep="\n")
    settings = statistics.settings_of(found)
    print(*statistics.options_of(settings), sep="\n")
    if args.out is not None:
        statistics.draw_statistics(args.out, found)
        print(f"wrote {args.out}")
    if given is not None:
        statistics.write_settings(args.write, given, settings)
        print(f"wrote these settings to {args.write}")


def _add_tokenizer(commands: Any, common: argparse.ArgumentParser) -> None:
    summary = "train an uncased WordPiece tokenizer on the captions"
    parser = command(commands, "tokenizer", summary, "", _tokenizer, common)
    text = "maximum number of tokens, including special tokens"
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help=text)
    parser.add_argument("--out", type=output(".json"), required=True, metavar="FILE.json", help="output file")


def _tokenizer(args: argparse.Namespace) -> None:
    from m3ae_fast.shards.tokenizer_training import describe_tokenizer, tokenizer

    trained = tokenizer(args.shards, args.out, vocab_size=args.vocab_size, cache_dir=args.cache_dir)
    print(*describe_tokenizer(trained, args.vocab_size), sep="\n")


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
