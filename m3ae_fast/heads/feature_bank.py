"""Features of a dataset. Each rank stores the features of its own samples: on its device, in host memory or in a file.

Shapes: N samples of all ranks, R of them on this rank, S stored rows, D width. Patch tokens, and features of
several layers, have further dimensions before D.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import missing_memory
from m3ae_fast.config import POOLINGS, Pool
from m3ae_fast.heads.predictions import Predictions
from m3ae_fast.images.patch_grid import Grid
from m3ae_fast.model.inference import refuse_not_finite, rows_not_finite
from m3ae_fast.process.ranks import Ranks

_MEASURED = 8192  # number of samples whose features are summed at a time
_CONSTANT = 1e-9  # a feature with a smaller variance, relative to its mean square, counts as constant
_DEVICE_SHARE = 0.5  # fraction of a GPU's free memory that features may take; heads and searches need memory too


class FeatureType(NamedTuple):
    """A type of features: a layer and a pooling."""

    layer: int  # number of the block, from 1
    pool: Pool | None  # the pooling; None: patch tokens, which an attentive probe pools

    @property
    def is_tokens(self) -> bool:
        """Return whether the features are patch tokens."""
        return self.pool is None


def layers_of(types: Sequence[FeatureType]) -> list[int]:
    """Return the numbers of the blocks, without duplicates."""
    return [*dict.fromkeys(kind.layer for kind in types)]


def pools_of(types: Sequence[FeatureType]) -> list[Pool]:
    """Return the poolings, without duplicates; empty if all features are patch tokens."""
    return [*dict.fromkeys(kind.pool for kind in types if kind.pool is not None)]


def has_tokens(types: Sequence[FeatureType]) -> bool:
    """Return whether some of the features are patch tokens."""
    return any(kind.is_tokens for kind in types)


def select(kind: FeatureType, types: Sequence[FeatureType], pooled_SKD: Tensor, tokens_SKLD: Tensor | None) -> Tensor:
    """Return the features of one of several types: pooled features [S, D] or patch tokens [S, L, D].

    Args:
        kind: one of `types`.
        types: the types for which the encoder has computed features.
        pooled_SKD: features of all pairs of a layer and a pooling of `types`, in the order of
            `MultimodalEncoder.pooled_of_layers`. A pooling may have several vectors.
        tokens_SKLD: the patch tokens of all layers of `types`; None if no type needs them.
    """
    layer = layers_of(types).index(kind.layer)
    if kind.pool is None:
        assert tokens_SKLD is not None
        return tokens_SKLD[:, layer]
    pools = pools_of(types)
    counts = [POOLINGS[pool].vectors for pool in pools]
    place = pools.index(kind.pool)
    first = layer * sum(counts) + sum(counts[:place])
    return pooled_SKD[:, first : first + counts[place]].flatten(1, 2)


class Standard(NamedTuple):
    """The mean and the standard deviation with which features are standardised when they are read."""

    mean_D: Tensor  # float32
    std_D: Tensor  # float32; 1 for a constant feature


@dataclass(frozen=True)
class FeatureBank:
    """Features of the readable samples of a dataset. Every rank has the keys and labels of all N samples, in file
    order, and stores the features of R of them. Without `ranks`, this process stores all features."""

    keys: list[str]
    stored_SD: Tensor  # float32, or float16 for patch tokens; see `features_RD`
    # labels of all samples, on the CPU: class ids, int64 [N]; or for lists of labels, whether each sample belongs to
    # each class, bool [N, C]; None for a dataset without labels
    labels_N: Tensor | None
    patches_SLD: Tensor | None = None  # float16
    skipped: list[Skipped] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)  # rows and columns of patches of the samples with an image
    own_R: Tensor | None = None  # int64, ascending: numbers of the samples that this rank stores; None: all samples
    at_R: Tensor | None = None  # int64: row of each sample of `own` in `stored_SD`; None: all rows, in order
    ranks: Ranks | None = None
    image_hashes: list[str] = field(default_factory=list)  # see `Sample.image_hash`; empty: they are unknown
    standard: Standard | None = None  # how features are scaled when they are read; None: not at all
    types: Sequence[FeatureType] = ()  # types of the stored features [S, K, D]; empty: one type, stored as [S, D]

    @property
    def labels(self) -> Tensor:
        """Return the labels, int64 [N] or bool [N, C]. The dataset must have labels."""
        assert self.labels_N is not None
        return self.labels_N

    @property
    def has_lists(self) -> bool:
        """Return whether the samples have lists of labels."""
        return self.labels.ndim == 2

    @property
    def own(self) -> Tensor:
        """Return the numbers of the samples that this rank stores: int64 [R], ascending."""
        return torch.arange(len(self.keys)) if self.own_R is None else self.own_R

    @property
    def features_RD(self) -> Tensor:
        """Return the features of this rank's samples, as `take` does. They are a copy if the storage also contains
        other samples, or if the features are scaled."""
        rows = slice(None) if self.at_R is None else torch.arange(len(self.at_R))
        return self.take(rows)

    def take(self, rows: Tensor | slice) -> Tensor:
        """Return the features of some of this rank's samples, in the dtype of `stored_SD`, or float32 if they are
        scaled. `rows`: indices into the R samples, int64, or a slice of them."""
        device = self.stored_SD.device
        if self.at_R is not None:
            rows = self.at_R[rows]
        found_SD = self.stored_SD[rows if isinstance(rows, slice) else rows.to(device)]
        if self.standard is None:
            return found_SD
        mean_D, std_D = (each.to(device) for each in self.standard)
        return (found_SD.float() - mean_D) / std_D

    def measured(self) -> Standard:
        """Return the mean and the standard deviation of the features of all ranks. Every rank must call it."""
        sums_2D = torch.zeros(2, self.stored_SD.shape[-1], dtype=torch.float64)
        for start in range(0, len(self.own), _MEASURED):
            wide_SD = self.take(slice(start, start + _MEASURED)).double()
            sums_2D += torch.stack((wide_SD.sum(0), wide_SD.square().sum(0))).cpu()
        parts = self.ranks.gather(sums_2D) if self.ranks else [sums_2D]
        # rounded to float32, so that the order of the sums, which depends on the number of ranks, has no effect
        mean_D, square_D = torch.stack(parts).sum(0) / max(len(self.keys), 1)
        variance_D = square_D - mean_D**2
        variance_D = torch.where(variance_D > _CONSTANT * square_D, variance_D, torch.ones_like(variance_D))
        return Standard(mean_D.float(), variance_D.sqrt().float())

    def rows(self, numbers: Sequence[int]) -> FeatureBank:
        """Return a bank of the samples with these numbers, which must be ascending, without copying features."""
        place_N = torch.full((len(self.keys),), -1)
        place_N[list(numbers)] = torch.arange(len(numbers))
        own_R = place_N[self.own]
        kept = own_R >= 0
        at_R = torch.arange(len(own_R)) if self.at_R is None else self.at_R
        labels_N = None if self.labels_N is None else self.labels_N[list(numbers)]
        keys, grids = [self.keys[row] for row in numbers], [self.grids[row] for row in numbers if self.grids]
        images = [self.image_hashes[row] for row in numbers if self.image_hashes]
        more: dict[str, Any] = {"grids": grids, "image_hashes": images}
        return replace(self, keys=keys, labels_N=labels_N, **more, own_R=own_R[kept], at_R=at_R[kept])

    def part(self, number: int) -> FeatureBank:
        """Return a bank that contains one feature vector of each sample: the one with this number."""
        return replace(self, stored_SD=self.stored_SD[:, number], patches_SLD=None, types=())

    def of(self, kind: FeatureType) -> FeatureBank:
        """Return a bank that contains only the type `kind`: features [R, D], or [R, L, D] for patch tokens."""
        found_S = select(kind, self.types, self.stored_SD, self.patches_SLD)
        return replace(self, stored_SD=found_S, patches_SLD=None, types=())

    def gathered(self) -> FeatureBank:
        """Return a bank of one type of features that stores all samples on the CPU of every rank. Every rank must call
        it."""
        alone = replace(self, own_R=None, at_R=None, ranks=None, standard=None)  # `features_RD` has scaled the features
        return replace(alone, stored_SD=self.complete(self.features_RD))

    def complete(self, values_R: Tensor) -> Tensor:
        """Gather values for the samples of each rank, [R, ...], and return the values of all samples on the CPU of
        every rank, [N, ...]. Every rank must call it."""
        own = self.own, values_R.cpu()
        return _in_order(self.ranks.gather(own) if self.ranks else [own])

    def beside(self, other: FeatureBank, folder: Path | None = None) -> FeatureBank:
        """Return a bank with the features of two banks side by side, [R, D of both], each scaled to unit length. The
        cosine similarity of two samples is then the mean of their similarities in the two banks. Every rank must call
        it.

        Args:
            other: features of the same samples, stored by the same ranks.
            folder: as in `Rows`.

        Raises:
            UserError: the features fit neither into memory nor on the disk.
        """
        assert self.ranks and self.keys == other.keys and torch.equal(self.own, other.own)
        both = Rows(len(self.own), self.ranks, folder)
        for start in range(0, max(len(self.own), 1), _MEASURED):
            # one of the banks may be on the device, and the other in host memory
            parts = [bank.take(slice(start, start + _MEASURED)).to(self.ranks.device).float() for bank in (self, other)]
            both.append(torch.cat([F.normalize(part_SD, dim=1) for part_SD in parts], 1))
        return replace(self, stored_SD=both.tensor(), at_R=None, patches_SLD=None, types=())

    def check_finite(self) -> None:
        """Raise UserError on every rank if a feature of any sample is not finite. The message contains the key of the
        first such sample."""
        for stored in (self.stored_SD, self.patches_SLD):
            if stored is None:
                continue
            own = self.own[rows_not_finite(replace(self, stored_SD=stored).features_RD)].tolist()
            parts = self.ranks.gather(own) if self.ranks else [own]
            refuse_not_finite(sorted(row for part in parts for row in part), self.keys)

    def predictions(self, scores_RC: Tensor, *, votes: bool = False) -> Predictions:
        """Return the predictions of all samples on every rank. `scores_RC`: floating-point scores of this rank's
        samples. `votes`: see `Predictions.of`. Raises UserError on every rank if a score on any rank is not finite."""

        def own() -> Predictions:
            keys, images = ([rows[row] for row in self.own.tolist() if rows] for rows in (self.keys, self.image_hashes))
            return Predictions.of(keys, self.labels[self.own], scores_RC, votes=votes, image_hashes=images)

        if self.ranks is None or self.ranks.world == 1:
            return own()
        parts = self.ranks.gather((self.own, self.ranks.together(own)))
        order = torch.cat([numbers for numbers, _ in parts]).argsort()
        joined = Predictions.joined([part for _, part in parts])
        return replace(joined, **{each.name: _ordered(getattr(joined, each.name), order) for each in fields(joined)})


def _in_order(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the rows of all parts, sorted by number. Each part consists of the numbers of samples, and of the rows of
    these samples."""
    if len(parts) == 1:
        return parts[0][1]
    numbers, rows = zip(*parts)
    values_N = rows[0].new_empty(sum(map(len, numbers)), *rows[0].shape[1:])
    for number, row in parts:
        values_N[number] = row
    return values_N


def _ordered(values: Any, order: Tensor) -> Any:
    """Return a column of a table with its rows in the given order. The column stays empty if its values are unknown."""
    if isinstance(values, Tensor):
        return values[order]
    return [values[row] for row in order.tolist() if values] if isinstance(values, list) else values


class Rows:
    """A growing tensor of rows. Its maximum number of rows is known, so that it is allocated once and never copied."""

    def __init__(self, most: int, ranks: Ranks, folder: Path | None, to_come: int = 1) -> None:
        """Create a tensor without rows.

        Args:
            most: maximum number of rows.
            ranks: the ranks, each of which has its own tensor.
            folder: folder for a file if the memory is too small; None: the folder for temporary files.
            to_come: number of tensors of about this size, including this one, that are allocated now and have to fit
                into memory together.
        """
        self._most, self._ranks, self._folder, self._to_come = most, ranks, folder, to_come
        self._rows: Tensor | None = None
        self._filled = 0

    def append(self, rows: Tensor) -> None:
        """Append rows [n, ...]. The first call, which every rank must make, determines the dtype and the shape."""
        if self._rows is None:
            like = rows
            self._rows = self._ranks.together(lambda: self._allocated(like))
        self._rows[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def tensor(self) -> Tensor:
        """Return all rows that have been appended."""
        assert self._rows is not None
        return self._rows[: self._filled]

    def _allocated(self, like: Tensor) -> Tensor:
        shape, ranks = (self._most, *like.shape[1:]), self._ranks
        # memory counts as free until rows are written to it, so room for the tensors to come is required now
        needed = math.prod(shape) * like.element_size() * self._to_come
        place = storage(needed, ranks.device, len(ranks.of_node), self._folder)
        if place != "file":
            return torch.empty(shape, dtype=like.dtype, device=ranks.device if place == "device" else "cpu")
        # the file has no name, so it disappears even if the program is killed
        with tempfile.TemporaryFile(dir=self._folder) as file:
            dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
            return torch.from_numpy(np.memmap(file, dtype, mode="w+", shape=shape))


def missing_in_host_memory(needed: float, on_node: int) -> str:
    """Return a message with the required and the free memory if the host memory of this node is too small for `needed`
    bytes per rank; otherwise "". `on_node`: number of ranks on this node."""
    return missing_memory(needed * on_node, torch.device("cpu"))


def storage(
    needed: int, device: torch.device, on_node: int, folder: Path | None = None
) -> Literal["device", "host", "file"]:
    """Return the first storage that has room for `needed` bytes for each of the `on_node` ranks on this node: the
    ranks' devices, host memory, or files in `folder` (None: the folder for temporary files). Raises UserError if there
    is not enough room anywhere."""
    if device.type != "cpu" and not missing_memory(needed / _DEVICE_SHARE, device):
        return "device"
    lacking = missing_in_host_memory(needed, on_node)
    if not lacking:
        return "host"
    place = folder or tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if needed * on_node > 0.9 * free:
        raise UserError(
            f"the features fit neither into memory ({lacking}) nor into a file in {place} ({free / 1e9:.3g} GB are "
            "free); use fewer samples, or more nodes"
        )
    return "file"
