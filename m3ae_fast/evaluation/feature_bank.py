"""Features of a dataset, of which each rank stores its own rows: on its device, in host memory or in a file.

Shapes: N samples of all ranks, R of them on this rank, S stored rows, D width; of several layers, or of patch tokens,
features have more dimensions before D.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from m3ae_fast.base.bad_samples import Skipped
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hardware import missing_memory
from m3ae_fast.evaluation.predictions import Predictions
from m3ae_fast.images.patch_grid import Grid
from m3ae_fast.model.inference import refuse_not_finite, rows_not_finite
from m3ae_fast.process.ranks import Ranks

_DEVICE_SHARE = 0.5  # of a GPU's free memory that features may take: heads and searches need some too


@dataclass(frozen=True)
class FeatureBank:
    """Features of the samples that could be read. Every rank knows the keys and labels of all N samples, in file order,
    and stores the features of R of them; without `ranks` this process has all.
    """

    keys: list[str]
    stored_SD: Tensor  # float32, or float16 of patch tokens; see `features_RD`
    labels_N: Tensor | None  # int64 ids of classes, on the CPU; None for a dataset without labels
    patches_SLD: Tensor | None = None  # float16
    skipped: list[Skipped] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)  # rows and columns of patches, of samples that have an image
    own_R: Tensor | None = None  # int64: which of the N samples this rank stores, ascending; None: all
    at_R: Tensor | None = None  # int64: the stored rows of these; None: all, in their order
    ranks: Ranks | None = None

    @property
    def labels(self) -> Tensor:
        """Return the labels of a dataset that has some."""
        assert self.labels_N is not None
        return self.labels_N

    @property
    def own(self) -> Tensor:
        """Return which of the N samples this rank stores: int64 [R], ascending."""
        return torch.arange(len(self.keys)) if self.own_R is None else self.own_R

    @property
    def features_RD(self) -> Tensor:
        """Return the features of this rank's samples; a copy if others are stored too."""
        return self.stored_SD if self.at_R is None else self.take(torch.arange(len(self.at_R)))

    @property
    def patches_RLD(self) -> Tensor | None:
        """Return the patch tokens of this rank's samples, if they were kept."""
        return None if self.patches_SLD is None else self.tokens().features_RD

    def take(self, rows: Tensor | slice) -> Tensor:
        """Return the features of some of this rank's R samples, by their places among these."""
        if self.at_R is None:
            return self.stored_SD[rows if isinstance(rows, slice) else rows.to(self.stored_SD.device)]
        return self.stored_SD[self.at_R[rows].to(self.stored_SD.device)]

    def rows(self, numbers: Sequence[int]) -> FeatureBank:
        """Return the samples of these numbers, ascending, among the N; nothing is copied."""
        place_N = torch.full((len(self.keys),), -1)
        place_N[list(numbers)] = torch.arange(len(numbers))
        own_R = place_N[self.own]
        kept = own_R >= 0
        at_R = torch.arange(len(own_R)) if self.at_R is None else self.at_R
        labels_N = None if self.labels_N is None else self.labels_N[list(numbers)]
        keys, grids = [self.keys[row] for row in numbers], [self.grids[row] for row in numbers if self.grids]
        return replace(self, keys=keys, labels_N=labels_N, grids=grids, own_R=own_R[kept], at_R=at_R[kept])

    def layer(self, number: int) -> FeatureBank:
        """Return the samples at one of several layers, counted from 0."""
        patches_SLD = None if self.patches_SLD is None else self.patches_SLD[:, number]
        return replace(self, stored_SD=self.stored_SD[:, number], patches_SLD=patches_SLD)

    def tokens(self) -> FeatureBank:
        """Return the samples with their patch tokens as features, [R, L, D]."""
        assert self.patches_SLD is not None
        return replace(self, stored_SD=self.patches_SLD, patches_SLD=None)

    def pooled(self) -> FeatureBank:
        """Return the samples without their patch tokens."""
        return replace(self, patches_SLD=None)

    def gathered(self) -> FeatureBank:
        """Return a bank that has all rows on the CPU of every rank."""
        alone = replace(self, own_R=None, at_R=None, ranks=None)
        patches_NLD = None if self.patches_SLD is None else self.tokens().complete(self.tokens().features_RD)
        return replace(alone, stored_SD=self.complete(self.features_RD), patches_SLD=patches_NLD)

    def on_main(self) -> Tensor | None:
        """Return the features of all N samples on the CPU of the main rank, [N, ...]; None elsewhere."""
        own = self.features_RD.cpu()
        parts = [(self.own, own)] if self.ranks is None else self.ranks.gather_on_main((self.own, own))
        return None if parts is None else _in_order(parts)

    def complete(self, values_R: Tensor) -> Tensor:
        """Gather rows of all ranks, [R, ...] each, on the CPU of every rank: [N, ...]."""
        own = self.own, values_R.cpu()
        return _in_order(self.ranks.gather(own) if self.ranks else [own])

    def local(self) -> FeatureBank:
        """Return a bank of this rank's samples alone."""
        own = self.own.tolist()
        return replace(self.rows(own), own_R=None, ranks=None)

    def check_finite(self) -> None:
        """Raise UserError on every rank, naming the first sample with a feature that is not finite, if there is one."""
        for each in (self, self.tokens()) if self.patches_SLD is not None else (self,):
            own = self.own[rows_not_finite(each.features_RD)].tolist()
            parts = self.ranks.gather(own) if self.ranks else [own]
            refuse_not_finite(sorted(row for part in parts for row in part), self.keys)

    def predictions(self, scores_RC: Tensor, *, votes: bool = False) -> Predictions:
        """Return the predictions of all N samples, on every rank, from the scores of this rank's. Raises UserError on
        every rank if scores of one are not finite."""

        def own() -> Predictions:
            keys = [self.keys[row] for row in self.own.tolist()]
            return Predictions.of(keys, self.labels[self.own], scores_RC, votes=votes)

        if self.ranks is None or self.ranks.world == 1:
            return own()
        parts = self.ranks.gather((self.own, self.ranks.together(own)))
        order = torch.cat([numbers for numbers, _ in parts]).argsort()
        joined = Predictions.joined([part for _, part in parts])
        return replace(joined, **{each.name: _ordered(getattr(joined, each.name), order) for each in fields(joined)})


def _in_order(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the rows of all parts, of which each says which numbers its rows have."""
    if len(parts) == 1:
        return parts[0][1]
    numbers, rows = zip(*parts)
    values_N = rows[0].new_empty(sum(map(len, numbers)), *rows[0].shape[1:])
    for number, row in parts:
        values_N[number] = row
    return values_N


def _ordered(values: Any, order: Tensor) -> Any:
    """Return a column of a table in another order."""
    if isinstance(values, Tensor):
        return values[order]
    return [values[row] for row in order.tolist()] if isinstance(values, list) else values


class Rows:
    """A growing tensor of rows of which the largest number is known, so that it is never copied."""

    def __init__(self, most: int, ranks: Ranks, folder: Path | None) -> None:
        """Begin with no row. `folder`: where a file may be made if there is no room in memory; None: in the folder for
        temporary files."""
        self._most, self._ranks, self._folder = most, ranks, folder
        self._rows: Tensor | None = None
        self._filled = 0

    def append(self, rows: Tensor) -> None:
        """Add rows. Every rank must add its first ones at the same time; of these, the dtype and the shape count."""
        if self._rows is None:
            like = rows
            self._rows = self._ranks.together(lambda: self._allocated(like))
        self._rows[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def tensor(self) -> Tensor:
        """Return all rows so far."""
        assert self._rows is not None
        return self._rows[: self._filled]

    def _allocated(self, like: Tensor) -> Tensor:
        shape, ranks = (self._most, *like.shape[1:]), self._ranks
        place = storage(math.prod(shape) * like.element_size(), ranks.device, len(ranks.of_node), self._folder)
        if place != "file":
            return torch.empty(shape, dtype=like.dtype, device=ranks.device if place == "device" else "cpu")
        with tempfile.TemporaryFile(
            dir=self._folder
        ) as file:  # it has no name: nothing is left if the program is killed
            dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
            return torch.from_numpy(np.memmap(file, dtype, mode="w+", shape=shape))


def missing_in_host_memory(needed: float, on_node: int) -> str:
    """Return "" if `needed` bytes of each of the ranks on this node fit into its memory, else what is missing."""
    return missing_memory(needed * on_node, torch.device("cpu"))


def storage(
    needed: int, device: torch.device, on_node: int, folder: Path | None = None
) -> Literal["device", "host", "file"]:
    """Return the first place where `needed` bytes of each of the ranks on this node fit: the ranks' devices, host
    memory, or files in `folder` (None: the one for temporary files). Raises UserError if they fit nowhere."""
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
            "free); name fewer samples, or use more nodes"
        )
    return "file"
