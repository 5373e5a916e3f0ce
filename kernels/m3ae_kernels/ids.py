"""Checks of ids. The kernels themselves do not check ids.

On a CPU, the torch implementation always checks whether ids are in range. On other devices, a check would synchronise
with the device, so the range is checked only if M3AE_KERNELS_CHECK=1 is set. Whether ids are distinct is checked only
with this setting. The checks are called inside ops, where values are available even under torch.compile.
"""

import os

import torch
from torch import Tensor

from .dispatch import check_index
from .registry import traced

ENV = "M3AE_KERNELS_CHECK"


def checks_enabled() -> bool:
    """Return whether M3AE_KERNELS_CHECK enables checks everywhere."""
    return os.environ.get(ENV, "0") not in ("", "0")


def checked(ids: Tensor, impl: str) -> bool:
    """Return whether an op that runs on `impl`, "triton" or "torch", checks ids on this device."""
    return checks_enabled() or (impl != "triton" and ids.device.type == "cpu")


def check_range(op: str, name: str, ids: Tensor, rows: int, *, none: bool = False, ignored: int | None = None) -> None:
    """Raise IndexError unless all ids [T] are from 0 to rows - 1. With `none`, negative ids are allowed too. Ids equal
    to `ignored` are always allowed."""
    wrong = (ids >= rows) if none else (ids < 0) | (ids >= rows)
    if ignored is not None:
        wrong &= ids != ignored
    if not wrong.any():
        return
    at = int(wrong.nonzero()[0])
    others = ", or negative for no row" if none else "" if ignored is None else f", or {ignored} to be ignored"
    valid = f"from 0 to {rows - 1}" if rows else "absent, because there are no rows"
    raise IndexError(f"{op}: {name} is out of range at row {at}: it is {int(ids[at])}, but must be {valid}{others}")


def check_distinct(op: str, name: str, ids: Tensor) -> None:
    """Raise IndexError if two non-negative ids [T] are equal, because both rows would be written to the same
    position."""
    ordered, places = torch.sort(ids, stable=True)
    equal = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
    if not equal.any():
        return
    first = int(equal.nonzero()[0])
    at, again = int(places[first]), int(places[first + 1])
    raise IndexError(
        f"{op}: {name} is {int(ids[at])} at row {at} and again at row {again}: values must be distinct; ids that are "
        "numbered per image are converted by m3ae_kernels.flat_ids"
    )


def without_padding(ids: Tensor) -> Tensor:
    """Return ids [T] without the run of equal ids at their end, such as the ids of rows that pad a batch. A run of a
    single id is kept."""
    ends = (ids != ids[-1:]).nonzero()
    used = int(ends[-1]) + 1 if len(ends) else 0
    return ids if len(ids) - used == 1 else ids[:used]


def flat_ids(ids: Tensor, patches_per_image: int) -> Tensor:
    """Return the ids that the ops expect, image * patches_per_image + id, for ids that are numbered per image, such as
    MAE's `ids_keep`.

    Args:
        ids: [B, ...] int32 or int64, from 0 to patches_per_image - 1; B images.
        patches_per_image: number of patches of an image. For the argument `rows` of `gather_tokens`, this is the number
            of rows of x per image.

    Returns:
        The ids with the shape and dtype of `ids`.

    Raises:
        TypeError, ValueError: the dtype or shape of `ids` is wrong.
        IndexError: an id is out of range (checked on a CPU, and everywhere with M3AE_KERNELS_CHECK=1, but never under
            torch.compile).
    """
    check_index("ids", ids, (*[None] * max(1, ids.dim()),), ids)
    if checked(ids, "torch") and not traced(ids):
        check_range("flat_ids", "ids", ids.flatten(), patches_per_image)
    images = torch.arange(len(ids), dtype=ids.dtype, device=ids.device)
    return ids + patches_per_image * images.view(-1, *[1] * (ids.dim() - 1))


def check_ends(op: str, name: str, ends: Tensor, rows: int, longest: int) -> None:
    """Raise IndexError unless ends [S + 1] increase from 0 to `rows` in steps of at most `longest`."""
    steps = ends.diff(prepend=ends[:1])
    right = (steps >= 0) & (steps <= longest)
    right[:1] &= ends[:1] == 0
    right[-1:] &= ends[-1:] == rows
    if len(ends) and right.all():
        return
    at = int((~right).nonzero()[0]) if len(ends) else 0
    found = f"{name}[{at}] is {int(ends[at])}" if len(ends) else f"{name} is empty"
    valid = f"from 0 to {rows}, the number of rows, in steps of at most {longest}, the maximum length"
    raise IndexError(f"{op}: {name} must increase {valid}: {found}")
