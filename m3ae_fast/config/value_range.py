"""Value ranges: the values of black and white in images with more than 8 bits per channel."""

from __future__ import annotations

import argparse
import math
from typing import Annotated, Literal

from pydantic import Strict

from m3ae_fast.base.errors import UserError

# (black, white), or "dtype": the lowest and the highest value of the file's data type, or 0 and 1 for floats. Strict
# mode would not accept a JSON array as a tuple.
Range = Annotated[tuple[float, float], Strict(False)] | Literal["dtype"]


def check_range(name: str, image_range: Range | None) -> None:
    """Raise ValueError if the value of black is not below the value of white. `name`: name of the setting, for the
    message."""
    if isinstance(image_range, tuple) and not image_range[0] < image_range[1]:
        raise ValueError(f"{name} {list(image_range)} must be the values of black and of white, with black below white")


def require_range(image_range: Range | None) -> None:
    """Raise UserError if the argument of `--range` is neither "dtype" nor two finite values with black below white;
    None is valid too."""
    if image_range is None or image_range == "dtype":
        return
    try:
        low, high = image_range
        valid = math.isfinite(low) and math.isfinite(high) and low < high
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(f"--range {image_range}: must be dtype, or two values LOW,HIGH with LOW below HIGH")


def add_range_option(parser: argparse._ActionsContainer) -> None:
    """Add `--range`, for programs without a config."""
    text = "pixel values that map to black and white in images with more than 8 bits per channel"
    parser.add_argument("--range", type=_parse, metavar="LOW,HIGH|dtype", help=text)


def _parse(text: str) -> Range:
    if text == "dtype":
        return "dtype"
    try:
        low, high = map(float, text.split(","))
        check_range("range", (low, high))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high)):
        raise argparse.ArgumentTypeError(f"{text!r} must be dtype, or two values LOW,HIGH with LOW below HIGH")
    return low, high
