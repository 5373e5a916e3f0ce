"""Caption tables (csv, tsv, jsonl, parquet), whose rows contain an image, its caption and other fields.

Each row gives one sample, or one sample per caption if it contains a list of captions; equal rows are not merged. Rows
are read strictly: a row with more or fewer fields than the table has columns is an error. All columns except those of
images and captions become fields of the sample's json. A table without captions must have at least one column besides
that of the images.

A .csv is quoted according to RFC 4180. Its separator is the comma, semicolon or tab that divides its first row into the
most columns. A .tsv has one row per line. Quotes in a .tsv are text, except in two cases
that indicate a program that quotes fields. If all column names are quoted, the table is read as a .csv with tabs as
separators. The quotes around a field are removed if the field is empty, if it contains doubled quotes (and no others),
or if it contains a tab and the row would otherwise have too many fields.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from datetime import date, time
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import open_regular, parse_json
from m3ae_fast.shards.sources.interface import captions_of

NO_CAPTIONS = ""  # in place of the name of a column of captions: the table has no captions, only fields
IMAGE_COLUMNS = ("file_name", "filename", "image", "image_path", "path", "filepath", "file", "picture")
CAPTION_COLUMNS = ("caption", "text", "title", "description", "sentence", "alt_text")
IMAGE_OPTION, CAPTION_OPTION = "--image-column", "--caption-column"  # options that name a column
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_SEPARATORS = ",;\t"  # of a .csv; spreadsheets use semicolons if the comma is the decimal separator
_ABSENT = object()  # value of a column that is missing in a row of jsonl
# The iterator yields the list of column names, which later rows may extend, and then the values of each row.
_Rows = Generator[list[Any], None, None]


class NoColumns(UserError):
    """Raised if a table has no column with a usual name. `columns`: the names of its columns, as text; `option`: the
    option that names the column."""

    def __init__(self, columns: Sequence[str], where: str, option: str) -> None:
        self.columns, self.option = ", ".join(columns) or "none", option
        found = f"has the columns {self.columns}; specify one of them with {option}" if columns else "has no columns"
        otherwise = f", or add {option} '' to read only fields" if option == CAPTION_OPTION and len(columns) > 1 else ""
        super().__init__(f"{where}: {found}{otherwise}")


class Row(NamedTuple):
    """A row of a caption table."""

    number: int  # number of the row from 1, not counting the row of column names
    image: str
    captions: list[str] | None  # empty: the row has no caption; None: the table has no captions
    fields: str  # JSON object with the values of other columns; "" if there are none


def read_captions(table: Path, image: str | None = None, caption: str | None = None) -> list[Row]:
    """Return all rows of a .csv, .tsv, .jsonl (or .ndjson) or .parquet file. `image` and `caption`: names of columns;
    None: the first column with a usual name. With NO_CAPTIONS in place of `caption`, the rows have no captions.

    Raises:
        NoColumns: no column has a usual name.
        UserError: the file cannot be read, a named column is missing, or a row does not fit the columns.
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


def choose_column(columns: Sequence[str], named: str | None, usual: Sequence[str], option: str, where: str) -> str:
    """Return the column named by the user or, if none is named, the first one with a usual name. `option` and `where`:
    the option that names a column, and the table, for messages. Raises NoColumns if no column has a usual name, and
    UserError if the named column does not exist or occurs several times."""
    if named is not None and named not in columns:
        advice = f"; specify one of {', '.join(columns)}" if columns else ""
        raise UserError(f"{option} {named}: {where} has no such column{advice}")
    names = [named] if named else [column for name in usual for column in columns if column.lower() == name][:1]
    if not names:
        raise NoColumns(columns, where, option)
    same = [column for column in columns if column == named or (not named and column.lower() == names[0].lower())]
    if len(same) > 1:
        advice = f"specify one with {option}" if len(set(same)) == len(same) else "rename or remove all but one"
        raise UserError(f"{where}: has {len(same)} matching columns, {' and '.join(same)}; {advice}")
    return names[0]


def _row(number: int, columns: Sequence[str], row: Sequence[Any], image: int, caption: int | None) -> Row:
    """Convert a list of values to a Row. Raises ValueError if the values do not fit the columns."""
    if len(row) != len(columns):
        raise ValueError(
            f"it has {len(row)} field{'s' * (len(row) != 1)} but the table has {len(columns)} columns: "
            f"{', '.join(columns)}; a field that contains a separator or a line break must be quoted"
        )
    used = [image] if caption is None else [image, caption]
    for place in used:
        if row[place] is _ABSENT:
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
        if value is not _ABSENT and value is not None and value != "" and column not in ("", "caption"):
            with suppress(TypeError, ValueError, RecursionError):
                texts.append(f"{json.dumps(column)}: {json.dumps(value, allow_nan=False, default=_as_text)}")
    return f"{{{', '.join(texts)}}}" if texts else ""


def _as_text(value: Any) -> str:
    """Return a date, time or decimal number as text. Raises TypeError for other values."""
    if isinstance(value, (date, time, Decimal)):
        return str(value)
    raise TypeError


def _lines(table: Path) -> Generator[str, None, None]:
    """Yield the lines of a text file with their line ends. Raises UserError if a line is not UTF-8, and ValueError if
    it contains a null byte, as in UTF-16."""
    with io.BufferedReader(open_regular(table)) as file:
        for number, line in enumerate(file, 1):
            try:
                parts = [part.decode("utf-8-sig" if number == 1 else "utf-8") for part in line.splitlines(True)]
            except UnicodeDecodeError:
                raise UserError(f"--captions {table}: line {number} is not UTF-8; save it in UTF-8") from None
            if b"\0" in line:
                raise ValueError("it contains a null byte; save the file in UTF-8")
            yield from parts


def _csv(table: Path) -> _Rows:
    separator = max(_SEPARATORS, key=lambda each: _count_columns(table, each))  # the first of several with a tie
    with closing(_lines(table)) as lines:
        yield from _quoted(lines, separator)


def _count_columns(table: Path, separator: str) -> int:
    """Return the number of columns of a .csv with this separator; 0 if its first row cannot be read with it."""
    with closing(_lines(table)) as lines:
        try:
            return len(next(_quoted(lines, separator), []))
        except ValueError:
            return 0


def _quoted(lines: Iterable[str], delimiter: str) -> _Rows:
    """Yield the rows of a csv, without empty lines."""
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    first = 1
    try:
        for row in rows:
            if row:
                yield row
            first = rows.line_num + 1
    except csv.Error as error:
        where = f"line {first}" if rows.line_num <= first else f"lines {first} to {rows.line_num}"
        reason = "a quote is not closed" if "end of data" in str(error) else error
        raise ValueError(f"{where}: {reason}") from None


def _tsv(table: Path) -> _Rows:
    with closing(_lines(table)) as lines:
        head = next(filter(str.strip, lines), "")
        columns = head.rstrip("\r\n").split("\t")
        if all(_QUOTED.fullmatch(column) for column in columns):
            yield from _quoted(chain([head], lines), "\t")
            return
        yield columns
        for line in filter(None, (line.rstrip("\r\n") for line in lines)):
            yield _fields(line, len(columns))


def _fields(line: str, count: int) -> list[str]:
    """Return the fields of a line of a .tsv. If the line has more than `count` fields, quotes around tabs are
    interpreted, provided that this gives `count` fields."""
    fields = line.split("\t")
    if len(fields) > count and '"' in line:
        try:
            (quoted,) = csv.reader([line], delimiter="\t", strict=True)
        except csv.Error:
            return fields
        return quoted if len(quoted) == count else fields
    return [_unquoted(field) for field in fields]


def _unquoted(field: str) -> str:
    match = _QUOTED.fullmatch(field)
    return match[1].replace('""', '"') if match and (not match[1] or '""' in match[1]) else field


def _jsonl(table: Path) -> _Rows:
    columns: list[str] | None = None
    with closing(_lines(table)) as lines:
        for line in filter(str.strip, lines):
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("it is not a JSON object")
            if columns is None:
                columns = list(row)
                yield columns
            columns += [column for column in row if column not in columns]  # the reader checks for new columns
            yield [row.get(column, _ABSENT) for column in columns]


def _parquet(table: Path) -> _Rows:
    import pyarrow.parquet

    with open_regular(table) as source, pyarrow.parquet.ParquetFile(source) as file:
        yield file.schema_arrow.names
        try:
            for batch in file.iter_batches():
                yield from map(list, zip(*(column.to_pylist() for column in batch.columns)))
        except pyarrow.ArrowException as error:  # not all of pyarrow's exceptions are ValueErrors
            raise ValueError(error) from None


READERS: dict[str, Callable[[Path], _Rows]] = {
    ".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet
}  # fmt: skip
