"""Detection of settings from the images: the number of channels, the dtype, and the value range. The `Kind` of an image
contains these properties of its file."""

from __future__ import annotations

import json
from collections.abc import Sequence

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import ModelConfig, Range
from m3ae_fast.images.image_kind import Kind, channels_and_dtype
from m3ae_fast.model.widening import words
from m3ae_fast.pretraining.automatic_settings import channels_set, set_to

_DTYPES = ("uint8", "uint16", "float32")  # each dtype can represent all values of the dtypes before it
_CONVERTED = (1, 3, 4)  # numbers of channels to which ordinary images are converted
_USED = 0.1  # minimum fraction of the value range of given weights that the images must cover
_FILLED = 0.9  # fraction of a data type's range that values must cover, so that the whole range is assumed to be used


def range_of(kinds: Sequence[Kind]) -> Range | None:
    """Return `model.value_range` for images of these kinds: None for levels from 0 to 255, "dtype" if values cover most
    of the range of their data type. Raises UserError for other values with more than 8 bits, because only the user
    knows the values of black and white."""
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
        f"values of black and white, for example --set model.value_range={guess}; model.value_range=dtype sets "
        f"{least:.10g} and {most:.10g}"
    )


def fit_to_images(
    start: ModelConfig, kinds: Sequence[Kind], value_range: Range | None, own: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return overrides with which a model that starts from given weights reads images of these kinds without loss, and
    notes for the user. The overrides do not include the mean and the standard deviation.

    Args:
        start: the config of the weights.
        kinds: the kinds of the images.
        value_range: value range of the images; None: not set.
        own: the user's overrides. Settings that they set are not changed.

    Raises:
        UserError: images of these kinds cannot be read with the channels of the weights, or their values do not suit
            the value range of the weights.
    """
    channels, dtype = channels_and_dtype(kinds)
    own_channels = channels_set(own)
    fitted, notes = [], []
    is_array = sum(kind.is_array for kind in kinds) * 2 > len(kinds)
    if own_channels is None and channels > start.channels:
        fitted.append(f"model.channels={channels}")
    now = own_channels or max(channels, start.channels)
    if own_channels is None and now != channels and (is_array or now not in _CONVERTED):
        raise UserError(
            f"--from: the weights have {start.channels} channels, but the images have {channels}, and cannot be "
            f"converted to {now} channels; choose other weights"
        )
    if now > start.channels:
        is_told = own_channels is not None or is_array or start.channels != 1
        instead = "" if is_told else "; --set model.channels=1 reads the images as grey instead"
        notes.append(f"{words(start.channels, now)}, with the mean and standard deviation of the images{instead}")
    elif channels == 1 and now in (3, 4):
        notes.append(f"the weights have {now} channels: grey images are read as colour images, which loses nothing")
    own_dtype = set_to(own, "model.image_dtype", None)
    if own_dtype is None and _DTYPES.index(dtype) > _DTYPES.index(start.image_dtype):
        fitted.append(f"model.image_dtype={dtype}")
        notes.append(f"the pixels are read as {dtype}, although the weights were trained with {start.image_dtype}")
    if start.value_range is not None and set_to(own, "model.value_range", None) is None:
        require_similar_values(kinds, start.value_range)
    return fitted, notes


def require_similar_values(kinds: Sequence[Kind], value_range: Range) -> None:
    """Raise UserError if values with more than 8 bits exceed the value range of given weights, or cover only a small
    part of it."""
    deep = [(kind.depth, kind.low, kind.high) for kind in kinds if kind.depth is not None]
    if not deep:
        return
    depths, lows, highs = zip(*deep)
    low, high = min(lows), max(highs)
    least, most = depths[0].limits if value_range == "dtype" else value_range
    if low < least or high > most or high - low < _USED * (most - least):
        raise UserError(
            f"--from: the images have {depths[0]}, which range from {low:.7g} to {high:.7g}, but the weights were "
            f"trained with black = {least:.7g} and white = {most:.7g}; convert the images, or accept this range with "
            f"--set model.value_range={json.dumps(value_range)}"
        )
