"""Pictures of HOG targets: in each patch, a line for each orientation of its edges.

Shapes: L patches.
"""

from __future__ import annotations

import math

import torch
from m3ae_kernels.hog import CENTRE, LARGEST_SHARE, ORIENTATIONS, SPREAD
from PIL import Image, ImageDraw
from torch import Tensor

from m3ae_fast.images.patch_grid import Grid

_SHARP = 4  # pixels drawn for each displayed pixel, in each direction


def glyphs(targets_LK: Tensor, grid: Grid, side: int) -> Image.Image:
    """Return a picture of the targets [L, 9] of the patches of a square image, which is `side` pixels high. Each line
    has the direction of the edges that it shows, which is perpendicular to their gradients. The larger the fraction of
    the gradients that a line shows, the brighter it is."""
    rows, columns = grid
    cell = side * _SHARP / rows
    shares_LK = ((targets_LK.float() * SPREAD + CENTRE) / LARGEST_SHARE).clamp(0, 1)
    picture = Image.new("L", (round(cell * columns), side * _SHARP))
    draw = ImageDraw.Draw(picture)
    for place, shares_K in enumerate(shares_LK):
        y, x = ((each + 0.5) * cell for each in divmod(place, columns))
        for k in torch.argsort(shares_K).tolist():  # the brightest line is drawn last
            along = math.pi * (k / ORIENTATIONS + 0.5)
            dx, dy = 0.45 * cell * math.cos(along), 0.45 * cell * math.sin(along)
            ink = round(255 * shares_K[k].item())
            draw.line((x - dx, y - dy, x + dx, y + dy), fill=ink, width=max(1, round(cell / 16)))
    return picture.resize((picture.width // _SHARP, side), Image.Resampling.BOX)
