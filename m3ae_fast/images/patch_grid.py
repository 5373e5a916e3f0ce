"""Images with native aspect ratio: their patch grids, and the positions of the patches.

Shapes: B images, C channels, H x W pixels, P patch size, R patches of all images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias

import numpy as np
from torch import Tensor

from m3ae_fast.config import ModelConfig

Grid: TypeAlias = tuple[int, int]  # rows and columns of patches


@dataclass(frozen=True)
class Native:
    """Bounds for the sizes of images with native aspect ratio, and the layout of their position embeddings."""

    patch_size: int
    least: int  # minimum number of patches; smaller images are enlarged
    most: int  # maximum number of patches; larger images are reduced
    longest: int  # maximum number of patches along the longer side
    positions: Literal["absolute", "centred", "stored"]

    @classmethod
    def of(cls, config: ModelConfig) -> Native | None:
        """Return the bounds set in the config; None if images are square."""
        if config.resize == "square":
            return None
        positions = "stored" if config.positions == "stored" else config.native_positions
        return cls(config.patch_size, config.min_patches, config.most_patches, config.longest_side, positions)

    def grid(self, height: float, width: float, area: float | None = None) -> Grid:
        """Return the patch grid of an image of height x width pixels. In each candidate, at least one side is the exact
        number of patches, rounded up or down. The other side is also rounded, or it is chosen such that the number of
        all patches is nearly exact. Of the candidates within the bounds, the one that is nearest in aspect ratio and
        number of patches is chosen. `area`: number of pixels of the whole image, on which the number of patches of a
        crop depends; None: height x width."""
        patches = min(max((area or height * width) / self.patch_size**2, self.least), self.most)
        patches = min(patches, self.longest**2 * min(height / width, width / height))
        high, wide = (_around(math.sqrt(patches * ratio)) for ratio in (height / width, width / height))
        grids = list(product(high, wide))
        grids += [(rows, max(1, min(round(patches / rows), self.most // rows))) for rows in high]
        grids += [(max(1, min(round(patches / columns), self.most // columns)), columns) for columns in wide]

        def distance(grid: Grid) -> tuple[float, int]:
            rows, columns = grid
            ratio, size = columns * height / (rows * width), rows * columns / patches
            return round(math.log(ratio) ** 2 + math.log(size) ** 2, 9), -rows * columns

        return min(filter(self.fits, grids), key=distance)

    def fits(self, grid: Grid) -> bool:
        """Return whether a grid is within the upper bounds."""
        return 0 < grid[0] * grid[1] <= self.most and max(grid) <= self.longest

    def position_indices(self, grids: Sequence[Grid]) -> tuple[np.ndarray, np.ndarray, int]:
        """Return first_B, step_B and the number of rows of the table of position embeddings. In this table, the patch
        at row r and column c of grid b has the row first_B[b] + r * step_B[b] + c.

        For computed embeddings, the table contains a square of `longest` x `longest` positions, and each grid uses the
        upper left corner or the centre of the square. For stored embeddings, it contains the `distinct` grids one after
        another."""
        rows_B, columns_B = np.array(grids, np.int64).reshape(-1, 2).T
        if self.positions == "stored":
            starts, end = {}, 0
            for grid in distinct(grids):
                starts[grid], end = end, end + grid[0] * grid[1]
            return np.array([starts[grid] for grid in grids], np.int64), columns_B, end
        centred = self.positions == "centred"
        top_B, left_B = ((self.longest - side_B) // 2 * centred for side_B in (rows_B, columns_B))
        return top_B * self.longest + left_B, np.full_like(rows_B, self.longest), self.longest**2


def _around(side: float) -> set[int]:
    """Return the two integers nearest to `side` (its floor and ceiling), each at least 1; if `side` is an integer up to
    rounding error, return only that integer."""
    near = round(side)
    return {max(1, near)} if math.isclose(side, near, rel_tol=1e-9) else {max(1, math.floor(side)), math.ceil(side)}


def distinct(grids: Iterable[Grid]) -> list[Grid]:
    """Return the distinct grids in order of first occurrence."""
    return list(dict.fromkeys(grids))


def grid_of(image: Tensor, patch_size: int) -> Grid:
    """Return the patch grid of an image [C, H, W]. Raises ValueError if its sides are not multiples of the patch
    size."""
    height, width = image.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"the image has {width} x {height} pixels, which are not multiples of the patch size {patch_size}"
        )
    return height // patch_size, width // patch_size


def patch_rows(images: Sequence[Tensor], patch_size: int) -> Tensor:
    """Split one or more images [C, H, W] into patches, row by row, and return the patches of all images
    [R, C, P, P]."""
    grids, channels = [grid_of(image, patch_size) for image in images], len(images[0])
    cut = images[0].new_empty(sum(rows * columns for rows, columns in grids), channels, patch_size, patch_size)
    for image, (rows, columns), own in zip(images, grids, cut.split([rows * columns for rows, columns in grids])):
        blocks = image.reshape(channels, rows, patch_size, columns, patch_size)
        own.unflatten(0, (rows, columns)).copy_(blocks.permute(1, 3, 0, 2, 4))  # a single copy
    return cut
