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


_RULE = "must be dtype, or two values LOW,HIGH with LOW below HIGH"


def check_range(name: str, value_range: Range | None) -> None:
    """Raise ValueError if the values are not finite, or black is not below white. `name`: name of the setting, for the
    message."""
    if value_range is None or value_range == "dtype":
        return
    low, high = value_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{name} {[low, high]} must be the values of black and of white, with black below white")


def check_range_argument(value_range: Range | None) -> None:
    """Raise UserError if the argument `value_range` of a Python function is not a `Range` or None, or is not valid."""
    try:
        check_range("value_range", value_range)
    except (TypeError, ValueError):
        raise UserError(f"value_range {value_range}: {_RULE}") from None


def add_range_option(parser: argparse._ActionsContainer) -> None:
    """Add `--value-range`, for programs without a config."""
    text = "pixel values that map to black and white in images with more than 8 bits per channel"
    parser.add_argument("--value-range", type=_parse, metavar="LOW,HIGH|dtype", help=text)


def _parse(text: str) -> Range:
    if text == "dtype":
        return "dtype"
    try:
        low, high = map(float, text.split(","))
        check_range("value_range", (low, high))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} {_RULE}") from None
    return low, high
