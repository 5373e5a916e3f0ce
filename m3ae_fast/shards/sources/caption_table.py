"""Caption tables, and the samples that follow from them. A row contains the name of an image in a folder, its caption
and other fields.

Each row becomes one sample or, if it contains a list of captions, one sample per caption. Equal rows are not merged. A
row with more or fewer fields than the table has columns is an error. All columns except those of images and captions
become fields of the sample's json. A table without captions must have at least one column besides that of the images.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.wording import counted
from m3ae_fast.data.index import printable
from m3ae_fast.shards.sources.columns import (
    CAPTION_COLUMNS,
    CAPTION_OPTION,
    IMAGE_COLUMNS,
    IMAGE_OPTION,
    NO_CAPTIONS,
    choose_column,
)
from m3ae_fast.shards.sources.interface import captions_of
from m3ae_fast.shards.sources.table_rows import ABSENT, READERS

_SHOWN = 3  # missing images that are named
_INSPECTED = 1000  # rows that are inspected for the names of fields
_MISSING = ("nan", "null", "none", "n/a")  # texts with which other programs write missing values


class ImagesMissing(UserError):
    """Raised if at least half of the rows of a table name images that are not in the folder. `has_captions`: whether
    the table has captions."""

    def __init__(self, message: str, has_captions: bool = True) -> None:
        super().__init__(message)
        self.has_captions = has_captions


class TableSample(NamedTuple):
    """A sample's caption and fields from a table."""

    caption: str | None = None
    fields: str = ""  # JSON object


class Row(NamedTuple):
    """A row of a caption table."""

    number: int  # number of the row from 1, not counting the row of column names
    image: str
    captions: list[str] | None  # empty: the row has no caption; None: the table has no captions
    fields: str  # JSON object with the values of other columns; "" if there are none


def read_captions(table: Path, image: str | None = None, caption: str | None = None) -> list[Row]:
    """Return all rows of a .csv, .tsv, .jsonl (or .ndjson) or .parquet file. `image` and `caption`: names of columns;
    None: the first column with a usual name. If `caption` is NO_CAPTIONS, the rows have no captions.

    Raises:
        NoColumns: no column has a usual name.
        UserError: the file cannot be read, a named column is missing, two columns have the same name, or a row does not
            fit the columns.
    """
    reader = READERS.get(table.suffix.lower())
    if reader is None:
        raise UserError(f"--captions {table}: must be a .csv, .tsv, .jsonl or .parquet file")
    found: list[Row] = []
    try:
        with closing(reader(table)) as rows:
            columns = next(rows, [])
            images = choose_column(columns, image, IMAGE_COLUMNS, IMAGE_OPTION, str(table))
            place = None
            if caption != NO_CAPTIONS or len(columns) < 2:
                captions = choose_column(columns, caption or None, CAPTION_COLUMNS, CAPTION_OPTION, str(table))
                place = columns.index(captions)
            if twice := next((name for name in columns if name and columns.count(name) > 1), None):
                raise UserError(f"--captions {table}: has several columns {twice}; rename or remove all but one")
            for row in rows:
                found.append(_row(len(found) + 1, columns, row, columns.index(images), place))
    except OSError as error:
        raise UserError(f"--captions {table}: cannot be read ({error.strerror or error})") from None
    except (ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"--captions {table}: row {len(found) + 1} cannot be read ({reason})") from None
    if not found:
        raise UserError(f"--captions {table}: has no rows")
    return found


def samples_of_images(
    table: Path, columns: tuple[str | None, str | None], folder: Path, paths: Sequence[str], has_splits: bool
) -> tuple[list[list[TableSample]], bool, list[str]]:
    """Return three values: the samples of each image according to a caption table; whether the table has captions; and
    notes for the user. An image that is not in the table has one sample without a caption.

    Args:
        table, columns: as in `read_captions`. `columns` contains the names of the column of images and of the column of
            captions.
        folder: the folder of the images. Names of images in the table are absolute, or relative to this folder.
        paths: the images, relative to the folder.
        has_splits: whether the folder has several splits.

    Raises:
        UserError: the table cannot be used; see `read_captions`.
        ImagesMissing: at least half of the rows name images that are not in the folder.
    """
    rows = read_captions(table, *columns)
    has_captions = rows[0].captions is not None
    if has_captions and not any(text.strip() for row in rows for text in row.captions or ()):
        raise UserError(
            f"--captions {table}: all captions are empty; specify the column of captions with {CAPTION_OPTION}, or "
            f"add {CAPTION_OPTION} '' to read only fields"
        )
    samples, notes = _join(folder, paths, table, rows)
    if missing := [text for row in rows for text in row.captions or () if text.strip().lower() in _MISSING]:
        notes.append(
            f"{table}: texts such as {missing[0].strip()!r} are used as captions ({len(missing):,} times); if they are "
            "missing values, leave these fields empty"
        )
    fields = {name: None for row in rows[:_INSPECTED] if row.fields for name in json.loads(row.fields)}
    if (name := next((each for each in fields if each.lower() == "split"), "")) and not has_splits:
        notes.append(f"the column {name} of {table} is not used: only sub-folders, such as train and val, are splits")
    if fields:
        notes.append(f"fields of {table} for --labels: {', '.join(f'json.{printable(name)}' for name in fields)}")
    return samples, has_captions, notes


def _join(
    folder: Path, paths: Sequence[str], table: Path, rows: Sequence[Row]
) -> tuple[list[list[TableSample]], list[str]]:
    """Return the samples of each image, and a list with a note about the rows whose image does not exist, if there are
    any. Each caption of each row of the table is a sample. Raises ImagesMissing if the images of at least half of the
    rows do not exist."""
    samples: dict[str, list[TableSample]] = {path: [] for path in paths}
    missing = []
    for row in rows:
        path = os.path.normpath(os.path.relpath(row.image, folder) if os.path.isabs(row.image) else row.image)
        if path in samples:
            samples[path] += [TableSample(caption, row.fields) for caption in row.captions or [""]]
        else:
            missing.append(row)
    found = [samples[path] or [TableSample()] for path in paths]
    if not missing:
        return found, []
    more = ", such as" if len(missing) > _SHOWN else ":"
    examples = ", ".join(f"{row.image!r} (row {row.number})" for row in missing[:_SHOWN])
    about = f"{len(missing):,} of {len(rows):,} rows refer to images that are not in {folder}{more} {examples}"
    if 2 * len(missing) >= len(rows):
        raise ImagesMissing(
            f"--captions {table}: {about}; paths are relative to that folder", rows[0].captions is not None
        )
    return found, [f"{table}: left out, because {about}"]


def _row(number: int, columns: Sequence[str], row: Sequence[Any], image: int, caption: int | None) -> Row:
    """Convert a list of values to a Row. Raises ValueError if the values do not fit the columns."""
    if len(row) != len(columns):
        raise ValueError(
            f"it has {counted(len(row), 'field')} but the table has {len(columns)} columns: "
            f"{', '.join(columns)}; a field that contains a separator or a line break must be quoted"
        )
    used = [image] if caption is None else [image, caption]
    for place in used:
        if row[place] is ABSENT:
            raise ValueError(f"it has no field {columns[place]}; write null if the value is missing")
    name = row[image]
    if not isinstance(name, (str, bytes)) or not name:
        raise ValueError(f"{columns[image]} must be the name of a file, but is {str(name)[:80]!r}")
    try:
        captions = None if caption is None else captions_of(row[caption])
    except ValueError as error:
        raise ValueError(f"{columns[used[-1]]} {error}") from None
    others = [(column, row[place]) for place, column in enumerate(columns) if place not in used]
    return Row(number, os.fsdecode(name), captions, _fields_of(others))


def _fields_of(others: Iterable[tuple[str, Any]]) -> str:
    """Return the values of columns in a row as a JSON object; "" if there are none. The object does not contain empty
    values, values that JSON cannot represent (such as bytes), columns without a name, or a column named caption, which
    would be read as a caption."""
    texts = []
    for column, value in others:
        if value is not ABSENT and value is not None and value != "" and column not in ("", "caption"):
            with suppress(TypeError, ValueError, RecursionError):
                texts.append(f"{json.dumps(column)}: {json.dumps(value, allow_nan=False, default=_as_text)}")
    return f"{{{', '.join(texts)}}}" if texts else ""


def _as_text(value: Any) -> str:
    """Return a date, time or decimal number as text. Raises TypeError for other values."""
    if isinstance(value, (date, time, Decimal)):
        return str(value)
    raise TypeError
