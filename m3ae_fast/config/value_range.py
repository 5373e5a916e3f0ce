"""Value ranges: the values of black and white in images with more than 8 bits per channel."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Strict

# (black, white), or "dtype": the lowest and the highest value of the file's data type, or 0 and 1 for floats. The tuple
# is not strict, because pydantic's strict mode does not accept a JSON array for a tuple.
Range = Annotated[tuple[float, float], Strict(False)] | Literal["dtype"]


def check_range(name: str, value_range: Range | None) -> None:
    """Raise ValueError if the values are not finite, or black is not below white. `name`: name of the setting, for the
    message."""
    if value_range is None or value_range == "dtype":
        return
    low, high = value_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{name} {[low, high]} must be the values of black and of white, with black below white")


def as_range(given: Any) -> Any:
    """Return a valid range from a text such as "0,10000", from a sequence, or from "dtype"; None stays None. Raises
    ValueError if the range is not valid."""
    if given is None or given == "dtype":
        return given
    try:
        low, high = map(float, given.split(",") if isinstance(given, str) else given)
        check_range("value_range", (low, high))
    except (TypeError, ValueError):
        raise ValueError("must be dtype, or two values LOW,HIGH with LOW below HIGH") from None
    return low, high
