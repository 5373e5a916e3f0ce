"""Detection of settings from the images: the number of channels, the dtype, and the value range."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import Range
from m3ae_fast.images.image_kind import Kind

_FILLED = 0.9  # minimum fraction of a data type's range that must occur to assume that the whole range is used


def channels_and_dtype(kinds: Sequence[Kind]) -> tuple[int, str]:
    """Return `model.channels` and `model.image_dtype` for images of these kinds. If there are grey and colour images,
    the model has colour channels. If most images are arrays of bands, the settings are those of the most frequent kind
    of array, because arrays are not converted."""
    arrays = Counter((kind.channels, kind.dtype) for kind in kinds if kind.is_array)
    if 2 * arrays.total() > len(kinds):
        channels, dtype = arrays.most_common(1)[0][0]
    else:
        channels, dtype = (3 if any(kind.channels == 3 for kind in kinds) or not kinds else 1), "uint8"
    return channels, dtype


def range_of(kinds: Sequence[Kind]) -> Range | None:
    """Return `data.range` for images of these kinds: None for levels from 0 to 255, "dtype" if values cover most of the
    range of their data type. Raises UserError for other values with more than 8 bits, because only the user knows the
    values of black and white."""
    deep = [(kind, kind.depth) for kind in kinds if kind.depth is not None]
    if not deep:
        return None
    depth = deep[0][1]
    low, high = min(kind.low for kind, _ in deep), max(kind.high for kind, _ in deep)
    least, most = depth.limits
    if least <= low and high <= most and high - low >= _FILLED * (most - least):
        return "dtype"
    known = depth.kind == "unsigned"
    guess = f"[0,{2 ** max(int(high), 1).bit_length() - 1}]" if known else f"[{low:.6g},{max(high, low + 1):.6g}]"
    raise UserError(
        f"the images have {depth}, which range from {low:.7g} to {high:.7g} in {len(deep):,} inspected images: set the "
        f"values of black and white, for example --set data.range={guess}; data.range=dtype sets {least:.10g} and "
        f"{most:.10g}"
    )
