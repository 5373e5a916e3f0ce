"""Tests two results on the same samples against each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m3ae_fast.errors import UserError
from m3ae_fast.parquet import read_parquet
from m3ae_fast.transfer.predictions import FILE
from m3ae_fast.transfer.significance import difference


def compare_results(folders: Sequence[Path]) -> str:
    """Return which of two results is better, as a sentence. `folders`: the OUT of two tasks.

    Raises:
        UserError: one has no predictions of classes, or they are not of the same samples.
    """
    first, second = (_correct(folder) for folder in folders)
    if first.keys() != second.keys():
        alone = len(first.keys() ^ second.keys())
        raise UserError(
            f"{folders[0]} and {folders[1]}: {alone:,} samples are in one of them alone; name two results of the same "
            "--val, spelled alike"
        )
    ours, theirs = (np.array([each[key] for key in first]) for each in (first, second))
    return difference(ours, theirs).words(str(folders[0]), str(folders[1]))


def _correct(folder: Path) -> dict[str, bool]:
    """Return whether each sample was right, by key."""
    table = read_parquet(folder / FILE)
    if not {"key", "label", "prediction"} <= table.keys() or len({*table["key"]}) < len(table["key"]):
        raise UserError(
            f"{folder}: has no predictions of a class for each sample, once; name the OUT of knn, linear, finetune or "
            "of attentive at one layer"
        )
    return {
        key: label == prediction for key, label, prediction in zip(table["key"], table["label"], table["prediction"])
    }
