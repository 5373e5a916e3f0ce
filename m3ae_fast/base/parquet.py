"""Reading and writing tables as parquet files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3ae_fast.base.atomic_file import atomic_write
from m3ae_fast.base.errors import UserError


def write_parquet(path: Path, columns: Mapping[str, np.ndarray | Sequence[Any]]) -> None:
    """Write columns of equal length to `path` atomically. An array [rows, ...] of several dimensions becomes a column
    of lists. Raises UserError if the file cannot be written."""
    import pyarrow
    from pyarrow import parquet

    table = {}
    for name, values in columns.items():
        if isinstance(values, np.ndarray) and values.ndim > 1:
            table[name] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1)), values[:1].size)
        else:
            table[name] = pyarrow.array(values)
    with atomic_write(path) as partial:
        parquet.write_table(pyarrow.table(table), partial)


def read_parquet(path: Path) -> dict[str, list[Any]]:
    """Return the columns of a table by name. Raises UserError if the file is missing or damaged."""
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pydict()
    except (OSError, ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
