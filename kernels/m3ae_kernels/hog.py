"""Histograms of oriented gradients (HOG; Dalal and Triggs, CVPR 2005) of patches, as targets of a masked autoencoder
(MaskFeat, arXiv 2112.09133, section 3). The targets are computed from the pixels of a few images at a time.

A patch is one cell. The gradients are those of a grey image, the mean of the channels, with values from 0 to 1. Each
pixel votes, with the magnitude of its gradient, for the two nearest of nine orientations from 0 to 180 degrees. The
votes of a cell are averaged, divided by the norm of the histograms of the 3 x 3 cells around it, clipped, and brought
to a mean of about 0 and a variance of about 1.

Shapes: M rows, B images, C channels, H x W pixels, P patch size, h x w patches of an image.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ORIENTATIONS = 9
EPS = 0.01  # added to the norm of 3 x 3 cells, so that noise in flat patches gives small values
LARGEST_SHARE = 0.2  # values of a normalised histogram above this are clipped, as in the paper by Dalal and Triggs
# typical mean and standard deviation of the clipped values, by which they are standardised
CENTRE, SPREAD = 0.06, 0.07
CHUNK_PIXELS = 1 << 17  # pixels per chunk of the torch implementation; their float32 values fit into the caches


def fill_targets(images: Tensor, patch_ids: Tensor, patch_size: int, scale: Sequence[float], out: Tensor) -> None:
    """Fill `out` [M, 9] with the targets, one chunk of images at a time. On devices other than a CPU, all images are
    one chunk, because the host would otherwise wait for the number of rows of each chunk."""
    batch, _, height, width = images.shape
    patches = height * width // patch_size**2
    chunk = max(1, CHUNK_PIXELS // (height * width)) if images.device.type == "cpu" else batch
    ids, order = patch_ids.long().sort()
    starts = range(0, batch, chunk)
    ends = [len(ids)]
    if len(starts) > 1:
        firsts = torch.tensor([patches * start for start in starts[1:]], device=ids.device)
        ends = [*torch.searchsorted(ids, firsts).tolist(), len(ids)]
    begin = 0
    for start, end in zip(starts, ends):
        if end > begin:
            cells = _cells(images[start : start + chunk], patch_size, scale, out.dtype)
            out[order[begin:end]] = _normalised(cells, ids[begin:end] - start * patches)
        begin = end


def _cells(images: Tensor, patch_size: int, scale: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return the mean votes of the pixels of each patch, [B, h, w, 9] of `dtype`."""
    values = images.to(dtype)
    if images.is_floating_point():
        values = values * values.new_tensor([each / scale[0] for each in scale])[:, None, None]
    grey = F.pad(values.sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate")[:, 0]  # in units of scale[0]
    dx, dy = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2], grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    size = torch.addcmul(dx * dx, dy, dy).sqrt_()
    # `place` is the orientation in steps of 20 degrees, from -4.5 to 4.5. Where the gradient is zero, 0 / 0 is replaced
    # by 0; these pixels do not vote, because their `size` is 0.
    place = torch.div(dy, dx).nan_to_num_(0, math.inf, -math.inf).atan_().mul_(ORIENTATIONS / math.pi)
    low = place.floor()
    above = place.sub_(low).mul_(size)  # the vote for the orientation after `low`
    below = size.sub_(above)
    batch, height, width = low.shape
    h, w = height // patch_size, width // patch_size
    # A cell has 11 bins, with the numbers -5 to 5. Each pixel votes for the two numbers next to its `place`.
    first = torch.arange(5, batch * h * w * 11, 11, device=low.device)
    bins = low.long().view(batch, h, patch_size, w, patch_size).add_(first.view(batch, h, 1, w, 1)).flatten()
    votes = low.new_zeros(batch * h * w * 11)
    votes.scatter_add_(0, bins, below.flatten()).scatter_add_(0, bins.add_(1), above.flatten())
    bins_B11 = votes.mul_(scale[0] / patch_size**2).view(batch, h, w, 11)
    cells = F.pad(bins_B11[..., 5:], (0, 3))  # the bins 0 to 5
    cells[..., 4:] += bins_B11[..., :5]  # the bins -5 to -1 are the orientations 4 to 8, 180 degrees away
    return cells


def _normalised(cells: Tensor, ids: Tensor) -> Tensor:
    """Return the targets [M, 9] of the patches `ids` [M], given the mean votes of all patches [B, h, w, 9]. At the
    border of an image, where some of the 3 x 3 cells are missing, the sum of the squares over the n existing cells is
    multiplied by 9 / n."""
    squares = cells.square().sum(-1)[:, None]
    around = F.avg_pool2d(squares, 3, 1, 1, count_include_pad=False).mul_(9)
    norm_M1 = around.flatten()[ids, None].sqrt_().add_(EPS)
    return cells.flatten(0, 2)[ids].div_(norm_M1).clamp_(max=LARGEST_SHARE).sub_(CENTRE).div_(SPREAD)
