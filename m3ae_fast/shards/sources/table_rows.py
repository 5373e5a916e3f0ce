"""The rows of tables in .csv, .tsv, .jsonl and .parquet files.

Rows that do not fit the format are errors. A .csv is quoted according to RFC 4180. Its separator is the comma,
semicolon or tab that divides its first row into the most columns. A .tsv has one row per line, and its quotes are text,
with two exceptions for files of programs that quote fields. If all column names are quoted, the table is read as a .csv
with tabs as separators. Otherwise, the quotes around a field are removed if the field is empty, if it contains doubled
quotes (and no others), or if it contains a tab and the row would otherwise have too many fields.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import open_regular, parse_json

ABSENT = object()  # value of a column that is missing in a row of jsonl
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_SEPARATORS = ",;\t"  # separators of a .csv; spreadsheets use semicolons if the comma is the decimal separator
# The iterator yields the list of column names, which later rows may extend, and then the values of each row.
Rows = Generator[list[Any], None, None]


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


def _csv(table: Path) -> Rows:
    separator = max(_SEPARATORS, key=lambda each: _count_columns(table, each))  # of equally good separators, the first
    with closing(_lines(table)) as lines:
        yield from _quoted(lines, separator)


def _count_columns(table: Path, separator: str) -> int:
    """Return the number of columns of a .csv with this separator; 0 if its first row cannot be read with it."""
    with closing(_lines(table)) as lines:
        try:
            return len(next(_quoted(lines, separator), []))
        except ValueError:
            return 0


def _quoted(lines: Iterable[str], delimiter: str) -> Rows:
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
        reason = "a quote is not closed" if "end of data" in str(error) else str(error)
        if "field limit" in reason:
            reason = f"a field has more than {csv.field_size_limit():,} characters; close its quote or use .jsonl"
        raise ValueError(f"{where}: {reason}") from None


def _tsv(table: Path) -> Rows:
    with closing(_lines(table)) as lines:
        head = next(filter(str.strip, lines), "")
        if not head:
            return
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


def _jsonl(table: Path) -> Rows:
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
            yield [row.get(column, ABSENT) for column in columns]


def _parquet(table: Path) -> Rows:
    import pyarrow.parquet

    with open_regular(table) as source, pyarrow.parquet.ParquetFile(source) as file:
        yield file.schema_arrow.names
        try:
            for batch in file.iter_batches():
                yield from map(list, zip(*(column.to_pylist() for column in batch.columns)))
        except (pyarrow.ArrowException, OverflowError) as error:  # not all of them are ValueErrors
            raise ValueError(error) from None


READERS: dict[str, Callable[[Path], Rows]] = {
    ".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet
}  # fmt: skip
