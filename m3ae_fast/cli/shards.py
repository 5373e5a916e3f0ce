"""Make and inspect shards, and train a tokenizer on their captions.

m3ae-fast shards make images/ --out shards/ --held-out 0.05
m3ae-fast shards table 'shards/*.tar'
m3ae-fast shards stats 'shards/*.tar' --write mine.json
m3ae-fast shards tokenizer 'shards/train-*.tar' --vocab-size 4096 --out tokenizer.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.base.wording import counted
from m3ae_fast.cli.command_line import checked, command, program, refuse
from m3ae_fast.config.arguments import Arguments, add_arguments
from m3ae_fast.shards.options import MakeOptions, StatsOptions, TableOptions, TokenizerOptions

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
    for name, (options, perform, summary, text) in _COMMANDS.items():
        add_arguments(command(commands, name, summary, text, perform), options)
    given = vars(parser.parse_args(argv))
    perform = given.pop("perform")
    perform(given)
    return 0


def _make(given: dict[str, Any]) -> None:
    options = checked(MakeOptions, given)
    from m3ae_fast.shards.making import convert_source
    from m3ae_fast.shards.overview import parts_of, show
    from m3ae_fast.shards.sources.registry import open_source
    from m3ae_fast.shards.writer import describe_conversion

    records = open_source(options.source, options)
    held_out = ", val-*.tar" if options.held_out else ""
    show(options.source, parts_of(records, {split: f"{split}-*.tar{held_out}" for split in records.splits}))
    print("".join(f"note: {note}\n" for note in records.notes), end="", flush=True)
    print(describe_conversion(options.out, convert_source(records, options)))
    print("".join(f"{line}\n" for line in records.ignored.lines()), end="")


def _table(given: dict[str, Any]) -> None:
    options = checked(TableOptions, given)
    if options.stats and options.out is None:
        refuse("--stats can be used only with --out")
    from m3ae_fast.shards.shard_table import print_table, table

    found = table(**dict(options))
    if options.out is None:
        print_table(found.indexed)
    print("".join(f"note: {note}\n" for note in found.notes), end="")
    if options.out is not None:
        counts = f"{counted(len(found.rows), 'shard')} with {counted(found.samples, 'sample')}"
        print(f"{options.out}: {counts}; {counted(found.unread, 'shard')} unreadable")


def _stats(given: dict[str, Any]) -> None:
    options = checked(StatsOptions, given)
    from m3ae_fast.shards import statistics

    found = statistics.stats(**dict(options))
    print(*statistics.describe_statistics(found), sep="\n")
    print(*statistics.options_of(statistics.settings_of(found)), sep="\n")
    if options.out is not None:
        print(f"wrote {options.out}")
    if options.write is not None:
        print(f"wrote these settings to {options.write}")


def _tokenizer(given: dict[str, Any]) -> None:
    options = checked(TokenizerOptions, given)
    from m3ae_fast.shards.tokenizer_training import describe_tokenizer, tokenizer

    print(*describe_tokenizer(tokenizer(**dict(options)), options.vocab_size), sep="\n")


_COMMANDS: dict[str, tuple[type[Arguments], Callable[[dict[str, Any]], None], str, str]] = {
    "make": (MakeOptions, _make, "make shards from a folder of images, an HDF5 file or a Hugging Face dataset", MAKE),
    "table": (
        TableOptions,
        _table,
        "print the contents of shards, or write them to a manifest for runs with many shards",
        TABLE,
    ),
    "stats": (StatsOptions, _stats, "print statistics of the samples, and the settings derived from them", STATS),
    "tokenizer": (TokenizerOptions, _tokenizer, "train an uncased WordPiece tokenizer on the captions", ""),
}

if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
