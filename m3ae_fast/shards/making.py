"""Creation of shards from a folder of images, an HDF5 file or a Hugging Face dataset."""

from __future__ import annotations

import os
from typing import Any

from m3ae_fast.config.arguments import accepts
from m3ae_fast.shards.options import MakeOptions, ShardOptions
from m3ae_fast.shards.sources.interface import Records
from m3ae_fast.shards.sources.registry import open_source
from m3ae_fast.shards.writer import Converted, Settings, convert


@accepts(MakeOptions)
def make(source: str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> Converted:
    """Create shards from a source, and return counts of the result. The same source and arguments produce
    byte-identical shards. To resume an interrupted call, repeat it.

    Args:
        source: a folder of images, an HDF5 file in the layout of the official code, or a Hugging Face dataset, which is
            a folder written by `save_to_disk`, a folder of data files, or a name on the Hub.
        out: output folder: a new folder, or the folder of a call with the same arguments.
        options: the options of the command, such as `held_out=0.1`: the fields of `options.MakeOptions`.

    Raises:
        UserError: the source or an argument is invalid, or `out` contains other files or cannot be written.
    """
    given = MakeOptions(source=source, out=out, **options)
    return convert_source(open_source(given.source, given), given)


def convert_source(records: Records, options: MakeOptions) -> Converted:
    """Create shards as `make` does, from the records of the source."""
    settings = Settings(**{name: getattr(options, name) for name in ShardOptions.model_fields})
    return convert(records, options.out, settings, options.workers or len(os.sched_getaffinity(0)))
