"""Features of other programs, read from an .npz file with the arrays that `m3ae-fast embed` writes.

Shapes: N rows of the file, S samples of a batch, D width, K pairs of a layer and a pooling.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.base.errors import UserError
from m3ae_fast.base.untrusted_file import open_regular
from m3ae_fast.base.wording import counted
from m3ae_fast.batch.packed import PackedBatch
from m3ae_fast.config import ModelConfig, Pool
from m3ae_fast.data import Corpus
from m3ae_fast.data.index import printable
from m3ae_fast.evaluation.image_features import FixedFeatures
from m3ae_fast.process.ranks import Ranks

SUFFIX = ".npz"
_FORMAT = (
    "an .npz file must contain the arrays keys [N] and features [N, D] and, if samples of several shards have the same "
    "key, shards [N], as m3ae-fast embed writes them"
)


class StoredFeatures(FixedFeatures):
    """An encoder that looks up the features of each sample by its key. It reads the images too, so that samples that
    cannot be read are left out, as for all other models."""

    def __init__(self, name: str, config: ModelConfig, features_ND: np.ndarray, rows: dict[str, int]) -> None:
        """Create the encoder.

        Args:
            name: name of the file.
            config: the input; see `image_features.input_config`.
            features_ND: the features, float32.
            rows: row of the features by the key of the sample in a batch.
        """
        super().__init__(config)
        self.name, self._table_ND, self._rows = name, torch.from_numpy(features_ND), rows
        self._lacking: list[str] = []

    @property
    def width(self) -> int:
        return self._table_ND.shape[1]

    @property
    def digest(self) -> str:
        """Return a hash of the features and of the samples to which they belong."""
        found = hashlib.sha256(self._table_ND.numpy().tobytes())
        found.update("\n".join(f"{key} {row}" for key, row in self._rows.items()).encode("utf-8", "surrogateescape"))
        return found.hexdigest()

    def pooled_of_layers(self, batch: PackedBatch, layers: Sequence[int], pools: Sequence[Pool] = ("mean",)) -> Tensor:
        """Return the features as float32 [S, K, D]. The features of a sample that the file does not contain are 0, and
        `check_complete` reports the sample."""
        self._lacking += [key for key in batch.keys if key not in self._rows]
        rows_S = torch.tensor([self._rows.get(key, -1) for key in batch.keys], dtype=torch.long)
        found_SD = torch.where((rows_S < 0)[:, None], 0.0, self._table_ND[rows_S]).to(batch.images.device)
        return found_SD[:, None].expand(-1, len(layers) * len(pools), -1)

    def check_complete(self, ranks: Ranks) -> None:
        """Raise UserError on every rank if features of a sample were missing on any rank. Every rank must call it."""
        lacking = [key for part in ranks.gather(self._lacking) for key in part]
        if lacking:
            raise _lacks(self.name, lacking)


def open_features(name: str, config: ModelConfig, corpora: Sequence[Corpus], max_missing: float) -> StoredFeatures:
    """Return the features in a file for the samples of some datasets.

    Args:
        name: the .npz file; see _FORMAT. No pickled object is loaded.
        config: the input; see `image_features.input_config`.
        corpora: the datasets. Their shards are identified by file name, so that they may have been moved.
        max_missing: maximum fraction of samples without features, because `embed` leaves out samples that it cannot
            read.

    Raises:
        UserError: the file cannot be read; an array is missing, damaged or not finite; several rows or samples have the
            same name; or the features of too many samples are missing.
    """
    arrays = _read(name)
    features_ND, keys, shards = arrays["features"], arrays["keys"].astype(str), arrays.get("shards")
    if features_ND.ndim != 2 or not features_ND.size or features_ND.dtype.kind not in "fiu":
        raise UserError(
            f"{name}: features has the dtype {features_ND.dtype} and the shape {features_ND.shape}; {_FORMAT}"
        )
    for array, values in (("keys", keys), ("shards", shards)):
        if values is not None and values.shape != (len(features_ND),):
            raise UserError(
                f"{name}: {array} has the shape {values.shape}, but features has {len(features_ND):,} rows; {_FORMAT}"
            )
    features_ND = np.ascontiguousarray(features_ND, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(features_ND).all(1))
    if len(bad):
        raise UserError(
            f"{name}: the features of {counted(len(bad), 'sample')} are not finite, for example {keys[bad[0]]}"
        )
    names = [*keys] if shards is None else [*zip(map(os.path.basename, shards.astype(str)), keys)]
    rows = {each: row for row, each in enumerate(names)}
    if len(rows) < len(names):
        twice = next(each for row, each in enumerate(names) if rows[each] != row)
        raise UserError(f"{name}: contains the sample {twice if shards is None else '/'.join(twice)} twice; {_FORMAT}")
    found: dict[str, int] = {}
    lacking, used = [], set[int]()
    for shard in (shard for corpus in corpora for source in corpus.sources for shard in source.shards):
        for raw in shard.table()["key"]:
            key = printable(raw.decode("utf-8", "replace"))
            row = rows.get(key if shards is None else (os.path.basename(shard.shard), key))
            if row is None:
                lacking.append(f"{shard.shard}/{key}")
                continue
            if row in used and f"{shard.shard}/{key}" not in found:
                raise UserError(f"{name}: several samples are named {names[row]}; {_FORMAT}")
            found[f"{shard.shard}/{key}"] = row
            used.add(row)
    if len(lacking) > max_missing * (len(lacking) + len(found)):
        raise _lacks(name, lacking)
    return StoredFeatures(name, config, features_ND, found)


def _lacks(name: str, lacking: Sequence[str]) -> UserError:
    return UserError(
        f"{name}: lacks the features of {counted(len(lacking), 'sample')}, for example {lacking[0]}; it must contain "
        "those of all --train and --val samples"
    )


def _read(name: str) -> dict[str, Any]:
    """Return the arrays of the file that are used. Raises UserError if it cannot be read, or if one is missing."""
    try:
        with open_regular(name) as raw, np.load(raw, allow_pickle=False) as file:
            if missing := [array for array in ("keys", "features") if array not in file]:
                raise UserError(f"{name}: contains no array {missing[0]}; {_FORMAT}")
            return {array: file[array] for array in ("keys", "features", "shards") if array in file}
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from None
    except (
        ValueError,
        LookupError,
        EOFError,
        TypeError,
        AttributeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"{name}: cannot be read ({error}); {_FORMAT}") from None
