"""The HOG targets, compared with a computation pixel by pixel. The tests run on both implementations, like those of
test_kernel_ops.py."""

import importlib
import math
import os

import m3ae_kernels
import pytest
import torch
from m3ae_kernels import hog_targets, reference
from m3ae_kernels.pixels import LARGEST
from torch import Tensor

from tests.kernels.kernel_cases import CASES, run
from tests.kernels.test_kernel_ops import double, error, largest_allocation

TRITON = os.environ.get("M3AE_KERNELS_IMPL") == "triton"
# the targets of orientations without votes, and of orientations whose votes are clipped
EMPTY, FULL = (0 - 0.06) / 0.07, (0.2 - 0.06) / 0.07


def by_hand(grey: list[list[float]], patch: int) -> list[list[float]]:
    """Return the targets of all patches of a grey image."""
    height, width = len(grey), len(grey[0])
    rows, columns = height // patch, width // patch
    cells = [[[0.0] * 9 for _ in range(columns)] for _ in range(rows)]
    for y in range(height):
        for x in range(width):
            dx = grey[y][min(x + 1, width - 1)] - grey[y][max(x - 1, 0)]
            dy = grey[min(y + 1, height - 1)][x] - grey[max(y - 1, 0)][x]
            place = math.degrees(math.atan2(dy, dx)) % 180 / 20
            low, share, cell = int(place), place % 1, cells[y // patch][x // patch]
            cell[low % 9] += math.hypot(dx, dy) * (1 - share) / patch**2
            cell[(low + 1) % 9] += math.hypot(dx, dy) * share / patch**2
    found = []
    for r in range(rows):
        for c in range(columns):
            near = [cells[y][x] for y in range(rows) for x in range(columns) if abs(y - r) < 2 and abs(x - c) < 2]
            norm = math.sqrt(sum(vote**2 for cell in near for vote in cell) * 9 / len(near))
            found.append([(min(vote / (norm + 0.01), 0.2) - 0.06) / 0.07 for vote in cells[r][c]])
    return found


def drawn(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Return float64 images from 0 to 1, of which the first is flat."""
    images = torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(0)).double()
    images[0] = images[0, :, :1, :1]
    return images


@pytest.mark.parametrize("patch", [1, 2, 3, 6])
def test_targets_equal_those_computed_pixel_by_pixel(patch):
    images = drawn(2, 3, 12, 18)
    ids = torch.randperm(2 * 216 // patch**2)
    expected = torch.tensor([each for image in images for each in by_hand(image.mean(0).tolist(), patch)])
    for found in (
        hog_targets(images, ids, patch_size=patch),
        reference.hog_targets(images, ids, patch_size=patch, dtype=torch.float64),
    ):
        torch.testing.assert_close(found, expected[ids].double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("degrees", [0, 10, 45, 90, 130, 179, 180, 275])
def test_a_ramp_votes_for_the_two_nearest_orientations(degrees):
    """The norm of nine equal histograms is three times the norm of one of them. The larger votes are clipped."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    angle = math.radians(degrees)
    ramp = ((math.cos(angle) * x + math.sin(angle) * y) / 40 + 0.5)[None, None]
    place = degrees % 180 / 20
    votes = torch.zeros(9, dtype=torch.float64)
    votes[int(place) % 9], votes[(int(place) + 1) % 9] = 1 - place % 1, place % 1
    shares = (votes / 20 / (3 * votes.norm() / 20 + 0.01)).clamp(max=0.2)
    # an inner patch, because gradients are halved at the border
    found = hog_targets(ramp, torch.tensor([14]), patch_size=2)[0]
    torch.testing.assert_close(found.double(), (shares - 0.06) / 0.07, rtol=0, atol=1e-4)


def test_an_edge_votes_in_its_own_patch_and_in_that_of_its_neighbour():
    images = torch.zeros(1, 1, 4, 16, dtype=torch.uint8)
    images[..., 8:] = 255
    found = hog_targets(images, torch.arange(4), patch_size=4)
    torch.testing.assert_close(found[1:3, 0], torch.tensor([FULL, FULL]))
    torch.testing.assert_close(found[1:3, 1:], torch.full((2, 8), EMPTY))
    torch.testing.assert_close(found[[0, 3]], torch.full((2, 9), EMPTY))


def test_a_pixel_affects_only_the_patches_within_reach():
    """A pixel of a patch affects the gradients of the patch beside it, and these affect the norms of a third patch."""
    images = drawn(2, 1, 4, 24)[1:]
    changed = images.clone()
    changed[..., 3] += 0.5
    before, after = (hog_targets(each, torch.arange(6), patch_size=4) for each in (images, changed))
    assert ((before != after).any(1) == torch.tensor([True, True, True, False, False, False])).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 13])
def test_targets_do_not_depend_on_the_dtype_and_the_layout_of_the_images(dtype, channels):
    images = (drawn(3, channels, 8, 12) * 255).round() / 255  # exact in uint8
    ids = torch.randperm(18)
    expected = hog_targets(images, ids, patch_size=4)
    cast = ((images * LARGEST[dtype]).round() if dtype in LARGEST else images).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = hog_targets(cast.contiguous(memory_format=layout), ids.int(), patch_size=4)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=0.05 if dtype == torch.float16 else 1e-4)


def test_the_normalisation_of_images_is_undone():
    images, mean, std = drawn(2, 3, 8, 8).float(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    normalised = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    ids = torch.arange(8)
    expected = hog_targets(images, ids, patch_size=4)
    torch.testing.assert_close(hog_targets(normalised, ids, patch_size=4, std=std), expected, rtol=0, atol=1e-3)
    assert (hog_targets(normalised, ids, patch_size=4) - expected).abs().max() > 0.01


def test_equal_ids_have_equal_targets_and_ids_may_have_any_shape():
    images, ids = drawn(3, 3, 8, 8), torch.tensor([[7, 0, 11], [0, 7, 3]])
    found = hog_targets(images, ids, patch_size=4)
    assert found.shape == (2, 3, 9) and torch.equal(found[0, 0], found[1, 1]) and torch.equal(found[0, 1], found[1, 0])
    assert torch.equal(found.flatten(0, 1), hog_targets(images, ids.flatten(), patch_size=4))
    assert hog_targets(images, ids[:0], patch_size=4).shape == (0, 3, 9)


def test_neither_float_images_nor_the_targets_of_all_patches_are_stored(monkeypatch):
    """With few rows, no allocation is as large as the targets of all patches. Chunks of images do not change the
    results."""
    torch.manual_seed(0)
    inputs = CASES["hog-p16"][0](torch.float32, rows=20, dim=16, batch=67, channels=1, patch=8)
    whole, true = run(m3ae_kernels, "hog-p16", inputs), run(reference, "hog-p16", double(inputs))
    everything = 4 * 9 * 67 * 6
    if not TRITON:
        assert largest_allocation("hog-p16", inputs) > everything  # with a single chunk
        monkeypatch.setattr(importlib.import_module("m3ae_kernels.hog"), "CHUNK_PIXELS", 2 * 6 * 64)
    for name, got in run(m3ae_kernels, "hog-p16", inputs).items():
        assert torch.equal(got, whole[name]) and error(got, true[name]) < 1e-5, name
    assert largest_allocation("hog-p16", inputs) < everything
