"""Tables that name an image and its caption in each row: csv, tsv, jsonl, parquet."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from m3ae_fast.errors import UserError

IMAGE_COLUMNS = ("file_name", "filename", "image", "image_path", "path", "filepath", "file", "picture")
CAPTION_COLUMNS = ("caption", "text", "title", "description", "sentence", "alt_text")


def read_captions(table: Path, image: str | None = None, caption: str | None = None) -> list[tuple[str, str]]:
    """(image, caption) of each row; a missing caption is "".

    Args:
        table: .csv, .tsv, .jsonl (or .ndjson) or .parquet.
        image, caption: names of the columns; None: the first that has a usual name.

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    read = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}.get(table.suffix)
    if read is None:
        raise UserError(f"--captions {table}: must be a .csv, .tsv, .jsonl or .parquet")
    found: list[tuple[str, str]] = []
    try:
        rows = read(table)
        columns: list[str] = next(rows, [])
        image = choose(columns, image, IMAGE_COLUMNS, "--image-column", str(table))
        caption = choose(columns, caption, CAPTION_COLUMNS, "--caption-column", str(table))
        for row in rows:
            found.append((_text(row.get(image)), _text(row.get(caption))))
    except OSError as error:
        raise UserError(f"--captions {table}: cannot be read ({error.strerror or error})") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"--captions {table}: row {len(found) + 1} cannot be read ({error})") from None
    if not found:
        raise UserError(f"--captions {table}: has no rows")
    return found


def choose(columns: Sequence[str], named: str | None, usual: Sequence[str], option: str, where: str) -> str:
    """The column that the user named, else the first with a usual name. Raises UserError where there is none."""
    if named is not None and named not in columns:
        raise UserError(f"{option} {named}: {where} has {', '.join(columns) or 'no columns'}")
    by_name = {column.lower(): column for column in reversed(columns)}
    found = named or next((by_name[name] for name in usual if name in by_name), None)
    if found is None:
        raise UserError(f"{where}: has {', '.join(columns) or 'no columns'}; name one with {option}")
    return found


def _text(value: Any) -> str:
    return "" if value is None else os.fsdecode(value) if isinstance(value, bytes) else str(value)


def _csv(table: Path) -> Iterator[Any]:
    """The columns, and then one dictionary per row; as the other readers."""
    with open(table, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",")
        yield list(rows.fieldnames or ())
        yield from rows


def _jsonl(table: Path) -> Iterator[Any]:
    columns: list[str] | None = None
    with open(table, encoding="utf-8-sig") as file:
        for line in filter(str.strip, file):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is not a JSON object")
            if columns is None:
                columns = list(row)
                yield columns
            yield row


def _parquet(table: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"--captions {table}: needs pyarrow; pip install pyarrow") from None
    file = pyarrow.parquet.ParquetFile(table)
    yield file.schema_arrow.names
    for batch in file.iter_batches():
        yield from batch.to_pylist()
