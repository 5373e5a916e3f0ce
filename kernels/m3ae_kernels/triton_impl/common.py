"""Shared code of the kernels: access to the pixels of patches, launch settings, dtypes.

../pixels.py describes the order of pixels within patches.
"""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import accumulator
from ..pixels import planar

ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
FEW_CHANNELS = 4  # maximum number of channels for which kernels receive scales and shifts as scalars


def launcher(launch: Callable) -> Callable:
    """Return a launcher that makes the device of its first argument current, because Triton launches kernels on the
    current device. The first argument is a tensor, or a tuple that begins with a tensor."""

    @wraps(launch)
    def on_device(first, *arguments, **options):
        with torch.cuda.device_of(first[0] if isinstance(first, tuple) else first):
            return launch(first, *arguments, **options)

    return on_device


def acc_type(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's dtype in which values of `dtype` are summed: float64 for float64, otherwise float32."""
    return ACC[accumulator(dtype)]


def precision(dtype: torch.dtype) -> str:
    """Return the value of `input_precision` for `tl.dot`. For float32 on NVIDIA GPUs, this is "tf32" if torch's own
    matmuls may use TF32, and otherwise "tf32x3", which computes three TF32 products on the tensor cores and is about as
    precise as float32. In all other cases, it is "ieee", also on AMD GPUs, because their matrix cores support
    float32."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # From torch 2.9 on, fp32_precision also reflects allow_tf32, and reading allow_tf32 may raise an error.
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "tf32x3"
    return "tf32" if matmul.allow_tf32 else "tf32x3"


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def padded(matrix: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix in `dtype`, contiguous, with rows and columns of zeros added up to [rows, columns]. Without
    padding, a kernel would load rows of odd width one element at a time."""
    if matrix.shape == (rows, columns):
        return matrix.to(dtype).contiguous()
    return F.pad(matrix.to(dtype), (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def up(size: int, multiple: int = 16) -> int:
    """Return `size` rounded up to the next multiple."""
    return cdiv(size, multiple) * multiple


def in_place(images: Tensor) -> Tensor:
    """Return the images in a layout that kernels can read: contiguous, or in channels_last memory."""
    return images.contiguous() if planar(images) else images


def pixel_arguments(images: Tensor, patch_size: int, scale: list[float], shift: list[float]) -> dict:
    """Return the keyword arguments of every kernel that calls `load_pixels`. For up to four channels, scale and shift
    are scalars, which stay in registers; for more channels, they are a table."""
    channels, height, width = images.shape[1:]
    few = channels <= FEW_CHANNELS
    pad = [0.0] * (FEW_CHANNELS - len(scale))
    numbers = [*scale, *pad, *shift, *pad] if few else [0.0] * 2 * FEW_CHANNELS
    named = dict(zip(("s0", "s1", "s2", "s3", "b0", "b1", "b2", "b3"), numbers))
    table = None if few or not scale else channel_table((*scale, *shift), images.device)
    constants = {"P": patch_size, "C": channels, "H": height, "W": width}
    return named | constants | {"table": table, "PLANAR": planar(images), "NORMALISE": bool(scale)}


@lru_cache(maxsize=32)
def channel_table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers as a float32 tensor on the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@triton.jit
def patch_starts(ids, P: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PLANAR: tl.constexpr):
    """Return the offset of each patch's first pixel; int64, because a batch of images may have more than 2^31
    pixels."""
    grid_w: tl.constexpr = W // P
    patches: tl.constexpr = grid_w * (H // P)
    patch = (ids % patches).to(tl.int32)
    pixel = patch // grid_w * (P * W) + patch % grid_w * P
    return (ids // patches).to(tl.int64) * (C * H * W) + (pixel if PLANAR else pixel * C)


@triton.jit
def load_pixels(
    images, starts, k, mask, table, s0, s1, s2, s3, b0, b1, b2, b3,
    P: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PLANAR: tl.constexpr, NORMALISE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Return elements of patches in the dtype ACC.

    `starts`, [rows, 1] or [1, rows], contains the offset of each patch, and `k` contains the numbers of elements within
    a patch; the two are broadcast against each other. With NORMALISE, each element is multiplied by the scale of its
    channel, and the shift of the channel is added. Elements outside `mask` are not read; their values in the result are
    arbitrary, but finite."""
    if PLANAR:
        channel = k // (P * P)
        offset = channel * (H * W) + k % (P * P) // P * W + k % P
    else:
        channel = k % C
        offset = k // (P * C) * (W * C) + k % (P * C)
    x = tl.load(images + starts + offset, mask=mask, other=0).to(ACC)
    if NORMALISE and C > 4:
        channel = tl.minimum(channel, C - 1)  # for elements beyond the patch, which are masked
        x = x * tl.load(table + channel) + tl.load(table + C + channel)
    elif NORMALISE:
        scale = tl.where(channel == 0, s0, tl.where(channel == 1, s1, tl.where(channel == 2, s2, s3)))
        shift = tl.where(channel == 0, b0, tl.where(channel == 1, b1, tl.where(channel == 2, b2, b3)))
        x = x * scale + shift
    return x
